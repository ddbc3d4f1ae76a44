# SPDX-License-Identifier: Apache-2.0
"""Compiled layers say what plain ones say, and are made before the first window."""

from __future__ import annotations

import copy
import importlib
import shutil
import threading

import pytest
import torch

from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.inference.warm_up import expect_load, make_noise_windows
from vggt_ros.lab.parity.weight_recipe import fill_weights
from vggt_ros.model import VGGT, VGGTConfig
from vggt_ros.model.prediction import HEADS
from vggt_ros.settings import Settings

# the smallest case that has every kind of layer, since each shape of each kind is compiled
SETTINGS = {
    'compile': True,
    'window_size': 3,
    'window_stride': 2,
    'registration_frames': 1,
    'resolution': 28,
}


@pytest.fixture(scope='module')
def model() -> VGGT:
    made = VGGT(VGGTConfig.tiny())
    fill_weights(made, 'compile')
    return made.eval().requires_grad_(False)


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler')
def test_a_compiled_network_is_ready_after_configure_and_exact(model: VGGT) -> None:
    settings = Settings.from_flat(SETTINGS)
    network = VGGTNetwork(copy.deepcopy(model), 'compiled', True, 'float32')
    plain = VGGTNetwork(model, 'plain', True, 'float32')
    assert network.prepare(settings) == settings
    differences = []

    def work() -> None:  # the node computes in another thread than it is configured in
        with torch.compiler.set_stance('fail_on_recompile'):
            found = []
            for batch in make_noise_windows(expect_load(settings, 56), 4):
                if batch.window_id == 2:  # the other one of two new frames comes with its window
                    network.encode_ahead({batch.ids[1]: batch.images[1]})
                found.append(network(batch, HEADS))
        for batch, one in zip(
            make_noise_windows(expect_load(settings, 56), 4), found, strict=True
        ):
            other = plain(batch, HEADS)
            for name in ('depth', 'depth_confidence'):
                differences.append(relative(getattr(one, name), getattr(other, name)))
            differences.append(relative(one.pose_encodings[-1], other.pose_encodings[-1]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(differences) == 12
    assert max(differences) <= 1e-5
    assert all(block._compiled_call_impl for block in network.model.aggregator.frame_blocks)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_without_a_compiler_configure_is_told_so_in_one_sentence(
    model: VGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    inductor = importlib.import_module('torch._inductor.config')
    monkeypatch.setattr(inductor.cpp, 'cxx', ('no-such-compiler',))
    monkeypatch.setattr(inductor, 'fx_graph_cache', False)
    torch.compiler.reset()
    network = VGGTNetwork(copy.deepcopy(model), 'compiled', True, 'float32')
    with pytest.raises(ValueError, match=r'compile is true, but torch cannot compile: .*ompiler'):
        network.prepare(Settings.from_flat(SETTINGS))


def test_the_shapes_compiled_for_follow_the_settings() -> None:
    load = expect_load(Settings.from_flat({'resolution': 518}), 112)
    assert (load.frames, load.stride, load.height, load.width) == (8, 4, 392, 518)
    assert load.dense == (0, 3, 4, 5, 6, 7)
    assert expect_load(Settings.from_flat({'fit': 'pad'}), 112).height == 112
