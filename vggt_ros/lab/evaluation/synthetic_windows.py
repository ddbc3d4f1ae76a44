# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a network on synthetic windows that training never saw, beside the baselines.

Network and baselines are measured on the same windows in the same run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.baselines import forward_motion, mean_motion, sift_relative_poses
from vggt_ros.lab.evaluation.window_metrics import (
    WindowErrors,
    error_by_confidence,
    median_depth_ratio,
)
from vggt_ros.lab.training.dataset import SyntheticDataset, TrainingBatch
from vggt_ros.lab.training.recipes import QUERIES
from vggt_ros.settings import PATCH_SIZE

_BATCH = 4  # windows
_TRACK_LIMITS = (1, 2, 4, 8, 16)  # pixels (TAP-Vid, arXiv 2211.03726)
_BASELINES = ('constant_depth', 'mean_motion', 'forward_motion', 'sift')


@dataclass
class _ConfidenceErrors:
    """Errors and their predicted confidences, accumulated over windows."""

    error: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)

    def add(self, error: Tensor, confidence: Tensor) -> None:
        self.error.append(error.flatten())
        self.confidence.append(confidence.flatten())

    def quartiles(self) -> list[float]:
        return error_by_confidence(torch.cat(self.error), torch.cat(self.confidence))


@dataclass
class _TrackErrors:
    """Accuracy of tracks, one number for each batch."""

    within_limits: list[float] = field(default_factory=list)  # mean share over `_TRACK_LIMITS`
    visibility: list[float] = field(default_factory=list)  # share of correct visibilities


def evaluate_test_windows(
    network: VGGTNetwork, seed: int, width: int, windows: int, frames: int
) -> dict[str, Any]:
    """
    Evaluate a network on windows of the test split.

    :param width: of the images, pixels; 0: the width that the network was trained on.
    :returns: see `evaluate_windows`.
    """
    height, width = image_size(width or network.image_width)
    dataset = SyntheticDataset('test', seed, height, width, QUERIES)
    return evaluate_windows(network, dataset, windows, frames)


def image_size(width: int) -> tuple[int, int]:
    """Return height and width of 4:3 images; the height is a multiple of the patch size."""
    return max(round(0.75 * width / PATCH_SIZE), 1) * PATCH_SIZE, width


def evaluate_windows(
    network: VGGTNetwork,
    dataset: SyntheticDataset,
    windows: int,
    frames: int,
    training_windows: int = 200,
) -> dict[str, Any]:
    """
    Compare network and baselines with the ground truth.

    :param dataset: of the test split; its images have the network's size.
    :param training_windows: of the training split, over which the mean motion is averaged.
    :returns: `model` and `baselines` by name, each with the metrics of `WindowErrors`; the model
        also has tracks, calibration and `windows_per_second`.
    """
    errors = WindowErrors()
    baselines = {name: WindowErrors() for name in _BASELINES}
    mean = mean_motion(replace(dataset, split='train', queries=0), training_windows, frames)
    depth_errors, point_errors = _ConfidenceErrors(), _ConfidenceErrors()
    track_errors = _TrackErrors()
    seconds, sift_seconds = 0.0, 0.0
    for first in range(0, windows, _BATCH):
        batch = dataset.batch(first, min(_BATCH, windows - first), frames)
        truth, size = batch.truth, batch.images.shape[-2:]
        true_field_of_view = truth.pose_encodings()[..., 8]
        start = time.perf_counter()
        prediction = network.predict(batch.images, ('camera', 'depth')).cpu()
        seconds += time.perf_counter() - start
        assert prediction.pose_encodings and prediction.depth is not None
        assert prediction.depth_confidence is not None
        encodings, depth = prediction.pose_encodings[-1], prediction.depth
        cameras, _ = decode_pose(encodings, *size)
        errors.add_cameras(cameras, truth.camera_from_world)
        errors.add_focal(encodings[..., 8], true_field_of_view)
        errors.add_depth(depth, truth.depth, truth.valid)
        scaled = depth * median_depth_ratio(depth, truth.depth, truth.valid)
        depth_errors.add((scaled / truth.depth - 1).abs(), prediction.depth_confidence)
        _compare_points_and_tracks(network, batch, point_errors, track_errors)
        constant = torch.ones_like(truth.depth)
        baselines['constant_depth'].add_depth(constant, truth.depth, truth.valid)
        for name, motion in (('mean_motion', mean), ('forward_motion', forward_motion(frames))):
            expanded = motion.expand(len(truth.depth), -1, -1, -1)
            baselines[name].add_cameras(expanded, truth.camera_from_world)
        for window in range(len(truth.depth)):
            start = time.perf_counter()
            poses = sift_relative_poses(batch.images[window], truth.intrinsics[window])
            sift_seconds += time.perf_counter() - start
            true = truth.camera_from_world[window : window + 1]
            baselines['sift'].add_relative_poses(poses, true)
    model: dict[str, Any] = errors.metrics()
    model |= {
        'track_delta_average': float(np.mean(track_errors.within_limits)),
        'visibility_accuracy': float(np.mean(track_errors.visibility)),
        'depth_error_by_confidence': depth_errors.quartiles(),
        'points_error_by_confidence': point_errors.quartiles(),
        'windows_per_second': windows / seconds,
    }
    metrics = {name: each.metrics() for name, each in baselines.items()}
    metrics['sift']['windows_per_second'] = windows / sift_seconds
    return {'model': model, 'baselines': metrics}


def _compare_points_and_tracks(
    network: VGGTNetwork,
    batch: TrainingBatch,
    point_errors: _ConfidenceErrors,
    track_errors: _TrackErrors,
) -> None:
    """Run the heads that are not timed and add their errors."""
    truth = batch.truth
    assert truth.tracks is not None and truth.visible is not None
    prediction = network.predict(batch.images, ('points', 'tracks'), truth.tracks[:, 0]).cpu()
    points, tracks, visibility = prediction.points, prediction.tracks, prediction.visibility
    assert points is not None and prediction.points_confidence is not None
    assert tracks is not None and visibility is not None
    ratio = median_depth_ratio(points.norm(dim=-1), truth.points.norm(dim=-1), truth.valid)
    distance = (points * ratio[..., None] - truth.points).norm(dim=-1)
    point_errors.add(distance, prediction.points_confidence)
    visible = truth.visible[:, 1:]
    error = (tracks[:, 1:] - truth.tracks[:, 1:]).norm(dim=-1)[visible]
    track_errors.within_limits.append(
        float(np.mean([float((error < px).float().mean()) for px in _TRACK_LIMITS]))
    )
    track_errors.visibility.append(float(((visibility[:, 1:] > 0.5) == visible).float().mean()))


def window_table(metrics: dict[str, Any]) -> str:
    """Format the metrics of `evaluate_windows` as a table."""
    columns = {'model': metrics['model'], **metrics['baselines']}
    names = [name for name, value in metrics['model'].items() if not isinstance(value, list)]
    lines = [' ' * 34 + ''.join(f'{name:>16}' for name in columns)]
    for name in names:
        cells = (column.get(name) for column in columns.values())
        lines.append(f'{name:34}' + ''.join(f'{_cell(value):>16}' for value in cells))
    for name, value in metrics['model'].items():
        if isinstance(value, list):
            quartiles = ', '.join(f'{part:.4f}' for part in value)
            lines.append(f'{name:34}{quartiles}  (quartiles, least confident first)')
    return '\n'.join(lines)


def _cell(value: float | None) -> str:
    return '' if value is None else f'{value:.4g}'
