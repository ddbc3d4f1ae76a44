# SPDX-License-Identifier: Apache-2.0
"""Cached and skipped computations give the same results as computing whole windows."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_ros.cli.benchmark import Bench
from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch, PreprocessedImage
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.inference import network as inference
from vggt_ros.inference.load import load_network
from vggt_ros.inference.memory import weight_bytes
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.benchmarks.speed import count_flops, naive_forward
from vggt_ros.lab.parity.weight_recipe import fill_weights
from vggt_ros.model import VGGT, VGGTConfig, linear_weights
from vggt_ros.model.attention import SelfAttention
from vggt_ros.model.kernels import attention_backends, selected_backend
from vggt_ros.model.linear_weights import PACKING_PROCESSORS, PackedLinear, pack_linear_layers
from vggt_ros.settings import ModelSettings, Settings

EXACT = 1e-5
HEADS = ('camera', 'depth')
NEEDS_X86 = pytest.mark.skipif(
    platform.machine() not in PACKING_PROCESSORS,
    reason='layers are packed on x86 only',
)


@pytest.fixture(scope='module')
def model() -> VGGT:
    made = VGGT(VGGTConfig.small())
    fill_weights(made, 'savings')
    return made.eval()


class Stream:
    """Frames of noise, by number; the same number is another image in another stream."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fitted: dict[tuple[int, int], PreprocessedImage] = {}

    def images(self, ids: list[int], width: int = 84) -> dict[int, PreprocessedImage]:
        for number in ids:
            if (number, width) not in self._fitted:
                random = np.random.default_rng([self._seed, number])
                image = random.integers(0, 256, (56, 84, 3), np.uint8)
                self._fitted[number, width] = fit_image(image, width, 'crop')
        return {number: self._fitted[number, width] for number in ids}

    def window(self, ids: list[int], width: int = 84, dense: list[int] | None = None) -> Batch:
        fitted = tuple(self.images(ids, width).values())
        return Batch(
            images=fitted,
            frames=tuple(Frame(image.pixels, 0, 'camera') for image in fitted),
            ids=tuple(ids),
            window_id=0,
            depth_frames=None if dense is None else tuple(dense),
        )


def assert_same(network: VGGTNetwork, model: VGGT, batch: Batch) -> None:
    found = network(batch, HEADS)
    expected = naive_forward(model, batch.stack()[None])
    dense = list(batch.depth_indices)
    for one, other in (
        (found.pose_encodings[-1], expected.pose_encodings[-1]),
        (found.depth, expected.depth[:, dense]),
        (found.depth_confidence, expected.depth_confidence[:, dense]),
    ):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= EXACT * other.abs().max()


@pytest.mark.parametrize(
    'backend', [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=lambda backend: backend.name
)
def test_the_network_reports_the_attention_backend_that_runs(
    model: VGGT, monkeypatch: pytest.MonkeyPatch, backend: SDPBackend
) -> None:
    """Selected as on CUDA; a CPU has these two backends."""
    monkeypatch.setattr(inference, 'attention_backends', lambda _device: (backend,))
    network = VGGTNetwork(model, 'test', True, 'float32')
    with torch.profiler.profile() as profile:
        assert_same(network, model, Stream(3).window([0, 1, 2]))
    flash = 'aten::_scaled_dot_product_flash_attention_for_cpu'
    names = [event.name for event in profile.events()]
    blocks = sum(isinstance(module, SelfAttention) for module in model.modules())
    trunk = model.config.camera.trunk_depth * (model.config.camera.num_iterations - 1)
    # assert_same also runs naive_forward, which leaves the choice to torch
    assert names.count(flash) == (blocks + trunk) * (2 if network.attention == 'flash' else 1)
    assert network.attention == backend.name.lower().removesuffix('_attention')


def test_on_a_cpu_torch_chooses_the_attention_backend(model: VGGT) -> None:
    assert attention_backends(torch.device('cpu')) == ()
    network = VGGTNetwork(model, 'test', True, 'float32')
    assert network.attention == selected_backend(32, torch.float32, torch.device('cpu'))


def encodings(model: VGGT) -> list[int]:
    """Record the number of frames of each call of the encoder."""
    counted: list[int] = []
    model.aggregator.patch_embed.register_forward_hook(
        lambda _module, inputs, _output: counted.append(len(inputs[0]))
    )
    return counted


def test_each_frame_is_encoded_once(model: VGGT) -> None:
    network, stream = VGGTNetwork(model, 'test', True, 'float32'), Stream(0)
    counted = encodings(model)
    for first in range(0, 12, 2):
        network(stream.window(list(range(first, first + 6))), HEADS)
    assert counted == [6, 2, 2, 2, 2, 2]
    network(stream.window([0, 1, 14, 15]), HEADS)  # a loop closure window
    network(stream.window([11, 12, 13, 14, 15, 16]), HEADS)
    assert counted[6:] == [2, 1] or counted[6:] == [4, 1]


def test_frames_encoded_on_arrival_are_used_in_the_window(model: VGGT) -> None:
    alone, together = (VGGTNetwork(model, 'test', True, 'float32') for _ in range(2))
    stream, ids = Stream(4), list(range(6))
    counted = encodings(model)
    for last in ids:
        alone.encode_ahead(stream.images(ids[: last + 1]))
    assert counted == [1] * 6
    found, expected = (each(stream.window(ids), HEADS) for each in (alone, together))
    assert counted == [1] * 6 + [6]
    for name in ('depth', 'depth_confidence', 'descriptors'):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one - other).abs().max() <= EXACT * other.abs().max()


def test_frames_that_never_become_a_window_are_dropped(model: VGGT) -> None:
    network, stream = VGGTNetwork(model, 'test', True, 'float32'), Stream(5)
    for number in range(0, 60, 2):  # a reset after every second frame
        network.encode_ahead(stream.images([number]))
        network.encode_ahead(stream.images([number, number + 1]))
    assert network.encoded_frames <= 4


def noise_images(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (60, 84 - 2 * seed, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize('anchor_windows', [0, 2])
def test_encoding_ahead_does_not_change_the_result(model: VGGT, anchor_windows: int) -> None:
    settings = Settings.from_flat(
        {
            'window_size': 4,
            'window_stride': 2,
            'min_parallax': 0.0,
            'resolution': 56,
            'anchor_windows': anchor_windows,
        }
    )
    ahead, plain = (
        StreamingEngine(settings, VGGTNetwork(model, 'test', True, 'float32')) for _ in range(2)
    )
    counted = encodings(model)
    # images of another size at number 3 start another map, and so does the reset at 13
    images = [*noise_images(0, 3), *noise_images(1, 16)]
    windows = 0
    for number, image in enumerate(images):
        frame = Frame(image, number * 10**8, 'camera')
        if number == 13:
            ahead.reset('test')
            plain.reset('test')
        del counted[:]
        found = ahead.add(frame)
        assert counted in ([], [1])  # of a whole window, only its last frame
        ahead.encode_ahead()
        assert sum(counted) == 1
        expected = plain.add(frame)
        assert (found is None) == (expected is None)
        if found is None or expected is None:
            continue
        windows += 1
        assert found.batch.ids == expected.batch.ids and found.map_id == expected.map_id
        assert torch.equal(found.batch.stack(), expected.batch.stack())
        for i in expected.reconstruction.confidence:
            np.testing.assert_allclose(found.depth(i), expected.depth(i), rtol=EXACT)
    assert windows == 6


class FullDevice(VGGTNetwork):
    """A device without memory for encoding ahead."""

    tried = 0

    def encode_ahead(self, _images: Mapping[int, PreprocessedImage]) -> None:
        self.tried += 1
        raise torch.cuda.OutOfMemoryError('the device has no memory left')


def test_out_of_memory_while_encoding_ahead_loses_no_frame(
    model: VGGT, caplog: pytest.LogCaptureFixture
) -> None:
    network = FullDevice(model, 'test', True, 'float32')
    settings = Settings.from_flat({'window_size': 3, 'window_stride': 2, 'min_parallax': 0.0})
    engine = StreamingEngine(settings, network)
    updates = []
    for number, image in enumerate(noise_images(0, 7)):
        updates.append(engine.add(Frame(image, number * 10**8, 'camera')))
        engine.encode_ahead()
    assert [u.batch.ids for u in updates if u is not None] == [(0, 1, 2), (2, 3, 4), (4, 5, 6)]
    assert network.tried == engine.counts['out_of_memory'] == 1
    assert caplog.text.count('from now on frames are encoded when their window is complete') == 1


def test_images_of_several_sizes_are_encoded_with_their_window(model: VGGT) -> None:
    settings = Settings.from_flat({'window_size': 2, 'window_stride': 1, 'min_parallax': 0.0})
    engine = StreamingEngine(settings, VGGTNetwork(model, 'test', True, 'float32'))
    wide, high = np.zeros((40, 80, 3), np.uint8), np.zeros((80, 80, 3), np.uint8)
    counted = encodings(model)
    for number in range(2):
        frame_set = [
            Frame(wide, number * 10**8, 'wide'),
            Frame(high, number * 10**8, 'high', camera=1),
        ]
        update = engine.add(frame_set)
        engine.encode_ahead()
    assert update is not None and len({i.pixels.shape for i in update.batch.images}) == 1
    assert counted == [4]


def test_only_the_requested_frames_are_decoded(model: VGGT) -> None:
    network, stream = VGGTNetwork(model, 'test', True, 'float32'), Stream(1)
    decoded: list[int] = []
    handle = model.depth_head.scratch.output_conv2.register_forward_hook(
        lambda _module, _inputs, output: decoded.append(len(output))
    )
    prediction = network(stream.window([0, 1, 2, 3, 4], dense=[1, 4]), HEADS)
    handle.remove()
    assert decoded == [2]
    assert prediction.depth is not None and prediction.depth.shape[:2] == (1, 2)
    assert prediction.pose_encodings is not None
    assert prediction.pose_encodings[-1].shape[:2] == (1, 5)


@pytest.mark.parametrize(('heads', 'whole'), [(('camera', 'depth'), 2), (('camera',), 0)])
def test_the_last_block_computes_only_the_selected_tokens(
    model: VGGT, heads: tuple[str, ...], whole: int
) -> None:
    """All tokens of the frames whose depth is requested, and the camera tokens of all five."""
    network, batch = VGGTNetwork(model, 'test', True, 'float32'), Stream(3).window([*range(5)])
    sizes: list[int] = []
    block = model.aggregator.global_blocks[-1]
    handle = block.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[1]))
    expected = network(batch, heads).pose_encodings
    found = network(replace(batch, depth_frames=(1, 4)), heads).pose_encodings
    handle.remove()
    per_frame = model.aggregator.num_special_tokens + 4 * 6  # patches of 56 x 84 pixels
    assert sizes == [5 * per_frame, whole * per_frame + 5]
    torch.testing.assert_close(found[-1], expected[-1], rtol=EXACT, atol=EXACT)


@NEEDS_X86
def test_packed_layers_give_the_same_result(model: VGGT, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = copy.deepcopy(model)
    layers = sum(isinstance(each, nn.Linear) for each in packed.aggregator.modules())
    assert pack_linear_layers(packed.aggregator) < layers  # small ones are not packed
    monkeypatch.setattr(linear_weights, 'MIN_PACKED_WEIGHTS', 1)
    pack_linear_layers(packed.aggregator, packed.camera_head)
    left = [*packed.aggregator.modules(), *packed.camera_head.modules()]
    assert not any(isinstance(each, nn.Linear) for each in left)
    network = VGGTNetwork(packed, 'test', True, 'float32')
    for ids in ([0], [0, 1, 2, 3], [1, 2, 3, 4, 5]):
        assert_same(network, model, Stream(4).window(ids))


@NEEDS_X86
@pytest.mark.parametrize(('compiled', 'is_packed'), [(False, True), (True, False)])
def test_loaded_networks_are_packed(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, is_packed: bool
) -> None:
    """All but compiled ones; packed layers take the memory of plain ones."""
    monkeypatch.setattr(linear_weights, 'MIN_PACKED_WEIGHTS', 1)
    settings = ModelSettings('untrained', 'cpu', compile=compiled)
    model = load_network(settings).model
    assert isinstance(model.aggregator.global_blocks[0].mlp.fc1, PackedLinear) is is_packed
    with torch.device('meta'):
        plain = VGGT(model.config)
    assert weight_bytes(model) == weight_bytes(plain)


@pytest.mark.parametrize('seed', range(3))
def test_any_sequence_of_windows_gives_what_whole_windows_give(model: VGGT, seed: int) -> None:
    """Frames change, the resolution changes, and two streams use the same frame numbers."""
    network = VGGTNetwork(model, 'test', True, 'float32')
    random = np.random.default_rng(seed)
    streams = [Stream(10), Stream(11)]
    ids, width, stream = list(range(5)), 84, streams[0]
    for _ in range(14):
        chance = random.random()
        if chance < 0.15:  # a reset: another stream, numbers from 0 again
            stream, ids = streams[random.integers(2)], list(range(random.integers(2, 6)))
        elif chance < 0.3:
            width = int(random.choice([56, 84, 112]))
        else:
            ids = ids[random.integers(0, len(ids)) :]
            ids += range(ids[-1] + 1, ids[-1] + 1 + random.integers(1, 4))
        count = int(random.integers(1, len(ids) + 1))
        dense = sorted(random.choice(len(ids), count, replace=False).tolist())
        for ahead in range(random.integers(0, len(ids) + 1)):  # in the order of arrival
            network.encode_ahead(stream.images(ids[: ahead + 1], width))
        assert_same(network, model, stream.window(ids, width, dense))


def test_changed_weights_are_used(model: VGGT) -> None:
    """The positional encoding is interpolated again when its weights have changed."""
    batch = Stream(2).window([0, 1])
    before = naive_forward(model, batch.stack()[None]).depth
    network = VGGTNetwork(model, 'test', True, 'float32')
    torch.testing.assert_close(network(batch, HEADS).depth, before)
    kept = model.aggregator.patch_embed.pos_embed.detach().clone()
    with torch.no_grad():
        model.aggregator.patch_embed.pos_embed.mul_(2)
    fresh = VGGTNetwork(model, 'test', True, 'float32')
    after = fresh(batch, HEADS).depth
    with torch.no_grad():
        model.aggregator.patch_embed.pos_embed.copy_(kept)
    assert not torch.allclose(after, before, atol=1e-4)


def test_operations_of_attention_are_counted_for_every_backend() -> None:
    """Torch itself counts only matrix products, of which one backend consists."""
    q, k, v = torch.rand(2, 3, 50, 16), torch.rand(2, 3, 70, 16), torch.rand(2, 3, 70, 16)

    def attend() -> None:
        functional.scaled_dot_product_attention(q, k, v)

    counted = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend), torch.inference_mode():
            counted.append(count_flops(attend))
    assert counted[0] == counted[1] > 0


def test_the_benchmark_compares_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figures = tmp_path / 'figures.json'
    arguments = ['--frames', '4', '--stride', '1', '8', '--resolution', '42x28', '--windows', '2']
    picture = tmp_path / 'scaling.png'
    arguments += ['--json', str(figures), '--plot', str(picture)]
    assert Bench.main(arguments) == 0
    assert picture.read_bytes().startswith(b'\x89PNG')
    found = json.loads(figures.read_text())['results']
    assert [each['stride'] for each in found] == [1, 4]  # the stride is at most the window size
    for each in found:
        assert each['naive']['flops'] == found[0]['naive']['flops']
        assert each['flops_ratio'] == each['naive']['flops'] / each['engine']['flops'] > 1
        assert each['ratio_to_naive'] > 0 and each['windows_per_second'] > 0
        assert each['floor_ratio'] > 1 and each['predicted_memory_bytes'] > 0
    # three frames fewer are encoded, and two fewer are decoded
    assert found[0]['engine']['flops'] < found[1]['engine']['flops']
    assert '| small | 4 | 1 | 42x28 |' in capsys.readouterr().out


def test_the_benchmark_refuses_other_sizes(capsys: pytest.CaptureFixture) -> None:
    assert Bench.main(['--resolution', '640x480']) == 2
    assert "found '640x480', expected WIDTHxHEIGHT in multiples of 14" in capsys.readouterr().err
