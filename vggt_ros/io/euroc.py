# SPDX-License-Identifier: Apache-2.0
"""
Sequences of EuRoC MAV (Burri et al., IJRR 2016) and of everyone who writes so, TUM-VI for one.

A folder `mav0` with `cam0/data.csv` (stamp in ns, file of each picture), `cam0/data/`,
`cam0/sensor.yaml` (where the camera is on the body, intrinsics, distortion) and
`state_groundtruth_estimate0/data.csv` (stamp in ns, position and quaternion w x y z of the body,
more). There is no depth.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vggt_ros.frames.frame import Calibration
from vggt_ros.geometry.poses import Array, interpolate_poses
from vggt_ros.io.images import read_image
from vggt_ros.io.rgbd import RgbdFrame

TRUTH_FOLDERS = ('state_groundtruth_estimate0', 'mocap0')
LARGEST_GAP = 0.1  # s between poses
MODELS = {'radial-tangential': 'plumb_bob', 'radtan': 'plumb_bob', 'equidistant': 'equidistant'}


class EurocRecording:
    """A sequence; pictures are read when a frame is asked for."""

    def __init__(self, folder: Path) -> None:
        """
        Read the lists and find the pictures that have a pose.

        :param folder: the sequence's, which contains `mav0`.
        :raises ValueError: if a file is missing, is not what it should be, or nothing fits
            together.
        """
        self.name = folder.resolve().name
        camera = folder / 'mav0' / 'cam0'
        self._pictures = camera / 'data'
        rows = _read_rows(camera / 'data.csv', 2)
        stamps = _numbers(camera / 'data.csv', [row[:1] for row in rows])[:, 0] * 1e-9
        self._calibration, body_from_camera = _read_sensor(camera / 'sensor.yaml')
        there = [folder / 'mav0' / each / 'data.csv' for each in TRUTH_FOLDERS]
        truth_file = next((path for path in there if path.exists()), there[0])
        truth = _numbers(truth_file, [row[:8] for row in _read_rows(truth_file, 8)])
        seven = truth[:, [1, 2, 3, 5, 6, 7, 4]]  # the file has w first
        world_from_body = interpolate_poses(
            truth[:, 0] * 1e-9, seven, stamps, LARGEST_GAP, beyond=0.0
        )
        poses = world_from_body @ body_from_camera
        usable = np.flatnonzero(np.isfinite(poses).all(axis=(1, 2)))
        self._frames = [(stamps[i], rows[i][1].strip(), poses[i]) for i in usable]
        if not self._frames:
            raise ValueError(f'{folder}: none of {len(stamps)} pictures has a pose')

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `Recording`."""
        stamp, file, pose = self._frames[index]
        image = read_image(self._pictures / file)
        unknown = np.full((1, 1), np.nan, np.float32)
        return RgbdFrame(
            float(stamp), image, unknown, pose, self._calibration.K, self._calibration
        )


def _read_rows(path: Path, columns: int) -> list[list[str]]:
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = [row for row in csv.reader(file) if row and not row[0].startswith('#')]
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from error
    wrong = next((row for row in rows if len(row) < columns), None)
    if wrong is not None or not rows:
        found = 'no lines' if wrong is None else repr(','.join(wrong))
        raise ValueError(f'{path} has {found}; expected lines of {columns} or more values')
    return rows


def _numbers(path: Path, rows: list[list[str]]) -> Array:
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f'{path} has something else where a number belongs: {error}') from error


def _read_sensor(path: Path) -> tuple[Calibration, Array]:
    """Return the calibration, and where the camera is on the body (4, 4)."""
    try:
        told: dict[str, Any] = yaml.safe_load(path.read_text(encoding='utf-8'))
        fx, fy, cx, cy = told['intrinsics']
        width, height = told['resolution']
        model = told['distortion_model']
        return (
            Calibration(
                width=int(width),
                height=int(height),
                distortion_model=MODELS.get(model, model),
                K=np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64),
                D=np.array(told['distortion_coefficients'], dtype=np.float64),
            ),
            np.array(told['T_BS']['data'], dtype=np.float64).reshape(4, 4),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} does not describe a camera: {error}') from error
