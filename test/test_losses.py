# SPDX-License-Identifier: Apache-2.0
"""Losses, their gradients and a training step equal the reference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vggt_ros.lab.parity.golden_cases import build_case
from vggt_ros.lab.parity.weight_recipe import uniform_from_name
from vggt_ros.lab.training.dataset import GroundTruth, normalise_scale
from vggt_ros.lab.training.losses import (
    CameraLoss,
    DenseLoss,
    LossSettings,
    TrackLoss,
    compute_losses,
)
from vggt_ros.model import Prediction

GOLDEN = Path(__file__).parent.parent.parent / 'shared' / 'vggt' / 'golden_public'
LIMIT = 1e-5
SHAPES = {'grad': ('gradient', False), 'normal': ('normal', False)}
SHAPES |= {f'{name}_conf': (shape, True) for name, (shape, _) in tuple(SHAPES.items())}
NAMES = {
    'loss_camera': 'camera',
    'loss_T': 'camera_translation',
    'loss_R': 'camera_rotation',
    'loss_FL': 'camera_field_of_view',
    'loss_conf_depth': 'depth_confidence',
    'loss_reg_depth': 'depth_error',
    'loss_grad_depth': 'depth_shape',
    'loss_conf_point': 'points_confidence',
    'loss_reg_point': 'points_error',
    'loss_grad_point': 'points_shape',
    'objective': 'total',
}
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason='no ../shared/vggt with goldens')


def settings_of(config):
    def dense(values):
        if values is None:
            return None
        shape, with_confidence = SHAPES[values['gradient_loss_fn']]
        return DenseLoss(
            weight=values['weight'],
            shape=shape,
            shape_confidence=with_confidence,
            quantile=max(values['valid_range'], 0.0),
            gamma=values.get('gamma', 1.0),
            alpha=values.get('alpha', 0.2),
        )

    camera = config['camera']
    return LossSettings(
        camera=CameraLoss(
            weight=camera['weight'], norm=camera['loss_type'], decay=camera.get('gamma', 0.6)
        ),
        depth=dense(config['depth']),
        points=dense(config['point']),
    )


def truth_of(tensors, prefix=''):
    return GroundTruth(
        camera_from_world=tensors[f'{prefix}extrinsics'],
        intrinsics=tensors.get(f'{prefix}intrinsics', tensors.get('raw.intrinsics')),
        depth=tensors[f'{prefix}depths'],
        points=tensors[f'{prefix}world_points'],
        valid=tensors.get(f'{prefix}point_masks', tensors.get('raw.point_masks')).bool(),
    )


def assert_losses(found, golden):
    for name, expected in golden.items():
        assert found[NAMES[name]].item() == pytest.approx(expected, rel=LIMIT), name


@needs_golden
def test_the_ground_truth_is_normalised_as_in_the_reference():
    tensors = load_file(GOLDEN / 'losses' / 'losses.safetensors')
    truth, _ = normalise_scale(truth_of(tensors, 'raw.'))
    for found, name in (
        (truth.camera_from_world, 'norm.extrinsics'),
        (truth.depth, 'norm.depths'),
        (truth.points, 'norm.world_points'),
        (truth.pose_encodings(), 'gt_pose_encoding'),
    ):
        torch.testing.assert_close(found, tensors[name], rtol=LIMIT, atol=LIMIT)


@needs_golden
@pytest.mark.parametrize('name', ['default_yaml', 'with_point_normal', 'l2_and_conf_gradients'])
def test_losses_and_gradients_equal_the_reference(name):
    tensors = load_file(GOLDEN / 'losses' / 'losses.safetensors')
    golden = json.loads((GOLDEN / 'losses' / 'losses.json').read_text())[name]
    leaves = {
        key.removeprefix('pred.'): value.requires_grad_()
        for key, value in tensors.items()
        if key.startswith('pred.')
    }
    prediction = Prediction(
        pose_encodings=[leaves[f'pose_enc.iter{i}'] for i in range(4)],
        depth=leaves['depth'][..., 0],
        depth_confidence=leaves['depth_conf'],
        points=leaves['world_points'],
        points_confidence=leaves['world_points_conf'],
    )
    losses = compute_losses(prediction, truth_of(tensors, 'norm.'), settings_of(golden['config']))
    assert_losses(losses, golden['losses'])
    losses['total'].backward()
    for key, value in tensors.items():
        prefix = f'grad.{name}.'
        if key.startswith(prefix):
            found = leaves[key.removeprefix(prefix)].grad
            assert (found - value).abs().max() <= LIMIT * value.abs().max(), key


@needs_golden
def test_gradients_of_a_training_step_equal_the_reference():
    batch = load_file(GOLDEN / 'train_step' / 'batch.safetensors')
    golden = json.loads((GOLDEN / 'train_step' / 'train_step.json').read_text())
    model = build_case(GOLDEN / 'pubD').train()
    prediction = model(batch['images'], heads=('camera', 'depth', 'points'))
    losses = compute_losses(prediction, truth_of(batch), settings_of(golden['loss_config']))
    assert_losses(losses, golden['losses'])
    losses['total'].backward()
    checked = 0
    for name, parameter in model.named_parameters():
        if name.startswith('track_head.'):
            continue
        expected = golden['grads'][name]
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        gradient = parameter.grad.double()
        direction = torch.from_numpy(
            uniform_from_name(f'dot:{name}', tuple(gradient.shape), 'grad')
        )
        norm = float(gradient.norm())
        assert norm == pytest.approx(expected['norm'], rel=2 * LIMIT, abs=1e-7), name
        dot = float((gradient * (direction.double() - 0.5)).sum())
        assert dot == pytest.approx(expected['dot'], abs=2 * LIMIT * max(norm, 0.01)), name
        checked += 1
    assert checked > 300


def scene(seed=0, scenes=2, frames=3, height=28, width=42, tracks=5):
    random = torch.Generator().manual_seed(seed)
    eye = torch.eye(3, 4).expand(scenes, frames, 3, 4).clone()
    eye[..., 3] = torch.randn(scenes, frames, 3, generator=random)
    intrinsics = torch.tensor([[40.0, 0, 21], [0, 40, 14], [0, 0, 1]])
    depth = 1 + torch.rand(scenes, frames, height, width, generator=random)
    return GroundTruth(
        camera_from_world=eye,
        intrinsics=intrinsics.expand(scenes, frames, 3, 3),
        depth=depth,
        points=torch.randn(scenes, frames, height, width, 3, generator=random),
        valid=torch.rand(depth.shape, generator=random) > 0.2,
        tracks=20 * torch.rand(scenes, frames, tracks, 2, generator=random),
        visible=torch.rand(scenes, frames, tracks, generator=random) > 0.3,
    )


def perfect_prediction(truth):
    return Prediction(
        pose_encodings=[truth.pose_encodings()] * 2,
        depth=truth.depth,
        depth_confidence=torch.ones_like(truth.depth),
        points=truth.points,
        points_confidence=torch.ones_like(truth.depth),
        tracks=truth.tracks,
        track_iterations=[truth.tracks] * 2,
        visibility=truth.visible.float(),
        track_confidence=torch.ones_like(truth.visible, dtype=torch.float32),
    )


@pytest.mark.parametrize('norm', ['l1', 'l2', 'huber'])
def test_the_loss_of_the_ground_truth_is_zero(norm):
    truth, _ = normalise_scale(scene())
    settings = LossSettings(
        CameraLoss(norm=norm), DenseLoss(), DenseLoss(shape='normal'), TrackLoss()
    )
    losses = compute_losses(perfect_prediction(truth), truth, settings)
    assert float(losses['total']) == pytest.approx(0, abs=1e-5)


def test_the_scale_of_a_scene_does_not_matter():
    small = scene()
    large = GroundTruth(
        camera_from_world=torch.cat(
            (small.camera_from_world[..., :3], 7 * small.camera_from_world[..., 3:]), -1
        ),
        intrinsics=small.intrinsics,
        depth=7 * small.depth,
        points=7 * small.points,
        valid=small.valid,
    )
    one, scale = normalise_scale(small)
    other, larger_scale = normalise_scale(large)
    torch.testing.assert_close(larger_scale, 7 * scale)
    torch.testing.assert_close(one.depth, other.depth)
    torch.testing.assert_close(one.camera_from_world, other.camera_from_world)
    assert torch.equal(one.camera_from_world[:, 0], torch.eye(3, 4).expand(2, 3, 4))


def test_invalid_pixels_do_not_count():
    truth, _ = normalise_scale(scene())
    prediction = perfect_prediction(truth)
    depth = torch.where(truth.valid, prediction.depth, 1e6)
    changed = Prediction(depth=depth, depth_confidence=prediction.depth_confidence)
    losses = compute_losses(changed, truth, LossSettings(camera=None))
    assert float(losses['total']) == pytest.approx(0, abs=1e-5)


def test_nan_in_the_ground_truth_is_ignored():
    truth, _ = normalise_scale(scene())
    depth = truth.depth.clone()
    depth[0, 0, 0, 0] = float('nan')
    prediction = Prediction(depth=depth, depth_confidence=torch.ones_like(depth))
    settings = LossSettings(camera=None, depth=DenseLoss(shape=''))
    assert compute_losses(prediction, truth, settings)['total'].isfinite()


def test_invisible_tracks_do_not_count():
    truth, _ = normalise_scale(scene())
    far = torch.where(truth.visible[..., None], truth.tracks, truth.tracks + 50)
    prediction = Prediction(
        tracks=far,
        track_iterations=[far],
        visibility=truth.visible.float(),
        track_confidence=truth.visible.float(),
    )
    losses = compute_losses(prediction, truth, LossSettings(None, None, None, TrackLoss()))
    assert float(losses['total']) == pytest.approx(0, abs=1e-5)


def test_later_refinements_weigh_more():
    truth, _ = normalise_scale(scene())
    good = truth.pose_encodings()
    bad = good + 0.1
    settings = LossSettings(depth=None)
    early = compute_losses(Prediction(pose_encodings=[bad, good]), truth, settings)['camera']
    late = compute_losses(Prediction(pose_encodings=[good, bad]), truth, settings)['camera']
    assert float(early) == pytest.approx(0.6 * float(late))


def test_a_prediction_without_a_trained_head_is_rejected():
    truth, _ = normalise_scale(scene())
    with pytest.raises(ValueError, match='nothing to train'):
        compute_losses(Prediction(), truth, LossSettings())
