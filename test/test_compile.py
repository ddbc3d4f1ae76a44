# SPDX-License-Identifier: Apache-2.0
"""Compiled layers give the results of eager ones, and are compiled before the first window."""

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

# The smallest case with every kind of layer, since each kind is compiled for each shape.
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
def test_a_compiled_network_is_compiled_by_prepare_and_exact(model: VGGT) -> None:
    settings = Settings.from_flat(SETTINGS)
    network = VGGTNetwork(copy.deepcopy(model), 'compiled', True, 'float32')
    plain = VGGTNetwork(model, 'plain', True, 'float32')
    assert network.prepare(settings) == settings
    differences = []
    compiled_calls = []

    def work() -> None:  # the node computes in another thread than it is configured in
        with torch.compiler.set_stance('fail_on_recompile'):
            found = []
            for batch in make_noise_windows(expect_load(settings, 56), 4):
                if batch.window_id == 2:  # only one of its two new frames is encoded ahead
                    network.encode_ahead({batch.ids[1]: batch.images[1]})
                with torch.profiler.profile() as profile:
                    found.append(network(batch, HEADS))
                names = [event.name for event in profile.events()]
                compiled_calls.append(sum('Torch-Compiled Region' in name for name in names))
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
    config = network.model.config
    trunk = config.camera.num_iterations * config.camera.trunk_depth
    layers = config.vit.depth + 2 * config.agg.depth + trunk + 1  # the last is the depth decoder
    assert len(compiled_calls) == 4 and min(compiled_calls) >= layers


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_without_a_compiler_prepare_fails_with_one_sentence(
    model: VGGT, monkeypatch: pytest.MonkeyPatch
) -> None:
    inductor = importlib.import_module('torch._inductor.config')
    monkeypatch.setattr(inductor.cpp, 'cxx', ('no-such-compiler',))
    monkeypatch.setattr(inductor, 'fx_graph_cache', False)
    torch.compiler.reset()
    network = VGGTNetwork(copy.deepcopy(model), 'compiled', True, 'float32')
    with pytest.raises(ValueError, match=r'compile is true, but torch cannot compile: .*ompiler'):
        network.prepare(Settings.from_flat(SETTINGS))


def test_the_compiled_shapes_follow_the_settings() -> None:
    load = expect_load(Settings.from_flat({'resolution': 518}), 112)
    assert (load.frames, load.stride, load.height, load.width) == (8, 4, 392, 518)
    assert load.depth_frames == (0, 3, 4, 5, 6, 7)
    assert expect_load(Settings.from_flat({'fit': 'pad'}), 112).height == 112
