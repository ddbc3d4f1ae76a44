# SPDX-License-Identifier: Apache-2.0
"""
A network against synthetic windows that training never saw, and against the baselines.

Every figure of the network has its counterpart of a baseline on the same windows in the same run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.baselines import mean_motion, sift_motion, straight_ahead
from vggt_ros.lab.evaluation.window_metrics import (
    QUARTILES,
    WindowErrors,
    depth_ratio,
    error_by_confidence,
)
from vggt_ros.lab.training.samples import Sample, SyntheticSource

_BATCH = 4  # windows at once
_TRACK_LIMITS = (1, 2, 4, 8, 16)  # pixels (TAP-Vid, arXiv 2211.03726)


@dataclass
class _Confidence:
    """Errors and what the network thought of them, over all windows."""

    error: list[Tensor]
    confidence: list[Tensor]

    def add(self, error: Tensor, confidence: Tensor) -> None:
        self.error.append(error.flatten())
        self.confidence.append(confidence.flatten())

    def quartiles(self) -> list[float]:
        return error_by_confidence(torch.cat(self.error), torch.cat(self.confidence))


def evaluate_windows(
    network: VGGTNetwork,
    source: SyntheticSource,
    windows: int,
    frames: int,
    learnt_from: int = 200,
) -> dict[str, Any]:
    """
    Compare network and baselines with the truth.

    :param source: of the test split; its size is the one that the network sees.
    :param learnt_from: windows of the training split that the mean motion is learnt from.
    :returns: `model` and `baselines` by name, each with the figures of `WindowErrors`; the model
        also has tracks, calibration and `windows_per_second`.
    """
    ours, baselines = (
        WindowErrors(),
        {
            name: WindowErrors()
            for name in ('constant_depth', 'mean_motion', 'straight_ahead', 'sift')
        },
    )
    learnt = mean_motion(replace(source, split='train', queries=0), learnt_from, frames)
    depth_trust, point_trust = _Confidence([], []), _Confidence([], [])
    track_shares: list[float] = []
    visibility: list[float] = []
    spent, sift_spent = 0.0, 0.0
    for first in range(0, windows, _BATCH):
        sample = source.windows(first, min(_BATCH, windows - first), frames)
        truth, size = sample.truth, sample.images.shape[-2:]
        true_view = truth.pose_encodings()[..., 8]
        began = time.perf_counter()
        said = network.predict(sample.images, ('camera', 'depth')).cpu()
        spent += time.perf_counter() - began
        assert said.pose_encodings and said.depth is not None  # they were asked for
        assert said.depth_confidence is not None
        encodings = said.pose_encodings[-1]
        cameras, _ = decode_pose(encodings, *size)
        ours.add_cameras(cameras, truth.camera_from_world)
        ours.add_focal(encodings[..., 8], true_view)
        ours.add_depth(said.depth, truth.depth, truth.valid)
        scaled = said.depth * depth_ratio(said.depth, truth.depth, truth.valid)
        depth_trust.add((scaled / truth.depth - 1).abs(), said.depth_confidence)
        _judge_rest(network, sample, point_trust, track_shares, visibility)
        constant = torch.ones_like(truth.depth)
        baselines['constant_depth'].add_depth(constant, truth.depth, truth.valid)
        for name, guess in (('mean_motion', learnt), ('straight_ahead', straight_ahead(frames))):
            expanded = guess.expand(len(truth.depth), -1, -1, -1)
            baselines[name].add_cameras(expanded, truth.camera_from_world)
        for window in range(len(truth.depth)):
            began = time.perf_counter()
            motion = sift_motion(sample.images[window], truth.intrinsics[window])
            sift_spent += time.perf_counter() - began
            true = truth.camera_from_world[window : window + 1]
            baselines['sift'].add_motions(motion, true)
    model: dict[str, Any] = ours.figures()
    model |= {
        'track_delta_average': float(np.mean(track_shares)),
        'visibility_accuracy': float(np.mean(visibility)),
        'depth_error_by_confidence': depth_trust.quartiles(),
        'points_error_by_confidence': point_trust.quartiles(),
        'windows_per_second': windows / spent,
    }
    found = {name: errors.figures() for name, errors in baselines.items()}
    found['sift']['windows_per_second'] = windows / sift_spent
    return {'model': model, 'baselines': found}


def _judge_rest(
    network: VGGTNetwork,
    sample: Sample,
    trust: _Confidence,
    track_shares: list[float],
    visibility: list[float],
) -> None:
    """Compare points and tracks, which the figures of speed leave out."""
    truth = sample.truth
    assert truth.tracks is not None and truth.visible is not None
    said = network.predict(sample.images, ('points', 'tracks'), truth.tracks[:, 0]).cpu()
    assert said.points is not None and said.points_confidence is not None
    assert said.tracks is not None and said.visibility is not None
    ratio = depth_ratio(said.points.norm(dim=-1), truth.points.norm(dim=-1), truth.valid)
    gap = (said.points * ratio[..., None] - truth.points).norm(dim=-1)
    trust.add(gap, said.points_confidence)
    later = truth.visible[:, 1:]
    error = (said.tracks[:, 1:] - truth.tracks[:, 1:]).norm(dim=-1)[later]
    track_shares.append(
        float(np.mean([float((error < px).float().mean()) for px in _TRACK_LIMITS]))
    )
    visibility.append(float(((said.visibility[:, 1:] > 0.5) == later).float().mean()))


def window_table(figures: dict[str, Any]) -> str:
    """Lay the figures out for a person."""
    columns = {'model': figures['model'], **figures['baselines']}
    names = [name for name, value in figures['model'].items() if not isinstance(value, list)]
    lines = [' ' * 34 + ''.join(f'{name:>16}' for name in columns)]
    for name in names:
        cells = (column.get(name) for column in columns.values())
        lines.append(f'{name:34}' + ''.join(f'{_cell(value):>16}' for value in cells))
    for name, value in figures['model'].items():
        if isinstance(value, list):
            quartiles = ', '.join(f'{part:.4f}' for part in value)
            lines.append(f'{name:34}{quartiles}  ({QUARTILES} parts, least confident first)')
    return '\n'.join(lines)


def _cell(value: float | None) -> str:
    return '' if value is None else f'{value:.4g}'
