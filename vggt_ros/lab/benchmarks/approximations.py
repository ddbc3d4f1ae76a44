# SPDX-License-Identifier: Apache-2.0
"""
Accuracy and speed of the settings that trade exactness for speed, on synthetic windows.

All variants run on the same windows, alternately, so that their times are comparable.
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
from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.window_metrics import WindowErrors
from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.model.attention import patch_positions
from vggt_ros.settings import PATCH_SIZE, ModelSettings

EXACT = 'exact'  # the variant that the others are compared with

Variant = Callable[[Tensor], tuple[Tensor, Tensor]]  # images to pose encodings, depth (B, S, H, W)


def full_resolution(network: VGGTNetwork) -> Variant:
    """Run the network on the images as they are."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        prediction = network.predict(images, ('camera', 'depth')).cpu()
        assert prediction.pose_encodings and prediction.depth is not None
        return prediction.pose_encodings[-1], prediction.depth

    return run


def half_resolution(network: VGGTNetwork) -> Variant:
    """Run the network on images of half the width and height; depth is upsampled."""
    predict = full_resolution(network)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        small = functional.interpolate(
            images.flatten(0, 1), scale_factor=0.5, mode='bicubic', antialias=True
        )
        encodings, depth = predict(small.clamp(0, 1).unflatten(0, images.shape[:2]))
        return encodings, functional.interpolate(depth, images.shape[-2:], mode='bilinear')

    return run


def use_bfloat16_rope(network: VGGTNetwork, height: int, width: int) -> None:
    """Compute RoPE angles in bfloat16 for images of this size, as the reference under autocast."""
    aggregator = network.model.aggregator
    device = torch.device(network.device)
    grid = network.model.patch_grid((height, width))
    positions = patch_positions(grid[0], grid[1], aggregator.num_special_tokens, device)
    half = aggregator.head_dim // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    angles = (positions.float()[..., None] * aggregator.rope_base**-exponents).bfloat16()
    cos, sin = aggregator.rope_table(grid, device)  # cached: written in place
    cos.copy_(angles.cos())
    sin.copy_(angles.sin())


def compare_approximations(
    checkpoint: str, device: str, seed: int, windows: int, frames: int, with_int8: bool = False
) -> dict[str, dict[str, Any]]:
    """
    Compare all settings that trade exactness for speed, and some other approximations.

    :param checkpoint: as the setting of that name, as `device`.
    :param seed: of the test windows.
    :returns: see `compare_variants`.
    :raises ValueError: if 8-bit weights are wanted and torchao is missing.
    """

    def load(**settings: Any) -> VGGTNetwork:
        return load_network(ModelSettings(checkpoint=checkpoint, device=device, **settings))

    exact, rounded = load(), load()
    width = exact.image_width
    # a multiple of the patch size at half the resolution, too
    height = max(round(0.75 * width / PATCH_SIZE / 2), 1) * 2 * PATCH_SIZE
    use_bfloat16_rope(rounded, height, width)
    variants = {EXACT: full_resolution(exact)}
    for count in (1, 2):
        variants[f'frame_only_blocks: {count}'] = full_resolution(load(frame_only_blocks=count))
    if with_int8:
        for mode in ('weights', 'dynamic'):
            variants[f'int8: {mode}'] = full_resolution(load(int8=mode))
    if width % (2 * PATCH_SIZE) == 0:
        variants['half the resolution'] = half_resolution(exact)
    variants['RoPE table in bfloat16'] = full_resolution(rounded)
    dataset = SyntheticDataset('test', seed, height, width)
    return compare_variants(variants, dataset, windows, frames)


def compare_variants(
    variants: Mapping[str, Variant], dataset: SyntheticDataset, windows: int, frames: int
) -> dict[str, dict[str, Any]]:
    """
    Run every variant on every window.

    :param variants: by name; one is `EXACT`.
    :returns: for each variant the metrics of `WindowErrors`, `speedup` (seconds of the exact
        variant over its own, medians) and `depth_change` (from the exact depth, relative, median).
    """
    errors = {name: WindowErrors() for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    changes: dict[str, list[float]] = {name: [] for name in variants}
    for window in range(windows):
        batch = dataset.batch(window, 1, frames)
        truth, size = batch.truth, (batch.images.shape[-2], batch.images.shape[-1])
        exact = variants[EXACT](batch.images)[1]
        for name, variant in variants.items():
            start = time.perf_counter()
            encodings, depth = variant(batch.images)
            seconds[name].append(time.perf_counter() - start)
            errors[name].add_cameras(decode_pose(encodings, *size)[0], truth.camera_from_world)
            errors[name].add_depth(depth, truth.depth, truth.valid)
            changes[name].append(float((depth / exact - 1).abs().median()))
    medians = {name: float(np.median(times[1:] or times)) for name, times in seconds.items()}
    return {
        name: {
            **errors[name].metrics(),
            'speedup': medians[EXACT] / medians[name],
            'depth_change': float(np.median(changes[name])),
        }
        for name in variants
    }


def approximation_table(variants: Mapping[str, Mapping[str, float]]) -> str:
    """Format the results of `compare_variants` as a Markdown table."""
    lines = [
        '| variant | rotation, deg | AUC@30 | AbsRel | change of depth | speed-up |',
        '|---|--:|--:|--:|--:|--:|',
    ]
    lines += [
        f'| {name} | {metrics["rotation_median_deg"]:.2f} | {metrics["auc30"]:.3f} | '
        f'{metrics["absrel"]:.3f} | {metrics["depth_change"]:.2g} | {metrics["speedup"]:.2f} |'
        for name, metrics in variants.items()
    ]
    return '\n'.join(lines)
