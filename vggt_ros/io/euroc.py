# SPDX-License-Identifier: Apache-2.0
"""
Sequences in the format of EuRoC MAV (Burri et al., IJRR 2016), TUM-VI among them.

A folder `mav0` with `cam0/data.csv` (stamp in ns, file of each image), `cam0/data/`,
`cam0/sensor.yaml` (extrinsics T_BS, intrinsics, distortion) and
`state_groundtruth_estimate0/data.csv` (stamp in ns, position and quaternion w x y z of the body,
more). There is no depth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vggt_ros.frames.frame import Calibration
from vggt_ros.geometry.poses import Array, interpolate_poses
from vggt_ros.io.images import read_image
from vggt_ros.io.rgbd import RgbdFrame, parse_numbers, read_rows

_TRUTH_FOLDERS = ('state_groundtruth_estimate0', 'mocap0')
_MAX_GAP = 0.1  # s between two poses that are interpolated
_MODELS = {'radial-tangential': 'plumb_bob', 'radtan': 'plumb_bob', 'equidistant': 'equidistant'}


class EurocRecording:
    """A sequence; images are read when a frame is requested."""

    def __init__(self, folder: Path) -> None:
        """
        Read the lists and find the images that have a pose.

        :param folder: of the sequence; it contains `mav0`.
        :raises ValueError: if a file is missing or malformed, or no image has a pose.
        """
        self.name = folder.resolve().name
        camera = folder / 'mav0' / 'cam0'
        self._images = camera / 'data'
        rows = read_rows(camera / 'data.csv', 2, ',', more=True)
        stamps = parse_numbers(camera / 'data.csv', [row[:1] for row in rows])[:, 0] * 1e-9
        self._calibration, body_from_camera = _read_sensor(camera / 'sensor.yaml')
        candidates = [folder / 'mav0' / each / 'data.csv' for each in _TRUTH_FOLDERS]
        truth_file = next((path for path in candidates if path.exists()), candidates[0])
        truth_rows = read_rows(truth_file, 8, ',', more=True)
        truth = parse_numbers(truth_file, [row[:8] for row in truth_rows])
        body_poses = truth[:, [1, 2, 3, 5, 6, 7, 4]]  # the file has w first
        world_from_body = interpolate_poses(truth[:, 0] * 1e-9, body_poses, stamps, _MAX_GAP, 0.0)
        poses = world_from_body @ body_from_camera
        usable = np.flatnonzero(np.isfinite(poses).all(axis=(1, 2)))
        self._frames = [(float(stamps[i]), rows[i][1].strip(), poses[i]) for i in usable]
        if not self._frames:
            raise ValueError(f'{folder}: none of {len(stamps)} images has a pose')

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `RgbdRecording`."""
        stamp, file, pose = self._frames[index]
        image = read_image(self._images / file)
        no_depth = np.full((1, 1), np.nan, np.float32)
        calibration = self._calibration
        return RgbdFrame(stamp, image, no_depth, pose, calibration.K, calibration)


def _read_sensor(path: Path) -> tuple[Calibration, Array]:
    """Return the calibration and body_from_camera (4, 4)."""
    try:
        sensor: dict[str, Any] = yaml.safe_load(path.read_text(encoding='utf-8'))
        fx, fy, cx, cy = sensor['intrinsics']
        width, height = sensor['resolution']
        model = sensor['distortion_model']
        return (
            Calibration(
                width=int(width),
                height=int(height),
                distortion_model=_MODELS.get(model, model),
                K=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64),
                D=np.array(sensor['distortion_coefficients'], dtype=np.float64),
            ),
            np.array(sensor['T_BS']['data'], dtype=np.float64).reshape(4, 4),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} does not describe a camera: {error}') from error
