# SPDX-License-Identifier: Apache-2.0
"""
Sequences of 7-Scenes (Shotton et al., CVPR 2013).

A folder with `frame-000000.color.png`, `.depth.png` and `.pose.txt` (a 4 × 4 matrix,
camera-to-world) for each frame. Depth is in millimetres; 0 and 65535 mean no measurement.

Depth is not registered: the depth camera is some centimetres beside the colour camera. As is usual
without a calibration, both are assumed to coincide, with a focal length of 585 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.io.images import read_image
from vggt_ros.io.rgbd import RgbdFrame, read_depth_image

_UNITS_PER_METRE = 1000.0
_FRAME_RATE = 30.0  # Hz, of the camera; files have no stamps
_WIDTH = 640
_INTRINSICS = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])  # published with the data set


class SevenScenesRecording:
    """A sequence; files are read when a frame is requested."""

    def __init__(self, folder: Path) -> None:
        """
        Find the frames that have all three files and a valid pose.

        :raises ValueError: if there are none, or a pose is malformed.
        """
        self.name = f'{folder.resolve().parent.name}/{folder.resolve().name}'
        self._frames: list[tuple[Path, Path, Array]] = []
        for pose_file in sorted(folder.glob('frame-*.pose.txt')):
            stem = pose_file.name.removesuffix('.pose.txt')
            colour, depth = folder / f'{stem}.color.png', folder / f'{stem}.depth.png'
            pose = _read_pose(pose_file)
            if colour.exists() and depth.exists() and np.isfinite(pose).all():
                self._frames.append((colour, depth, pose))
        if not self._frames:
            raise ValueError(
                f'{folder} has no frame with frame-*.color.png, .depth.png and a valid .pose.txt'
            )

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `RgbdRecording`."""
        colour, depth_file, pose = self._frames[index]
        image = read_image(colour)
        scale = image.shape[1] / _WIDTH
        intrinsics = np.diag([scale, scale, 1]) @ _INTRINSICS
        depth = read_depth_image(depth_file, _UNITS_PER_METRE, unknown=(0, 65535))
        return RgbdFrame(index / _FRAME_RATE, image, depth, pose, intrinsics)


def _read_pose(path: Path) -> Array:
    try:
        numbers = [float(word) for word in path.read_text(encoding='utf-8').split()]
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} cannot be read as a matrix: {error}') from error
    if len(numbers) != 16:
        raise ValueError(f'{path} has {len(numbers)} numbers; expected a 4 × 4 matrix')
    return np.array(numbers).reshape(4, 4)
