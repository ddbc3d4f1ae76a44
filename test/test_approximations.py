# SPDX-License-Identifier: Apache-2.0
"""Settings that trade exactness for speed: off by default, with the documented effect."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vggt_ros.cli.benchmark import Ablate
from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.inference.warm_up import Load, make_noise_windows
from vggt_ros.model.attention import eager_attention, use_attention
from vggt_ros.model.prediction import HEADS
from vggt_ros.settings import ModelSettings

BATCH = make_noise_windows(Load(frames=4, stride=1, height=56, width=84), 1)[0]


def load(**settings: object) -> VGGTNetwork:
    return load_network(ModelSettings(checkpoint='embedded', device='cpu', **settings))


def depth_of(network: VGGTNetwork) -> torch.Tensor:
    depth = network(BATCH, HEADS).depth
    assert depth is not None
    return depth


def relative_change(network: VGGTNetwork) -> float:
    plain = depth_of(load())
    return float((depth_of(network) / plain - 1).abs().median())


def test_nothing_is_approximated_by_default() -> None:
    assert (ModelSettings().int8, ModelSettings().frame_only_blocks) == ('off', 0)
    assert relative_change(load()) == 0


def test_without_global_attention_frames_are_independent() -> None:
    network = load(frame_only_blocks=4)
    depth = depth_of(network)
    other = depth_of_changed_last(network)
    assert torch.allclose(depth[:, :-1], other[:, :-1], rtol=1e-5)
    assert not torch.allclose(depth[:, -1], other[:, -1], rtol=1e-2)
    plain = load()
    assert not torch.allclose(depth_of(plain)[:, 0], depth_of_changed_last(plain)[:, 0], rtol=1e-4)


def depth_of_changed_last(network: VGGTNetwork) -> torch.Tensor:
    images = BATCH.stack(torch.device('cpu')).clone()
    images[-1] = 1 - images[-1]
    depth = network.predict(images[None], HEADS).depth
    assert depth is not None
    return depth


def test_frame_only_blocks_save_operations() -> None:
    counts = []
    for blocks in (0, 2):
        network = load(frame_only_blocks=blocks)
        network.model.requires_grad_(False)
        use_attention(network.model, eager_attention)  # torch does not count the fused one
        with FlopCounterMode(display=False) as counter:
            network(BATCH, HEADS)
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]


def test_more_frame_only_blocks_than_blocks_are_rejected() -> None:
    with pytest.raises(ValueError, match='frame_only_blocks is 5, expected at most 4'):
        load(frame_only_blocks=5)


@pytest.mark.parametrize('mode', ['weights', 'dynamic'])
def test_int8_weights_change_depth_little(mode: str) -> None:
    pytest.importorskip('torchao', reason="needs torchao: pip install 'vggt_ros[int8]'")
    network = load(int8=mode)
    linear = network.model.aggregator.frame_blocks[0].mlp.fc1
    assert not torch.equal(linear.weight.dequantize(), load_weight())
    assert 0 < relative_change(network) < 0.01


def load_weight() -> torch.Tensor:
    return load().model.aggregator.frame_blocks[0].mlp.fc1.weight


def test_int8_without_torchao_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    with pytest.raises(ValueError, match="int8 is 'weights', which needs torchao: pip install"):
        load(int8='weights')


def test_losses_are_measured_on_the_same_windows(capsys: pytest.CaptureFixture) -> None:
    assert Ablate.main(['--windows', '1', '--frames', '3']) == 0
    rows = capsys.readouterr().out.splitlines()
    exact = next(row for row in rows if row.startswith('| exact |')).split('|')
    assert float(exact[5]) == 0 and float(exact[6]) == 1
    frame_only = next(row for row in rows if row.startswith('| frame_only_blocks: 2 |')).split('|')
    assert float(frame_only[5]) > 0
