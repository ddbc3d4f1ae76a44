# SPDX-License-Identifier: Apache-2.0
"""
Sequences of the TUM RGB-D benchmark (Sturm et al., IROS 2012) and of everyone who writes so.

A folder with `rgb.txt` and `depth.txt` (stamp and file of each picture) and `groundtruth.txt`
(stamp, tx ty tz, qx qy qz qw of the colour camera). Depth has 5000 units to the metre and is
registered to the colour image; 0 stands for no measurement.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array, interpolate_poses
from vggt_ros.io.images import read_image
from vggt_ros.io.rgbd import RgbdFrame, read_depth_image

UNITS_PER_METRE = 5000.0
LARGEST_OFFSET = 0.02  # s between a colour and a depth picture of the same moment
LARGEST_GAP = 0.1  # s between poses
WIDTH = 640
# Of the colour cameras, fx fy cx cy in pixels of this width, as the benchmark publishes them; the
# pictures of freiburg3 are rectified already, the distortion of the others is left as it is.
CALIBRATIONS = {
    'freiburg1': (517.3, 516.5, 318.6, 255.3),
    'freiburg2': (520.9, 521.0, 325.1, 249.7),
    'freiburg3': (535.4, 539.2, 320.1, 247.6),
}
OTHER_CALIBRATION = (525.0, 525.0, 319.5, 239.5)  # the factory's, which the benchmark recommends


class TumRecording:
    """A sequence; files are read when a frame is asked for."""

    def __init__(self, folder: Path) -> None:
        """
        Read the lists and find the pictures that have depth and a pose.

        :raises ValueError: if a list is missing, is not such a list, or nothing fits together.
        """
        self.name = folder.resolve().name
        self._folder = folder
        colour_stamps, self._colour = _read_files(folder / 'rgb.txt')
        depth_stamps, depth = _read_files(folder / 'depth.txt')
        truth = _read_numbers(folder / 'groundtruth.txt', 8)
        truth = truth[np.argsort(truth[:, 0], kind='stable')]
        poses = interpolate_poses(
            truth[:, 0], truth[:, 1:], colour_stamps, LARGEST_GAP, LARGEST_GAP / 2
        )
        nearest = np.abs(depth_stamps - colour_stamps[:, None]).argmin(axis=1)
        together = np.abs(depth_stamps[nearest] - colour_stamps) <= LARGEST_OFFSET
        usable = together & np.isfinite(poses).all(axis=(1, 2))
        self._frames = [
            (colour_stamps[i], self._colour[i], depth[nearest[i]], poses[i])
            for i in np.flatnonzero(usable)
        ]
        if not self._frames:
            raise ValueError(
                f'{folder}: of {len(colour_stamps)} colour pictures {int(together.sum())} have a '
                f'depth picture within {LARGEST_OFFSET} s, and none of these has a pose'
            )
        known = [value for key, value in CALIBRATIONS.items() if key in self.name]
        self._calibration = known[0] if known else OTHER_CALIBRATION

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `Recording`."""
        stamp, colour, depth, pose = self._frames[index]
        image = read_image(self._folder / colour)
        scale = image.shape[1] / WIDTH
        fx, fy, cx, cy = self._calibration
        intrinsics = np.diag([scale, scale, 1]) @ np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        measured = read_depth_image(self._folder / depth, UNITS_PER_METRE, unknown=(0,))
        return RgbdFrame(float(stamp), image, measured, pose, intrinsics)


def _read_lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    rows = [line.split() for line in text.splitlines()]
    return [row for row in rows if row and not row[0].startswith('#')]


def _read_files(path: Path) -> tuple[Array, list[str]]:
    rows = _read_lines(path)
    if not rows:
        raise ValueError(f'{path} lists no pictures')
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{path} has the line {' '.join(row)!r}; expected 'stamp file'")
    return _as_numbers(path, [row[:1] for row in rows])[:, 0], [row[1] for row in rows]


def _read_numbers(path: Path, columns: int) -> Array:
    rows = _read_lines(path)
    wrong = [row for row in rows if len(row) != columns]
    if wrong or not rows:
        found = repr(' '.join(wrong[0])) if wrong else 'no lines'
        raise ValueError(f'{path} has {found}; expected lines of {columns} numbers')
    return _as_numbers(path, rows)


def _as_numbers(path: Path, rows: list[list[str]]) -> Array:
    try:
        numbers: npt.NDArray[np.float64] = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f'{path} has something else where a number belongs: {error}') from error
    return numbers
