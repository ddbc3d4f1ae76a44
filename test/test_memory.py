# SPDX-License-Identifier: Apache-2.0
"""Peak memory is predicted as measured, and windows are fitted to a budget."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.inference.memory import (
    GIGABYTE,
    LiveMemory,
    fit_to_memory,
    predict_peak,
    weight_bytes,
)
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.inference.warm_up import Load, make_noise_windows
from vggt_ros.model import VGGT, VGGTConfig
from vggt_ros.model import block as block_module
from vggt_ros.model.attention import SelectedTokens
from vggt_ros.model.config import AggregatorConfig, ViTConfig
from vggt_ros.model.prediction import HEADS
from vggt_ros.settings import Settings

SMALL = VGGTConfig.small()
MIDDLE = replace(
    SMALL,
    embed_dim=192,
    vit=ViTConfig(depth=2, num_heads=3),
    agg=AggregatorConfig(depth=4, num_heads=3),
)


def make(config: VGGTConfig, model_class: type[VGGT] = VGGT) -> VGGT:
    torch.manual_seed(0)
    return model_class(config).eval().requires_grad_(False)


def measured_peak(model: VGGT, load: Load) -> int:
    """Measure three windows of a stream, in bytes, including the weights."""
    network, windows = VGGTNetwork(model, 'test', True, 'float32'), make_noise_windows(load, 3)
    with LiveMemory() as memory:
        for batch in windows:
            network(batch, HEADS)
    return memory.peak + weight_bytes(model)


def test_tensors_are_counted_until_they_are_freed() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        assert memory.live == 8000
        view = b.view(10, 100)
        del b
        assert memory.live == 8000
        del view
        a += 1
        assert memory.live == 4000
    assert memory.peak == 8000


@pytest.mark.parametrize(
    ('config', 'load', 'at_once'),
    [
        (SMALL, Load(8, 4, 56, 84), 8),
        (SMALL, Load(32, 8, 56, 84), 1),
        (MIDDLE, Load(6, 1, 112, 154), 2),
        (MIDDLE, Load(16, 4, 56, 84), 8),
    ],
)
def test_the_predicted_peak_agrees_with_the_measured_one(
    config: VGGTConfig, load: Load, at_once: int
) -> None:
    model = make(config)
    model.depth_head.frames_chunk_size = at_once
    predicted, measured = predict_peak(model, load, at_once), measured_peak(model, load)
    weights = weight_bytes(model)
    assert abs(predicted - weights - (measured - weights)) <= 0.25 * (measured - weights)


def test_fewer_frames_at_once_need_less_memory_and_give_the_same_depth() -> None:
    model, load = make(SMALL), Load(32, 8, 56, 84)
    peaks, depths = [], []
    for at_once in (32, 8, 1):
        model.depth_head.frames_chunk_size = at_once
        gc.collect()
        peaks.append(measured_peak(model, load) - weight_bytes(model))
        batch = make_noise_windows(load, 1)[0]
        depths.append(VGGTNetwork(model, 'test', True, 'float32')(batch, HEADS).depth)
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.7 * peaks[1]
    for depth in depths[1:]:
        torch.testing.assert_close(depth, depths[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(1, 5 * 29), (5, 29)])
def test_long_inputs_in_chunks_give_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """One sequence of five frames, and five sequences; all tokens, and those of one frame."""
    model = make(SMALL)
    tokens = torch.randn(*shape, SMALL.embed_dim)
    table = model.aggregator.rope_table((4, 6), tokens.device)
    block = model.aggregator.global_blocks[0]
    block.ls1.gamma.fill_(1)
    block.ls2.gamma.fill_(1)
    with torch.inference_mode():
        expected = block(tokens, table)
        monkeypatch.setattr(block_module, 'CHUNK_THRESHOLD', 60)
        monkeypatch.setattr(block_module, 'CHUNK_TOKENS', 60)
        sizes: list[int] = []
        block.mlp.register_forward_hook(lambda _m, given, _o: sizes.append(given[0].shape[1]))
        found = block(tokens, table)
        assert sizes == ([58, 58, 29] if shape[0] == 1 else [29, 29, 29])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        selected = SelectedTokens((0,), 29)
        found = block(tokens, table, selected)
    torch.testing.assert_close(found, selected.select(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_windows_are_reduced_to_fit_a_budget() -> None:
    model = make(SMALL)
    settings = Settings.from_flat({'window_size': 16, 'window_stride': 8})
    needed = predict_peak(model, Load(16, 8, 84, 112), 8) / GIGABYTE / 0.9
    results = []
    for share in (1.01, 0.9, 0.5):
        budget = replace(settings.model, max_device_memory=share * needed)
        fitted, at_once = fit_to_memory(replace(settings, model=budget), model, 112)
        window, width = fitted.window, fitted.model.resolution or 112
        height = 84 if width == 112 else max(round(0.75 * width / 14), 1) * 14
        load = Load(window.window_size, window.window_stride, height, width)
        assert predict_peak(model, load, at_once) / GIGABYTE / 0.9 <= share * needed
        results.append((window.window_size, width, at_once))
    assert results[0] == (16, 112, 8)
    assert results[1][:2] == (16, 112) and results[1][2] < 8  # which does not change the result
    assert results == sorted(results, reverse=True)


def test_a_budget_for_less_than_two_frames_is_a_clear_error() -> None:
    network = VGGTNetwork(make(SMALL), 'test', True, 'float32')
    settings = Settings.from_flat({'max_device_memory': 0.012})
    expected = r'max_device_memory is 0.012 GB, but the smallest windows, of 2 frames of .* need 0'
    with pytest.raises(ValueError, match=expected):
        StreamingEngine(settings, network)


def test_out_of_memory_first_decodes_depth_in_smaller_chunks_then_halves_windows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits: list[int] = []

    class LimitedMemory(VGGT):
        """Runs on a device with memory for two frames, one at a time."""

        def aggregate(self, tokens: torch.Tensor, *arguments: Any) -> Any:
            limits.append(self.depth_head.frames_chunk_size * tokens.shape[1])
            if limits[-1] > 2:
                raise torch.cuda.OutOfMemoryError('the device is out of memory')
            return super().aggregate(tokens, *arguments)

    network = VGGTNetwork(make(VGGTConfig.tiny(), LimitedMemory), 'test', True, 'float32')
    settings = Settings.from_flat({'window_size': 4, 'window_stride': 1, 'min_parallax': 0.0})
    engine = StreamingEngine(settings, network)
    images = [frame.image for frame in make_noise_windows(Load(4, 1, 42, 56), 1)[0].frames]
    updates = [engine.add(Frame(image, i * 10**8, 'camera')) for i, image in enumerate(images)]
    assert limits == [32, 16, 8, 4, 2]
    assert updates[-1] is not None and len(updates[-1].batch.ids) == engine.window_size == 2
    assert engine.counts['out_of_memory'] == 4
    assert 'from now on depth is decoded 4 frames at a time' in caplog.text
