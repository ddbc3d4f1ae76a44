# SPDX-License-Identifier: Apache-2.0
"""
What the settings that trade exactness for speed cost, and gain, on windows with known truth.

All ways see the same windows in the same run and take turns, so their times can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vggt_ros.geometry.camera import decode_pose
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.window_metrics import WindowErrors
from vggt_ros.lab.training.samples import SyntheticSource
from vggt_ros.model.attention import patch_positions

PLAIN = 'plain'

Way = Callable[[Tensor], tuple[Tensor, Tensor]]  # images to pose encodings, depth of their size


def as_it_is(network: VGGTNetwork) -> Way:
    """Run on the images as they are."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        said = network.predict(images, ('camera', 'depth')).cpu()
        assert said.pose_encodings and said.depth is not None  # they were asked for
        return said.pose_encodings[-1], said.depth

    return run


def at_half_size(network: VGGTNetwork) -> Way:
    """Run on images of half the width and height; depth is brought back to the size."""
    whole = as_it_is(network)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        small = functional.interpolate(
            images.flatten(0, 1), scale_factor=0.5, mode='bicubic', antialias=True
        )
        encodings, depth = whole(small.clamp(0, 1).unflatten(0, images.shape[:2]))
        return encodings, functional.interpolate(depth, images.shape[-2:], mode='bilinear')

    return run


def round_rope_table(network: VGGTNetwork, height: int, width: int) -> None:
    """Turn by angles in bfloat16 in images of this size, as the reference does under autocast."""
    aggregator = network.model.aggregator
    device = torch.device(network.device)
    grid = network.model.patch_grid((height, width))
    positions = patch_positions(grid[0], grid[1], aggregator.num_special_tokens, device)
    half = aggregator.head_dim // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    angles = (positions.float()[..., None] * aggregator.rope_base**-exponents).bfloat16()
    key = (grid[0], grid[1], device)
    aggregator.tables[key] = angles.cos().float(), angles.sin().float()


def compare(
    ways: Mapping[str, Way], source: SyntheticSource, windows: int, frames: int
) -> dict[str, dict[str, Any]]:
    """
    Run every way on every window.

    :param ways: by name; one is `PLAIN`, by which the others are judged.
    :returns: for each way the figures of `WindowErrors`, `time_ratio` (seconds of the plain way
        over its own, medians) and `change` (of depth, from the plain way's, relative, median).
    """
    errors = {name: WindowErrors() for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    changes: dict[str, list[float]] = {name: [] for name in ways}
    for window in range(windows):
        sample = source.windows(window, 1, frames)
        truth, size = sample.truth, (sample.images.shape[-2], sample.images.shape[-1])
        plain = ways[PLAIN](sample.images)[1]
        for name, way in ways.items():
            began = time.perf_counter()
            encodings, depth = way(sample.images)
            seconds[name].append(time.perf_counter() - began)
            errors[name].add_cameras(decode_pose(encodings, *size)[0], truth.camera_from_world)
            errors[name].add_depth(depth, truth.depth, truth.valid)
            changes[name].append(float((depth / plain - 1).abs().median()))
    medians = {name: float(np.median(times[1:] or times)) for name, times in seconds.items()}
    return {
        name: {
            **errors[name].figures(),
            'time_ratio': medians[PLAIN] / medians[name],
            'change': float(np.median(changes[name])),
        }
        for name in ways
    }


def approximation_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Lay results out for a person, as Markdown."""
    lines = [
        '| way | rotation, deg | AUC@30 | AbsRel | depth changes by | times as fast |',
        '|---|--:|--:|--:|--:|--:|',
    ]
    lines += [
        f'| {name} | {each["rotation_median_deg"]:.2f} | {each["auc30"]:.3f} | '
        f'{each["absrel"]:.3f} | {each["change"]:.2g} | {each["time_ratio"]:.2f} |'
        for name, each in found.items()
    ]
    return '\n'.join(lines)
