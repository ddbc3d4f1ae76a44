# SPDX-License-Identifier: Apache-2.0
"""
Which camera matrix depth is unprojected with: the network's, its average, or the calibrated one.

The network predicts two fields of view for each frame. Those of a camera that does not zoom are
the same in all frames, so their average over windows is steadier than each of them.
"""

from __future__ import annotations

import logging
from collections import deque

import numpy as np

from vggt_ros.frames.preprocessor import Batch
from vggt_ros.geometry.poses import Array
from vggt_ros.settings import CameraSettings

_WINDOWS = 50  # that an average reaches back
_DISAGREES = 0.15  # relative difference of focal lengths that is worth a warning

logger = logging.getLogger(__name__)


class IntrinsicsEstimator:
    """Chooses camera matrices, window by window."""

    def __init__(self, settings: CameraSettings) -> None:
        self._settings = settings
        self._size: tuple[int, ...] = ()  # of the images that the averages are of
        # For each camera: (2,), log fx, log fy, of each window.
        self._logs: dict[tuple[int, str], deque[Array]] = {}
        self._disagreeing = False
        self.disagreements = 0  # windows whose focal length is not that of the calibration

    def choose(self, predicted: Array, batch: Batch) -> Array:
        """
        Choose for one window.

        :param predicted: (S, 3, 3), pixels of the network's images.
        :returns: (S, 3, 3).
        """
        known = [image.intrinsics() for image in batch.fitted]
        self._compare(predicted, known)
        chosen = predicted.copy()
        if self._settings.average_intrinsics:
            self._average(chosen, batch)
        if self._settings.use_known_intrinsics:
            for i, matrix in enumerate(known):
                if matrix is not None:
                    chosen[i] = matrix
        return chosen

    def _average(self, matrices: Array, batch: Batch) -> None:
        """Put in the focal lengths of each camera's last windows."""
        if tuple(batch.images.shape[-2:]) != self._size:
            self._size = tuple(batch.images.shape[-2:])
            self._logs.clear()
        cameras = [(frame.camera, frame.camera_frame) for frame in batch.frames]
        for camera in set(cameras):
            own = np.flatnonzero([each == camera for each in cameras])
            focal = matrices[own][:, [0, 1], [0, 1]]
            logs = self._logs.setdefault(camera, deque(maxlen=_WINDOWS))
            logs.append(np.log(focal).mean(0))
            matrices[own[:, None], [0, 1], [0, 1]] = np.exp(np.mean(logs, axis=0))

    def _compare(self, predicted: Array, known: list[Array | None]) -> None:
        ratios = [
            matrix[0, 0] / calibrated[0, 0]
            for matrix, calibrated in zip(predicted, known)
            if calibrated is not None
        ]
        if not ratios:
            return
        ratio = float(np.median(ratios))
        disagreeing = bool(abs(np.log(ratio)) > _DISAGREES)
        self.disagreements += disagreeing
        if disagreeing and not self._disagreeing:
            logger.warning(
                'the predicted focal length is %.2f times the calibrated one: is camera_info '
                'that of these images? use_known_intrinsics takes the calibrated one',
                ratio,
            )
        self._disagreeing = disagreeing
