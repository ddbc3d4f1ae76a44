# SPDX-License-Identifier: Apache-2.0
"""The covariance of the cameras agrees with their true errors."""

import math

import numpy as np
import pytest
import torch

from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.lab.evaluation import sequences
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.mapping.covariance import PoseUncertainty

FRAMES = 40
NOISE = PredictionNoise(depth=0.01, rotation=math.radians(0.3), translation=0.01)


def map_with(name, seed):
    """Return updates of a map, the true poses (S, 4, 4) in its first camera, map units in 1 m."""
    sequence = SEQUENCES[name](FRAMES)
    world = sequences.sequence_world(sequence)
    images = np.broadcast_to(np.uint8(0), (FRAMES, 42, 56, 3))
    updates = sequences.map_sequence(TruthNetwork(world, NOISE, seed=seed), images)
    ratio = updates[0].reconstruction.depth[0] / world.depth(0, 42, 56)
    truth = sequence.world_from_camera.numpy()
    return updates, np.linalg.inv(truth[0]) @ truth, np.median(ratio)


def pose_error(estimate, truth, scale):
    """Return the error (6,) of a pose: x, y, z, and the rotation vector about fixed axes."""
    rotation = torch.from_numpy(estimate[:3, :3] @ truth[:3, :3].T)
    x, y, z, w = quaternion_from_matrix(rotation).tolist()
    angle = 2 * math.atan2(math.hypot(x, y, z), w)
    axis = np.array([x, y, z]) / max(math.hypot(x, y, z), 1e-12)
    return np.concatenate([estimate[:3, 3] - scale * truth[:3, 3], angle * axis])


@pytest.mark.parametrize('name', ['corridor', 'loop'])
def test_normalised_errors_agree_with_the_covariance(name):
    """The mean of e^T C^-1 e is 1 for each component, near the origin and far from it."""
    normalised = {'near': [], 'far': []}
    for seed in range(24):
        updates, truth, scale = map_with(name, seed)
        for where, update in (('near', updates[1]), ('far', updates[-1])):
            true_pose = truth[update.batch.ids[-1]]
            error = pose_error(update.world_from_camera[-1], true_pose, scale)
            squares = [
                error[part] @ np.linalg.solve(update.covariance[-1][part, part], error[part]) / 3
                for part in (slice(3), slice(3, 6))
            ]
            normalised[where].append(squares)
    means = {where: np.mean(squares, axis=0) for where, squares in normalised.items()}
    for where, (position, rotation) in means.items():
        assert 0.5 < position < 2 and 0.5 < rotation < 2, (where, means)


def test_the_covariance_is_unknown_before_the_first_registration():
    updates, _, _ = map_with('loop', 0)
    assert updates[0].covariance is None
    determinants = [np.linalg.det(update.covariance[-1]) for update in updates[1:]]
    assert determinants[-1] > 4 * determinants[0] > 0
    assert all(np.linalg.eigvalsh(update.covariance[-1]).min() > 0 for update in updates[1:])


def test_low_confidence_and_an_uncertain_scale_increase_the_covariance():
    updates, _, _ = map_with('loop', 0)
    uncertainty = PoseUncertainty().after(updates[1].registration, confidence=2.0)
    centres = np.array([[1.0, 0, 0], [1.0, 0, 0]])
    high, low = uncertainty.covariance(centres, np.array([2.0, 1.0]), np.nan)
    assert (np.diag(low) > np.diag(high)).all()
    scaled, _ = uncertainty.covariance(centres, np.array([2.0, 1.0]), 0.1)
    np.testing.assert_allclose(scaled - high, np.diag([0.01, 0, 0, 0, 0, 0]), atol=1e-12)
