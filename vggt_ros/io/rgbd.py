# SPDX-License-Identifier: Apache-2.0
"""
Recordings with truth: pictures whose depth and camera are known, for training and evaluation.

What the formats share; each has a module of its own, and `recordings` tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import matrix_from_quaternion

Array = npt.NDArray[np.float64]
Depth = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RgbdFrame:
    """One picture with truth."""

    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    depth: Depth  # (h, w), m along the optical axis, NaN where unknown; it
    # covers the same view as the image, perhaps at another resolution
    world_from_camera: Array  # (4, 4), optical frame
    intrinsics: Array  # (3, 3), pixels of the image


class Recording(Protocol):
    """Frames in the order of time."""

    name: str

    def __len__(self) -> int: ...

    def frame(self, index: int) -> RgbdFrame:
        """
        Read a frame.

        :raises ValueError: if its files or messages cannot be read.
        """
        ...


def read_depth(path: Path, units_per_metre: float, unknown: tuple[int, ...]) -> Depth:
    """
    Read a depth picture of 16-bit integers.

    :param unknown: values that stand for no measurement.
    :returns: (H, W), m, float32, NaN where unknown.
    :raises ValueError: if the file is no such picture.
    """
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise ValueError(f'{path} cannot be read as an image')
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise ValueError(
            f'{path} has {stored.dtype} pixels of shape {stored.shape}; '
            'expected one channel of 16 bits'
        )
    depth: Depth = stored.astype(np.float32) / np.float32(units_per_metre)
    depth[np.isin(stored, unknown)] = np.nan
    return depth


def interpolate_poses(stamps: Array, poses: Array, wanted: Array, largest_gap: float) -> Array:
    """
    Find poses between measured ones.

    Quaternions are blended linearly and normalised: over the gap of a motion-capture system or an
    odometry that is a rotation at even speed.

    :param stamps: (N,), s, increasing.
    :param poses: (N, 7): position, then quaternion x, y, z, w.
    :param wanted: (M,), s.
    :param largest_gap: s between neighbours that may be bridged.
    :returns: (M, 4, 4); NaN where no two neighbours are near enough.
    """
    after = np.searchsorted(stamps, wanted).clip(1, max(len(stamps) - 1, 1))
    if len(stamps) < 2:
        return np.full((len(wanted), 4, 4), np.nan)
    before = after - 1
    gap = stamps[after] - stamps[before]
    share = (wanted - stamps[before]) / np.maximum(gap, 1e-9)
    # A recording may begin or end a little outside of its poses: the nearest one is meant then.
    outside = np.maximum(stamps[0] - wanted, wanted - stamps[-1])
    known = (gap <= largest_gap) & (outside <= largest_gap / 2)
    share = share.clip(0, 1)[:, None]
    position = (1 - share) * poses[before, :3] + share * poses[after, :3]
    one, other = poses[before, 3:], poses[after, 3:]
    other = np.where((one * other).sum(1, keepdims=True) < 0, -other, other)
    quaternion = (1 - share) * one + share * other
    result = matrices_from_poses(np.concatenate((position, quaternion), axis=1))
    result[~known] = np.nan
    return result


def matrices_from_poses(poses: Array) -> Array:
    """Turn (N, 7) positions and quaternions x, y, z, w of any length into (N, 4, 4)."""
    matrices = np.tile(np.eye(4), (len(poses), 1, 1))
    matrices[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(poses[:, 3:])).numpy()
    matrices[:, :3, 3] = poses[:, :3]
    return matrices
