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

from vggt_ros.frames.frame import Calibration
from vggt_ros.geometry.poses import Array

Depth = npt.NDArray[np.float32]

# Type of a pixel of a depth image, and its unit in metres (REP-118), by the encoding in ROS.
DEPTH_ENCODINGS = {'16UC1': ('u2', 0.001), 'mono16': ('u2', 0.001), '32FC1': ('f4', 1.0)}


@dataclass(frozen=True)
class RgbdFrame:
    """One picture with truth."""

    stamp: float  # s, when it was taken
    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    depth: Depth  # (h, w), m along the optical axis, NaN where unknown; it
    # covers the same view as the image, perhaps at another resolution
    world_from_camera: Array  # (4, 4), optical frame
    intrinsics: Array  # (3, 3), pixels of the image
    calibration: Calibration | None = None  # if the image has distortion to be taken out


class RgbdRecording(Protocol):
    """Frames in the order of time."""

    name: str

    def __len__(self) -> int: ...

    def frame(self, index: int) -> RgbdFrame:
        """
        Read a frame.

        :raises ValueError: if its files or messages cannot be read.
        """
        ...


def read_depth_image(path: Path, units_per_metre: float, unknown: tuple[int, ...]) -> Depth:
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
