# SPDX-License-Identifier: Apache-2.0
"""
The image and the depth image of each frame, as files of the output folder.

Depth is a 16-bit PNG, 0 where it is not confident. What one unit of it means, its step, is stored
elsewhere for each image: so that the farthest pixel has the largest number, for precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.io.images import read_image, read_uint16_image
from vggt_ros.offline.folder_files import open_file, write_file

_MAX_STORED = 65535
_JPEG_QUALITY = (cv2.IMWRITE_JPEG_QUALITY, 92)


def image_name(frame_id: int) -> str:
    """Name the image of a frame, relative to the output folder."""
    return f'images/{frame_id:06d}.jpg'


def depth_name(frame_id: int) -> str:
    """Name the depth image of a frame, relative to the output folder."""
    return f'depth/{frame_id:06d}.png'


def write_frame_image(folder: Path, frame_id: int, image: npt.NDArray[np.uint8]) -> None:
    """Write an RGB image (H, W, 3)."""
    _write(folder, image_name(frame_id), image[..., ::-1], _JPEG_QUALITY)


def write_frame_depth(folder: Path, frame_id: int, depth: npt.NDArray[np.float32]) -> float:
    """
    Write depth (H, W), NaN where it is not confident.

    :returns: the step, in the unit of the depth.
    """
    step = max(float(np.nanmax(depth, initial=0.0)), 1e-30) / _MAX_STORED
    stored = np.nan_to_num(depth / np.float32(step), nan=0.0).round().astype(np.uint16)
    _write(folder, depth_name(frame_id), stored)
    return step


def read_frame_image(folder: Path, frame_id: int) -> npt.NDArray[np.uint8]:
    """
    Read an RGB image (H, W, 3).

    :raises ValueError: if the file is no image.
    """
    with open_file(folder, image_name(frame_id)) as file:
        return read_image(file)


def read_frame_depth(
    folder: Path, frame_id: int, step: float, size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """
    Read depth (H, W) in the unit of the step, NaN where it is not confident.

    :param size: H, W that it must have.
    :raises ValueError: if the file is no such image.
    """
    with open_file(folder, depth_name(frame_id)) as file:
        stored = read_uint16_image(file, size)
    depth: npt.NDArray[np.float32] = stored.astype(np.float32) * np.float32(step)
    depth[stored == 0] = np.nan
    return depth


def _write(
    folder: Path, name: str, image: npt.NDArray[Any], options: tuple[int, ...] = ()
) -> None:
    encoded, data = cv2.imencode(Path(name).suffix, image, options)
    if not encoded:
        raise ValueError(f'{name}: an image of shape {image.shape} cannot be encoded')
    write_file(folder, name, data.tobytes())
