# SPDX-License-Identifier: Apache-2.0
"""Poses as seven numbers, position and quaternion, and what lies between measured ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import matrix_from_quaternion

Array = npt.NDArray[np.float64]


def interpolate_poses(
    stamps: Array, poses: Array, wanted: Array, largest_gap: float, beyond: float
) -> Array:
    """
    Find poses between measured ones.

    Quaternions are blended linearly and normalised: over the gap of a motion-capture system or an
    odometry that is a rotation at even speed.

    :param stamps: (N,), s, increasing.
    :param poses: (N, 7): position, then quaternion x, y, z, w.
    :param wanted: (M,), s.
    :param largest_gap: s between neighbours that may be bridged.
    :param beyond: s before the first and after the last pose for which that pose is taken.
    :returns: (M, 4, 4); NaN where no two neighbours are near enough.
    """
    if len(stamps) == 0:
        return np.full((len(wanted), 4, 4), np.nan)
    if len(stamps) == 1:  # as if it had come twice
        stamps, poses = stamps.repeat(2), poses.repeat(2, axis=0)
    after = np.searchsorted(stamps, wanted).clip(1, len(stamps) - 1)
    before = after - 1
    gap = stamps[after] - stamps[before]
    share = (wanted - stamps[before]) / np.maximum(gap, 1e-9)
    outside = np.maximum(stamps[0] - wanted, wanted - stamps[-1])
    known = (gap <= largest_gap) & (outside <= beyond)
    share = share.clip(0, 1)[:, None]
    position = (1 - share) * poses[before, :3] + share * poses[after, :3]
    one, other = poses[before, 3:], poses[after, 3:]
    other = np.where((one * other).sum(1, keepdims=True) < 0, -other, other)
    quaternion = (1 - share) * one + share * other
    result = matrices_from_poses(np.concatenate((position, quaternion), axis=1))
    result[~known] = np.nan
    return result


def pose_from_message(position: Any, orientation: Any) -> list[float]:
    """Read seven numbers from a point or vector and a quaternion of geometry_msgs."""
    return [
        *(float(getattr(position, axis)) for axis in 'xyz'),
        *(float(getattr(orientation, axis)) for axis in 'xyzw'),
    ]


def matrices_from_poses(poses: Array) -> Array:
    """Turn (N, 7) positions and quaternions x, y, z, w of any length into (N, 4, 4)."""
    matrices = np.tile(np.eye(4), (len(poses), 1, 1))
    matrices[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(poses[:, 3:])).numpy()
    matrices[:, :3, 3] = poses[:, :3]
    return matrices
