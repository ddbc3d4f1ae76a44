# SPDX-License-Identifier: Apache-2.0
"""
Which camera matrix depth is unprojected with: the predicted, the averaged or the calibrated one.

The network predicts two fields of view for each frame. Those of a camera that does not zoom are
the same in all frames, so their average over windows has less noise than each of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from vggt_ros.frames.batch import Batch
from vggt_ros.geometry.poses import Array
from vggt_ros.settings import CameraSettings

_WINDOWS = 50  # that are averaged
_MAX_DISAGREEMENT = 0.15  # relative difference of focal lengths that is worth a warning

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FocalHistory:
    """The focal lengths that the network predicted for each camera in the last windows."""

    image_size: tuple[int, ...] = ()  # H, W of the network's images; others start anew
    # By camera: (N, 2), the logarithms of fx and fy, pixels, for the last N windows.
    log_focal_lengths: dict[str, Array] = field(default_factory=dict)
    disagrees: bool = False  # with the calibration, in the newest window


def choose_intrinsics(
    history: FocalHistory, predicted: Array, batch: Batch, settings: CameraSettings
) -> tuple[Array, FocalHistory]:
    """
    Choose the camera matrices of one window.

    :param predicted: (S, 3, 3), pixels of the network's images.
    :returns: (S, 3, 3), and the history with this window.
    """
    calibrated = [image.intrinsics() for image in batch.images]
    disagrees = _disagrees(predicted, calibrated, history.disagrees)
    history = FocalHistory(history.image_size, history.log_focal_lengths, disagrees)
    chosen = predicted.copy()
    if settings.average_intrinsics:
        history = _average(history, chosen, batch)
    if settings.use_known_intrinsics:
        for i, matrix in enumerate(calibrated):
            if matrix is not None:
                chosen[i] = matrix
    return chosen, history


def _average(history: FocalHistory, matrices: Array, batch: Batch) -> FocalHistory:
    """Replace focal lengths, in place, by the averages of each camera."""
    same_size = history.image_size == batch.image_size
    logs = dict(history.log_focal_lengths) if same_size else {}
    cameras = [f'{frame.camera} {frame.camera_frame}' for frame in batch.frames]
    for camera in set(cameras):
        own = np.flatnonzero([each == camera for each in cameras])
        focal = matrices[own][:, [0, 1], [0, 1]]
        newest = np.log(focal).mean(0)[None]
        logs[camera] = np.concatenate([logs[camera], newest]) if camera in logs else newest
        logs[camera] = logs[camera][-_WINDOWS:]
        matrices[own[:, None], [0, 1], [0, 1]] = np.exp(np.mean(logs[camera], axis=0))
    return FocalHistory(batch.image_size, logs, history.disagrees)


def _disagrees(predicted: Array, calibrated: list[Array | None], warned: bool) -> bool:
    """Compare focal lengths with the calibration, and warn once while they differ."""
    ratios = [
        matrix[0, 0] / known[0, 0]
        for matrix, known in zip(predicted, calibrated)
        if known is not None
    ]
    if not ratios:
        return False
    ratio = float(np.median(ratios))
    disagrees = bool(abs(np.log(ratio)) > _MAX_DISAGREEMENT)
    if disagrees and not warned:
        logger.warning(
            'the predicted focal length is %.2f times the calibrated one: does camera_info belong '
            'to these images? use_known_intrinsics selects the calibrated one',
            ratio,
        )
    return disagrees
