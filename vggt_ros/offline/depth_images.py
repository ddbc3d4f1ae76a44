# SPDX-License-Identifier: Apache-2.0
"""
Depth as 16-bit PNG: a number of steps, 0 where it is not trusted.

How long a step is, is said elsewhere, for each picture: units of length differ, and 16 bits are
precise where the farthest pixel has the largest number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.offline.atomic_write import atomic_writer

_STEPS = 65535


def write_depth_png(path: Path, depth: npt.NDArray[np.float32]) -> float:
    """
    Write depth (H, W), NaN where it is not trusted.

    :returns: length of a step, in the unit of the depth.
    """
    step = max(float(np.nanmax(depth, initial=0.0)), 1e-30) / _STEPS
    stored = np.nan_to_num(depth / np.float32(step), nan=0.0).round().astype(np.uint16)
    write_picture(path, stored)
    return step


def read_depth_png(path: Path, step: float) -> npt.NDArray[np.float32]:
    """
    Read depth (H, W) in the unit of the step, NaN where it is not trusted.

    :raises ValueError: if the file is no such picture.
    """
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
        raise ValueError(f'{path} cannot be read as 16-bit depth')
    depth: npt.NDArray[np.float32] = stored.astype(np.float32) * np.float32(step)
    depth[stored == 0] = np.nan
    return depth


def write_picture(path: Path, image: npt.NDArray[Any], options: tuple[int, ...] = ()) -> None:
    """Write what OpenCV can write, whole or not at all; three channels are BGR."""
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise ValueError(f'an image of shape {image.shape} cannot be written as {path.suffix}')
    with atomic_writer(path) as file:
        file.write(data.tobytes())
