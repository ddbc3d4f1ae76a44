# SPDX-License-Identifier: Apache-2.0
"""Window metrics: zero on the ground truth, as computed by hand on known errors; baselines."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.rotation import matrix_from_quaternion
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.baselines import forward_motion, mean_motion, sift_relative_poses
from vggt_ros.lab.evaluation.synthetic_windows import evaluate_windows, window_table
from vggt_ros.lab.evaluation.window_metrics import (
    WindowErrors,
    area_under_curve,
    error_by_confidence,
    relative_poses,
)
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.model import VGGT, VGGTConfig

DATASET = SyntheticDataset('test', 0, 56, 84, queries=4)


@pytest.fixture(scope='module')
def truth():
    return DATASET.batch(0, 4, 3).truth


def rotation_about_z(degrees):
    half = math.radians(degrees) / 2
    return matrix_from_quaternion(
        torch.tensor([0, 0, math.sin(half), math.cos(half)], dtype=torch.float64)
    )


def test_the_ground_truth_has_no_error_in_any_frame_and_scale(truth):
    errors = WindowErrors()
    true = truth.camera_from_world.double()
    other_frame = invert_rigid(true[:, 1:2])
    moved = (
        torch.cat([true, true.new_tensor([0, 0, 0, 1.0]).expand(4, 3, 1, 4)], 2)
    ) @ other_frame
    moved[..., :3, 3] *= 7
    errors.add_cameras(moved[..., :3, :], true)
    errors.add_focal(truth.pose_encodings()[..., 8], truth.pose_encodings()[..., 8])
    errors.add_depth(3 * truth.depth, truth.depth, truth.valid)
    found = errors.metrics()
    assert found['rotation_median_deg'] < 1e-3
    assert found['translation_direction_median_deg'] < 1e-3
    assert found['absrel'] < 1e-6 and found['delta1'] == 1 and found['focal_error_percent'] == 0
    assert [found[f'auc{limit}'] for limit in (5, 10, 30)] == [1, 1, 1]


def test_known_errors_are_measured(truth):
    errors = WindowErrors()
    true = truth.camera_from_world.double().clone()
    found = true.clone()
    found[:, 1, :, :3] = rotation_about_z(7) @ true[:, 1, :, :3]  # frame 1, in 2 of 3 pairs
    errors.add_cameras(found, true)
    depth = truth.depth.clone()
    depth[:, :, :10] *= 1.3
    errors.add_depth(depth, truth.depth, truth.valid)
    errors.add_focal(torch.tensor([[math.radians(90)]]), torch.tensor([[2 * math.atan(0.5)]]))
    metrics = errors.metrics()
    rotation = np.concatenate(errors.rotation).reshape(4, 3)
    np.testing.assert_allclose(rotation, np.tile([7.0, 0.0, 7.0], (4, 1)), atol=1e-3)
    assert metrics['absrel'] == pytest.approx(0.3 * 10 / 56, rel=1e-3)
    assert metrics['delta1'] == pytest.approx(1 - 10 / 56, rel=1e-3)
    assert metrics['focal_error_percent'] == pytest.approx(50, rel=1e-3)


def test_a_backward_translation_is_wrong_and_a_stationary_camera_has_no_direction():
    forward = forward_motion(2)
    backward = forward.clone()
    backward[..., 3] *= -1
    errors = WindowErrors()
    errors.add_cameras(backward, forward)
    assert errors.metrics()['translation_direction_median_deg'] == pytest.approx(180)
    stationary = torch.eye(4)[:3].repeat(1, 2, 1, 1)
    errors = WindowErrors()
    errors.add_cameras(forward, stationary)
    assert errors.metrics()['auc5'] == 1
    assert math.isnan(errors.metrics()['translation_direction_median_deg'])


def test_area_under_curve_equals_the_hand_computed_one():
    assert area_under_curve(np.array([0.5, 2.5, 100.0, 4.0]), 5) == pytest.approx(
        (1 + 1 + 2 + 2 + 3) / 5 / 4
    )


def test_quartiles_of_confidence_are_in_order():
    confidence = torch.tensor([4.0, 1, 3, 2, 8, 7, 6, 5])
    assert error_by_confidence(10 / confidence, confidence)[0] == pytest.approx(7.5)
    parts = error_by_confidence(10 / confidence, confidence)
    assert parts == sorted(parts, reverse=True)


def test_relative_poses_compose(truth):
    cameras = truth.camera_from_world.double()
    relative = relative_poses(cameras).view(4, 3, 3, 4)  # pairs 01, 02, 12
    torch.testing.assert_close(relative[:, 1], cameras[:, 2])  # camera 0 is the reference
    composed = relative[:, 2, :, :3] @ relative[:, 0, :, 3:] + relative[:, 2, :, 3:]
    torch.testing.assert_close(composed, relative[:, 1, :, 3:])


def test_sift_recovers_the_motion_in_a_textured_room():
    poses = smooth_trajectory(3, 0, step=0.25)
    matrix = torch.tensor([[200.0, 0, 160], [0, 200, 120], [0, 0, 1]]).expand(3, 3, 3)
    images, _ = render(SyntheticScene.room(0), poses, matrix, 240, 320)
    errors = WindowErrors()
    poses_found = sift_relative_poses(images.permute(0, 3, 1, 2) / 255, matrix)
    errors.add_relative_poses(poses_found, invert_rigid(poses)[None, :, :3])
    found = errors.metrics()
    assert found['rotation_median_deg'] < 1 and found['translation_direction_median_deg'] < 5
    failed = sift_relative_poses(torch.zeros(2, 3, 56, 84), matrix)
    assert torch.equal(failed, torch.eye(4, dtype=torch.float64)[None, :3])


def test_mean_motion_is_a_mean():
    cameras = mean_motion(replace(DATASET, split='train', queries=0), 6, 3)
    assert cameras.shape == (1, 3, 3, 4)
    torch.testing.assert_close(cameras[0, 0], torch.eye(4)[:3])


def test_an_evaluation_has_every_metric():
    torch.manual_seed(0)
    network = VGGTNetwork(VGGT(VGGTConfig.tiny()), 'tiny', False, 'float32')
    metrics = evaluate_windows(network, DATASET, windows=5, frames=3, training_windows=4)
    assert json.loads(json.dumps(metrics)) == metrics
    cameras = {'auc5', 'auc10', 'auc30', 'rotation_median_deg', 'translation_direction_median_deg'}
    depth = {'absrel', 'delta1'}
    assert set(metrics['model']) >= cameras | depth | {'focal_error_percent', 'windows_per_second'}
    assert set(metrics['baselines']['constant_depth']) == depth
    for name in ('mean_motion', 'forward_motion', 'sift'):
        assert set(metrics['baselines'][name]) >= cameras, name
    assert len(metrics['model']['depth_error_by_confidence']) == 4
    table = window_table(metrics)
    assert all(name in table for name in (*cameras, *depth, 'sift', 'constant_depth'))
