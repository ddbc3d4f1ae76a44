# SPDX-License-Identifier: Apache-2.0
"""
Recordings with ground truth: images with depth and camera pose, for training and evaluation.

What the formats have in common; each has a module of its own, and `recordings` opens them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Calibration
from vggt_ros.geometry.poses import Array
from vggt_ros.io.images import read_uint16_image

Depth = npt.NDArray[np.float32]

_MAX_OFFSET = 0.02  # s between the stamps of a colour image and its depth image
# Type of a pixel of a depth image, and its unit in metres (REP-118), by the encoding in ROS.
DEPTH_ENCODINGS = {'16UC1': ('u2', 0.001), 'mono16': ('u2', 0.001), '32FC1': ('f4', 1.0)}


@dataclass(frozen=True)
class RgbdFrame:
    """One image with ground truth."""

    stamp: float  # s, acquisition time
    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    depth: Depth  # (h, w), m along the optical axis, NaN where unknown; it has the field of view
    # of the image, perhaps at another resolution
    world_from_camera: Array  # (4, 4), optical frame
    intrinsics: Array  # (3, 3), pixels of the image
    calibration: Calibration | None = None  # if the image is distorted


class RgbdRecording(Protocol):
    """Frames in time order."""

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
    Read a 16-bit depth image.

    :param unknown: values without a measurement.
    :returns: (H, W), m, NaN where unknown.
    :raises ValueError: if the file is no such image.
    """
    stored = read_uint16_image(path)
    depth: Depth = stored.astype(np.float32) / np.float32(units_per_metre)
    depth[np.isin(stored, unknown)] = np.nan
    return depth


def associate_depth(
    name: str, colour_stamps: Array, depth_stamps: Array, world_from_camera: Array
) -> list[tuple[int, int]]:
    """
    Find the colour images that have a depth image and a pose.

    :param name: of the recording, for the error.
    :param colour_stamps: (N,), s.
    :param depth_stamps: (M,), s.
    :param world_from_camera: (N, 4, 4) of the colour images, NaN where unknown.
    :returns: indices of colour images, each with that of its depth image.
    :raises ValueError: if there are none.
    """
    nearest = np.abs(depth_stamps - colour_stamps[:, None]).argmin(axis=1)
    with_depth = np.abs(depth_stamps[nearest] - colour_stamps) <= _MAX_OFFSET
    usable = with_depth & np.isfinite(world_from_camera).all(axis=(1, 2))
    if not usable.any():
        raise ValueError(
            f'{name}: of {len(colour_stamps)} colour images {int(with_depth.sum())} have a depth '
            f'image within {_MAX_OFFSET} s, and none of these has a pose'
        )
    return [(int(i), int(nearest[i])) for i in np.flatnonzero(usable)]


def read_rows(
    path: Path, columns: int, separator: str | None = None, more: bool = False
) -> list[list[str]]:
    """
    Read the values in the lines of a text file; lines that begin with # are comments.

    :param separator: None: whitespace.
    :param more: a line may have more columns.
    :raises ValueError: if the file cannot be read, a line has another number, or there is none.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != '#']
    rows = [line.split(separator) for line in lines]
    wrong = [
        line
        for line, row in zip(lines, rows, strict=True)
        if len(row) < columns or (len(row) > columns and not more)
    ]
    if wrong or not rows:
        found = f'the line {wrong[0]!r}' if wrong else 'no lines'
        expected = f'{columns} or more' if more else str(columns)
        raise ValueError(f'{path} has {found}; expected lines of {expected} values')
    return rows


def parse_numbers(path: Path, rows: list[list[str]]) -> Array:
    """
    Convert rows of text to numbers.

    :param path: of the file, for the error.
    :raises ValueError: if a value is no number.
    """
    try:
        numbers: Array = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f'{path} has a value that is no number: {error}') from error
    return numbers
