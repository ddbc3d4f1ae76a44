# SPDX-License-Identifier: Apache-2.0
"""The structure of the network: shapes, invariances, precision, gradients, errors.

`test_parity.py` compares its numbers with the reference.
"""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_ros.lab.parity.weight_recipe import fill_weights
from vggt_ros.model import ALL_HEADS, VGGT, Prediction, VGGTConfig, cast_linear_weights
from vggt_ros.model.attention import (
    CrossAttention,
    Rope,
    SelfAttention,
    eager_attention,
    fused_attention,
    patch_positions,
    rope_table,
    use_attention,
)
from vggt_ros.model.dpt_head import FRAMES_CHUNK_SIZE, use_channels_last
from vggt_ros.model.kernels import configure_tf32
from vggt_ros.model.track_head import correlate, correlation_pyramid, sample_features

TINY = VGGTConfig.tiny()


@pytest.fixture(scope='module')
def model():
    """A tiny network in which every part has an effect, and rounding errors stay small."""
    network = VGGT(TINY).eval()
    fill_weights(network, 'test')
    return network


def make_images(batch=1, frames=3, height=28, width=42, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, height, width, generator=generator)


def make_queries(batch=1):
    return torch.tensor([[[3.0, 4.0], [20.5, 11.25], [41.0, 27.0], [0.0, 0.0]]]).repeat(
        batch, 1, 1
    )


def assert_same(a: Prediction, b: Prediction, select=lambda value: value, atol=1e-5):
    for field in dataclasses.fields(Prediction):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, torch.Tensor):
            ours, theirs = [ours], [theirs]
        for x, y in zip(ours, theirs, strict=True):
            assert torch.allclose(select(x), y, atol=atol, rtol=1e-4), field.name


@pytest.mark.parametrize(('batch', 'frames', 'size'), [(1, 1, (28, 42)), (2, 3, (56, 56))])
def test_every_head_has_the_documented_shape_and_range(model, batch, frames, size):
    with torch.no_grad():
        p = model(make_images(batch, frames, *size), make_queries(batch))
    assert [tuple(pose.shape) for pose in p.pose_encodings] == [(batch, frames, 9)] * 4
    assert p.depth.shape == p.depth_confidence.shape == (batch, frames, *size)
    assert p.points.shape == (batch, frames, *size, 3)
    assert p.points_confidence.shape == (batch, frames, *size)
    assert p.tracks.shape == (batch, frames, 4, 2)
    assert p.visibility.shape == p.track_confidence.shape == (batch, frames, 4)
    assert p.tracks is p.track_iterations[-1]
    assert (p.pose_encodings[-1][..., 7:] >= 0).all()
    assert (p.depth > 0).all()
    assert (p.depth_confidence >= 1).all()
    assert (p.points_confidence >= 1).all()
    assert ((p.visibility >= 0) & (p.visibility <= 1)).all()


def test_only_requested_heads_run(model):
    with torch.no_grad():
        camera = model(make_images(), make_queries(), heads=('camera',))
        dense = model(make_images(), heads=('depth', 'tracks'))
        everything = model(make_images())
        encoded = model.encode(make_images())
    found = {f.name for f in dataclasses.fields(camera) if getattr(camera, f.name) is not None}
    assert found == {'pose_encodings', 'descriptors'}
    torch.testing.assert_close(camera.descriptors, encoded.mean(2))
    assert dense.pose_encodings is None
    assert dense.points is None
    assert dense.depth is not None
    assert dense.tracks is None
    assert everything.tracks is None
    assert torch.equal(camera.pose_encodings[-1], everything.pose_encodings[-1])
    assert torch.equal(dense.depth, everything.depth)


def test_the_camera_head_alone_reads_no_layer_but_the_last(model):
    assert model.layers_for(('camera',)) == set()
    assert model.layers_for(('camera', 'points')) == set(TINY.dpt.intermediate_layer_idx)


def test_permuting_the_later_frames_permutes_the_result(model):
    images, order = make_images(frames=4), [0, 3, 1, 2]
    with torch.no_grad():
        assert_same(
            model(images, make_queries()),
            model(images[:, order], make_queries()),
            lambda value: value[:, order],
            atol=1e-4,
        )


def test_the_first_frame_is_special(model):
    images = make_images(frames=2)
    with torch.no_grad():
        original, swapped = model(images), model(images.flip(1))
    assert not torch.allclose(original.depth, swapped.depth.flip(1), atol=1e-3)


def test_windows_of_a_batch_are_independent(model):
    images = torch.cat((make_images(seed=1), make_images(seed=2)))
    with torch.no_grad():
        both = model(images, make_queries(2))
        assert_same(both, model(images[1:], make_queries()), lambda value: value[1:], atol=1e-4)


def test_frame_zero_of_every_track_is_the_query(model):
    with torch.no_grad():
        p = model(make_images(), make_queries())
    assert all(torch.equal(tracks[:, 0], make_queries()) for tracks in p.track_iterations)
    assert not torch.allclose(p.tracks[:, 1], make_queries(), atol=1e-3)


def track(model, maps, queries, frames=None):
    with torch.no_grad():
        tracks, visibility, confidence = model.track_head.tracker(maps, queries, frames)
    return [*tracks, visibility, confidence]


def feature_maps(frames=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, frames, TINY.track.features, 14, 21, generator=generator)


def test_queries_are_in_frame_zero_by_default(model):
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        explicit = model(make_images(), make_queries(), query_frames=zeros)
        assert_same(explicit, model(make_images(), make_queries()), atol=0)


@pytest.mark.parametrize('frame', [1, 3])
def test_tracking_from_another_frame_equals_tracking_with_that_frame_first(model, frame):
    order = [frame, *(i for i in range(4) if i != frame)]
    frames = torch.full((1, 4), frame)
    other = track(model, feature_maps(), make_queries(), frames)
    first = track(model, feature_maps()[:, order], make_queries())
    for found, expected in zip(other, first, strict=True):
        torch.testing.assert_close(found[:, order], expected, atol=1e-4, rtol=1e-4)


def test_each_track_equals_its_query_in_the_query_frame(model):
    frames = torch.tensor([[0, 2, 1, 2]])
    with torch.no_grad():
        p = model(make_images(), make_queries(), query_frames=frames)
    for tracks in p.track_iterations:
        found = tracks[0, frames[0], torch.arange(4)]
        assert torch.equal(found, make_queries()[0])
    assert not torch.allclose(p.tracks[:, 0, 1:], make_queries()[:, 1:], atol=1e-3)


def test_tracks_of_all_frames_and_depth_of_some(model):
    images = make_images(frames=4)
    with torch.no_grad():
        whole = model(images, make_queries())
        tokens = model.aggregate(model.encode(images), (2, 3), model.layers_for(ALL_HEADS))
        part = model.decode(tokens, (28, 42), make_queries(), dense_frames=[1, 3])
    assert torch.equal(part.tracks, whole.tracks)
    assert torch.equal(part.depth, whole.depth[:, [1, 3]])
    assert torch.equal(part.points, whole.points[:, [1, 3]])


@pytest.mark.parametrize(
    ('frames', 'expected'),
    [
        (torch.zeros(1, 3, dtype=torch.int64), r'\(1, 3\) torch.int64; expected \(1, 4\) int64'),
        (torch.zeros(1, 4), r'torch.float32; expected'),
        (torch.tensor([[0, 1, 2, 3]]), 'has 0 to 3; expected 0 to 2'),
        (torch.tensor([[0, -1, 2, 1]]), 'has -1 to 2; expected 0 to 2'),
    ],
)
def test_invalid_query_frames_are_rejected(model, frames, expected):
    with pytest.raises(ValueError, match=expected):
        model(make_images(), make_queries(), query_frames=frames)


def test_decoding_in_chunks_does_not_change_the_result(model):
    images = make_images(frames=FRAMES_CHUNK_SIZE + 2)
    with torch.no_grad():
        tokens = model.aggregate(model.encode(images), (2, 3), model.layers_for(('depth',)))
        whole = model.decode(tokens, (28, 42), heads=('depth', 'points'))
        last = {index: layer[:, -3:] for index, layer in tokens.items()}
        part = model.decode(last, (28, 42), heads=('depth', 'points'))
    assert torch.allclose(whole.depth[:, -3:], part.depth, atol=1e-5)
    assert torch.allclose(whole.points[:, -3:], part.points, atol=1e-5)


def test_channels_last_is_preserved_in_the_whole_head_with_the_same_result(model):
    converted = copy.deepcopy(model)
    use_channels_last(converted)
    seen = []

    def record(module, inputs, output):
        seen.extend((inputs[0], output, module.weight))

    for module in converted.depth_head.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(record)
    with torch.inference_mode():
        images = make_images()
        assert_same(converted(images, make_queries()), model(images, make_queries()))
    assert len(seen) == 3 * 32
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)


@pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16])
def test_float32_disables_tf32(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', precision == torch.float32)
    configure_tf32(precision)
    assert torch.backends.cudnn.allow_tf32 == (precision != torch.float32)


def test_frames_can_be_encoded_one_by_one(model):
    images = make_images()
    with torch.no_grad():
        one_by_one = torch.cat([model.encode(images[:, i : i + 1]) for i in range(3)], dim=1)
        tokens = model.aggregate(one_by_one, (2, 3), model.layers_for(('depth',)))
        ours, whole = model.decode(tokens, (28, 42)), model(images)
    assert torch.allclose(ours.depth, whole.depth, atol=1e-5)
    assert torch.allclose(ours.pose_encodings[-1], whole.pose_encodings[-1], atol=1e-5)


def test_the_positional_encoding_is_interpolated_except_at_the_training_size(model):
    encoder = model.aggregator.patch_embed
    assert encoder.pos_encoding(4, 4) is encoder.pos_embed
    assert encoder.pos_encoding(2, 8).shape == encoder.pos_embed.shape
    assert not torch.equal(encoder.pos_encoding(2, 8), encoder.pos_embed)


@pytest.mark.parametrize('backend', ['MATH', 'FLASH_ATTENTION'])
def test_every_attention_backend_agrees_with_eager_attention(backend):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 10, 16)
    k, v = torch.randn(2, 2, 4, 15, 16).unbind(0)
    expected = eager_attention(q.double(), k.double(), v.double())
    with sdpa_kernel(getattr(SDPBackend, backend)):
        found = fused_attention(q, k, v)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_the_whole_network_agrees_with_eager_attention(model):
    used = [m for m in model.modules() if isinstance(m, (SelfAttention, CrossAttention))]
    try:
        with torch.no_grad():
            fused = model(make_images(), make_queries())
            use_attention(model, eager_attention)
            assert all(module.attend is eager_attention for module in used)
            assert_same(fused, model(make_images(), make_queries()), atol=1e-4)
    finally:
        use_attention(model, fused_attention)


def test_rope_makes_products_depend_on_the_offset_only():
    torch.manual_seed(0)
    table = rope_table(patch_positions(5, 6, 1, torch.device('cpu')), 16, 100)
    q = Rope()(torch.randn(1, 1, 1, 16).expand(-1, -1, 31, -1), table)
    k = Rope()(torch.randn(1, 1, 1, 16).expand(-1, -1, 31, -1), table)
    products = (q @ k.transpose(-2, -1))[0, 0, 1:, 1:].unflatten(0, (5, 6)).unflatten(2, (5, 6))
    assert torch.allclose(products[0, 0, 2, 1], products[2, 4, 4, 5], atol=1e-5)
    assert not torch.allclose(products[0, 0, 2, 1], products[0, 0, 1, 2], atol=1e-2)


def test_special_tokens_are_not_rotated():
    table = rope_table(patch_positions(2, 2, 5, torch.device('cpu')), 16, 100)
    tokens = torch.randn(2, 3, 2 * 9, 16)
    rotated = Rope()(tokens, table)
    frames = rotated.unflatten(2, (2, 9)), tokens.unflatten(2, (2, 9))
    assert torch.equal(frames[0][:, :, :, :5], frames[1][:, :, :, :5])
    assert torch.allclose(rotated.norm(dim=-1), tokens.norm(dim=-1), atol=1e-5)


def test_tables_are_computed_once_per_resolution_and_are_not_in_the_checkpoint():
    network = VGGT(TINY).eval()
    keys = set(network.state_dict())
    with torch.inference_mode():
        network(make_images(), heads=('depth',))
        embeddings = dict(network.depth_head.tables)
        table = network.aggregator.rope_table((2, 3), torch.device('cpu'))
        network(make_images(seed=1), heads=('depth',))
    assert network.aggregator.rope_table((2, 3), torch.device('cpu')) is table
    assert embeddings and network.depth_head.tables == embeddings
    assert set(network.state_dict()) == keys
    assert keys == {name for name, _ in network.named_parameters()}


def test_training_after_inference_reaches_every_parameter_but_the_unused_mask_token():
    torch.manual_seed(0)
    network = VGGT(TINY)
    with torch.inference_mode():
        network(make_images(), make_queries())
    p = network.train()(make_images(), make_queries())
    terms = [*p.pose_encodings, p.depth, p.depth_confidence, p.points, p.points_confidence]
    terms += [*p.track_iterations, p.visibility, p.track_confidence]
    sum(term.square().mean() for term in terms).backward()
    without = {name for name, q in network.named_parameters() if q.grad is None}
    assert without == {'aggregator.patch_embed.mask_token'}
    assert all(q.grad.isfinite().all() for q in network.parameters() if q.grad is not None)


def test_stored_bfloat16_weights_change_nothing_under_autocast(model):
    stored = VGGT(TINY).eval()
    stored.load_state_dict(model.state_dict())
    cast_linear_weights(stored, torch.bfloat16)
    with torch.no_grad():
        model.autocast_dtype = torch.bfloat16
        try:
            expected = model(make_images(), make_queries())
        finally:
            model.autocast_dtype = None
        found, exact = stored(make_images(), make_queries()), model(make_images(), make_queries())
    assert torch.equal(found.depth, expected.depth)
    assert torch.equal(found.tracks, expected.tracks)
    assert torch.equal(found.pose_encodings[-1], expected.pose_encodings[-1])
    assert found.depth.dtype == found.tracks.dtype == torch.float32
    assert not torch.equal(found.depth, exact.depth)
    assert (found.depth - exact.depth).norm() / exact.depth.norm() < 0.05
    kinds = {name: q.dtype for name, q in stored.named_parameters()}
    halved = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert all(name.startswith('aggregator.') for name in halved)
    assert not any('norm' in n or 'gamma' in n or 'token' in n or 'pos_' in n for n in halved)
    assert 'aggregator.frame_blocks.0.attn.qkv.weight' in halved
    assert 'aggregator.patch_embed.patch_embed.proj.bias' in halved


def test_heads_ignore_the_autocast_of_the_caller(model):
    seen = []
    hook = model.depth_head.scratch.output_conv1.register_forward_hook(
        lambda _module, _args, output: seen.append(output.dtype)
    )
    with hook, torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        model(make_images(), heads=('depth',))
    assert seen == [torch.float32]


def test_correlation_is_the_sampled_correlation_map():
    torch.manual_seed(0)
    maps, features = torch.randn(1, 2, 8, 9, 4), torch.randn(1, 2, 3, 8)
    coords = torch.tensor([[1.3, 2.6], [3.0, 8.0], [-4.0, 0.2]]).expand(1, 2, -1, -1)
    found = correlate(correlation_pyramid(maps, 3), coords, features, radius=1)
    assert found.shape == (1, 2, 3, 27)
    # Level 1, by hand: the whole map of products, bilinear with zeros outside, x slow.
    smaller = functional.avg_pool2d(maps[0], 2)
    products = torch.einsum('sdhw,skd->skhw', smaller, features[0]) / 8**0.5
    for frame in range(2):
        for point in range(3):
            window = [(dx, dy) for dx in (-1.0, 0.0, 1.0) for dy in (-1.0, 0.0, 1.0)]
            positions = coords[0, frame, point] / 2 + torch.tensor(window)
            correlation_map = products[frame, point][None, None]
            expected = sample_features(correlation_map, positions[None], 'zeros')[0, :, 0]
            assert torch.allclose(found[0, frame, point, 9:18], expected, atol=1e-5)


def test_sampling_interpolates_and_pads_and_always_hits_a_single_pixel():
    ramp = torch.arange(12.0).reshape(1, 1, 3, 4)
    points = torch.tensor([[[1.0, 2.0], [0.5, 0.5], [-3.0, 0.0], [9.0, 9.0]]])
    assert sample_features(ramp, points, 'zeros')[0, :, 0].tolist() == pytest.approx(
        [9.0, 2.5, 0.0, 0.0]
    )
    assert sample_features(ramp, points, 'border')[0, :, 0].tolist() == pytest.approx(
        [9.0, 2.5, 0.0, 11.0]
    )
    single = torch.full((1, 1, 1, 1), 7.0)
    assert sample_features(single, points, 'zeros')[0, :, 0].tolist() == [7.0] * 4


@pytest.mark.parametrize(
    ('images', 'expected'),
    [
        (torch.zeros(3, 3, 28, 28), r'\(3, 3, 28, 28\); expected \(B, S, 3, H, W\)'),
        (torch.zeros(1, 3, 28, 28, 3), r'expected \(B, S, 3, H, W\)'),
        (torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8), 'uint8; expected a float type'),
        (torch.zeros(1, 1, 3, 30, 28), '30 × 28; expected multiples of 14'),
        (torch.zeros(1, 0, 3, 28, 28), 'no empty axis'),
    ],
)
def test_invalid_images_are_rejected(model, images, expected):
    with pytest.raises(ValueError, match=expected):
        model(images)


@pytest.mark.parametrize(
    ('queries', 'expected'),
    [
        (torch.zeros(4, 2), r'\(4, 2\); expected \(B, K, 2\) with B = 1'),
        (torch.zeros(2, 4, 2), r'with B = 1'),
        (torch.zeros(1, 0, 2), r'\(1, 0, 2\)'),
        (torch.zeros(1, 4, 2, dtype=torch.int64), 'int64; expected a float type'),
    ],
)
def test_invalid_query_points_are_rejected(model, queries, expected):
    with pytest.raises(ValueError, match=expected):
        model(make_images(), queries)


def test_images_too_small_for_the_correlation_pyramid_are_rejected_for_tracking_only():
    track = dataclasses.replace(TINY.track, corr_levels=5)
    network = VGGT(dataclasses.replace(TINY, track=track)).eval()
    with torch.no_grad():
        assert network(make_images()).depth is not None
        with pytest.raises(ValueError, match='needs at least 32 pixels'):
            network(make_images(), make_queries())


@pytest.mark.parametrize('heads', [('camera', 'normals'), 'depth'])
def test_unknown_heads_are_rejected(model, heads):
    with pytest.raises(ValueError, match='expected a collection of'):
        model(make_images(), heads=heads)


@pytest.mark.parametrize('name', ['vggt_1b', 'small', 'tiny'])
def test_configurations_round_trip_through_json(name):
    config = getattr(VGGTConfig, name)()
    assert VGGTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_descriptions_of_golden_data_are_read():
    fields = {**TINY.to_dict(), 'name': 'pubX', '_case': {'salt': 'x'}}
    assert VGGTConfig.from_dict(fields) == TINY


def test_small_is_small():
    with torch.device('meta'):
        network = VGGT(VGGTConfig.small())
    assert 2e6 < sum(p.numel() for p in network.parameters()) < 4e6


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'colour': 3}, 'unknown fields colour'),
        ({'vit': {'deep': 3}}, 'vit has unknown fields deep'),
        ({'vit': 3}, 'vit is 3; expected a mapping'),
        ({'img_size': 500}, 'patch_size is 14; expected a divisor of img_size, 500'),
        ({'vit': {'num_heads': 15}}, 'vit.num_heads is 15'),
        ({'vit': {'depth': 0}}, 'vit.depth is 0; expected an integer >= 1'),
        ({'vit': {'depth': True}}, 'vit.depth is True'),
        ({'vit': {'mlp_ratio': -1}}, 'vit.mlp_ratio is -1; expected a number > 0'),
        ({'agg': {'num_heads': 512}}, 'RoPE needs a multiple of 4'),
        ({'agg': {'depth': 20}}, r'expected 0 to 19'),
        ({'camera': {'num_heads': 7}}, 'camera.num_heads is 7'),
        ({'dpt': {'out_channels': [256, 512, 1024]}}, 'expected 4 multiples of 4'),
        ({'dpt': {'out_channels': [256, 512, 1024, 1022]}}, 'expected 4 multiples of 4'),
        ({'dpt': {'features': 20}}, 'dpt.features is 20'),
        ({'dpt': {'intermediate_layer_idx': [4, 3, 17, 23]}}, 'expected 4 layer indices in order'),
        ({'dpt': {'intermediate_layer_idx': ['a']}}, 'expected a list of integers'),
        ({'track': {'num_heads': 7}}, 'track.num_heads is 7'),
        ({'track': {'pos_embed': 1}}, 'track.pos_embed is 1; expected true or false'),
        ({'track': {'features': 30}}, 'track.features is 30'),
    ],
)
def test_invalid_configurations_are_rejected(fields, expected):
    with pytest.raises(ValueError, match=expected):
        VGGTConfig.from_dict(fields)
