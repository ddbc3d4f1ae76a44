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

from vggt_ros.geometry.poses import Array
from vggt_ros.preprocess import Batch
from vggt_ros.settings import CameraSettings

_WINDOWS = 50  # that an average reaches back
_DISAGREES = 0.15  # relative difference of focal lengths that is worth a warning

logger = logging.getLogger(__name__)


class IntrinsicsKeeper:
    """Chooses camera matrices, window by window."""

    def __init__(self, settings: CameraSettings) -> None:
        self._settings = settings
        self._averaged: tuple[object, ...] = ()  # camera and image size that the average is of
        self._logs: deque[Array] = deque(maxlen=_WINDOWS)  # (2,), log fx, log fy, of a window
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
            camera = (batch.frames[-1].camera_frame, *batch.images.shape[-2:])
            if camera != self._averaged:
                self._averaged = camera
                self._logs.clear()
            focal = predicted[:, [0, 1], [0, 1]]
            self._logs.append(np.log(focal).mean(0))
            chosen[:, [0, 1], [0, 1]] = np.exp(np.mean(self._logs, axis=0))
        if self._settings.use_known_intrinsics:
            for i, matrix in enumerate(known):
                if matrix is not None:
                    chosen[i] = matrix
        return chosen

    def _compare(self, predicted: Array, known: list[Array | None]) -> None:
        ratios = [
            matrix[0, 0] / calibrated[0, 0]
            for matrix, calibrated in zip(predicted, known)
            if calibrated is not None
        ]
        if not ratios:
            return
        ratio = float(np.median(ratios))
        disagreeing = abs(np.log(ratio)) > _DISAGREES
        self.disagreements += disagreeing
        if disagreeing and not self._disagreeing:
            logger.warning(
                'the predicted focal length is %.2f times the calibrated one: is camera_info '
                'that of these images? use_known_intrinsics takes the calibrated one',
                ratio,
            )
        self._disagreeing = disagreeing
