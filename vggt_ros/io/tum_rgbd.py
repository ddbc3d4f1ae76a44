# SPDX-License-Identifier: Apache-2.0
"""
Sequences in the format of the TUM RGB-D benchmark (Sturm et al., IROS 2012).

A folder with `rgb.txt` and `depth.txt` (stamp and file of each image) and `groundtruth.txt`
(stamp, tx ty tz, qx qy qz qw of the colour camera). Depth is registered to colour and has 5000
units per metre; 0 means no measurement.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggt_ros.geometry.poses import Array, interpolate_poses
from vggt_ros.io.images import read_image
from vggt_ros.io.rgbd import (
    RgbdFrame,
    associate_depth,
    parse_numbers,
    read_depth_image,
    read_rows,
)

_UNITS_PER_METRE = 5000.0
_MAX_GAP = 0.1  # s between two poses that are interpolated
_WIDTH = 640
# Intrinsics of the colour cameras, fx fy cx cy in pixels of this width, as published. Images of
# freiburg3 are rectified; the distortion of the others is ignored.
_CALIBRATIONS = {
    'freiburg1': (517.3, 516.5, 318.6, 255.3),
    'freiburg2': (520.9, 521.0, 325.1, 249.7),
    'freiburg3': (535.4, 539.2, 320.1, 247.6),
}
_DEFAULT_CALIBRATION = (525.0, 525.0, 319.5, 239.5)  # of ROS, recommended by the benchmark


class TumRecording:
    """A sequence; files are read when a frame is requested."""

    def __init__(self, folder: Path) -> None:
        """
        Read the lists and find the images that have depth and a pose.

        :raises ValueError: if a list is missing or malformed, or no image has both.
        """
        self.name = folder.resolve().name
        self._folder = folder
        colour_stamps, colour = _read_files(folder / 'rgb.txt')
        depth_stamps, depth = _read_files(folder / 'depth.txt')
        truth = _read_poses(folder / 'groundtruth.txt')
        poses = interpolate_poses(truth[:, 0], truth[:, 1:], colour_stamps, _MAX_GAP, _MAX_GAP / 2)
        self._frames = [
            (float(colour_stamps[i]), colour[i], depth[j], poses[i])
            for i, j in associate_depth(str(folder), colour_stamps, depth_stamps, poses)
        ]
        known = [value for key, value in _CALIBRATIONS.items() if key in self.name]
        self._calibration = known[0] if known else _DEFAULT_CALIBRATION

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `RgbdRecording`."""
        stamp, colour, depth_file, pose = self._frames[index]
        image = read_image(self._folder / colour)
        scale = image.shape[1] / _WIDTH
        fx, fy, cx, cy = self._calibration
        intrinsics = np.diag([scale, scale, 1]) @ np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        depth = read_depth_image(self._folder / depth_file, _UNITS_PER_METRE, unknown=(0,))
        return RgbdFrame(stamp, image, depth, pose, intrinsics)


def _read_files(path: Path) -> tuple[Array, list[str]]:
    """Return stamps and files."""
    rows = read_rows(path, 2)
    return parse_numbers(path, [row[:1] for row in rows])[:, 0], [row[1] for row in rows]


def _read_poses(path: Path) -> Array:
    """Return stamps and poses (N, 8) in time order."""
    poses = parse_numbers(path, read_rows(path, 8))
    return poses[np.argsort(poses[:, 0], kind='stable')]
