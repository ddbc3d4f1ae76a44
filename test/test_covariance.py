# SPDX-License-Identifier: Apache-2.0
"""The covariance of the cameras says how large their errors really are."""

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
    """Give the updates of a map, the truth (S, 4, 4) from its first camera, and its unit in m."""
    way = SEQUENCES[name](FRAMES)
    world = sequences.sequence_world(way)
    images = np.broadcast_to(np.uint8(0), (FRAMES, 42, 56, 3))
    updates = sequences.map_sequence(TruthNetwork(world, NOISE, seed=seed), images)
    ratio = updates[0].reconstruction.depth[0] / world.depth(0, 42, 56)
    truth = way.world_from_camera.numpy()
    return updates, np.linalg.inv(truth[0]) @ truth, np.median(ratio)


def error_of(found, expected, unit):
    """Give x, y, z and the rotation about the fixed axes by which a camera is off."""
    turn = torch.from_numpy(found[:3, :3] @ expected[:3, :3].T)
    x, y, z, w = quaternion_from_matrix(turn).tolist()
    angle = 2 * math.atan2(math.hypot(x, y, z), w)
    axis = np.array([x, y, z]) / max(math.hypot(x, y, z), 1e-12)
    return np.concatenate([found[:3, 3] - unit * expected[:3, 3], angle * axis])


@pytest.mark.parametrize('name', ['corridor', 'loop'])
def test_errors_are_as_large_as_the_covariance_says(name):
    """The mean of e^T C^-1 e is 1 for each component, near the origin and far from it."""
    found = {'near': [], 'far': []}
    for seed in range(24):
        updates, truth, unit = map_with(name, seed)
        for where, update in (('near', updates[1]), ('far', updates[-1])):
            expected = truth[update.batch.ids[-1]]
            error = error_of(update.world_from_camera[-1], expected, unit)
            weighed = [
                error[part] @ np.linalg.solve(update.covariance[-1][part, part], error[part]) / 3
                for part in (slice(3), slice(3, 6))
            ]
            found[where].append(weighed)
    means = {where: np.mean(each, axis=0) for where, each in found.items()}
    for where, (place, turn) in means.items():
        assert 0.5 < place < 2 and 0.5 < turn < 2, (where, means)


def test_nothing_is_claimed_before_a_joint_has_told():
    updates, _, _ = map_with('loop', 0)
    assert updates[0].covariance is None
    sizes = [np.linalg.det(update.covariance[-1]) for update in updates[1:]]
    assert sizes[-1] > 4 * sizes[0] > 0
    assert all(np.linalg.eigvalsh(update.covariance[-1]).min() > 0 for update in updates[1:])


def test_less_confident_frames_and_unsure_scales_are_less_certain():
    updates, _, _ = map_with('loop', 0)
    known = PoseUncertainty().after(updates[1].registration, confidence=2.0)
    centres = np.array([[1.0, 0, 0], [1.0, 0, 0]])
    sure, unsure = known.covariance(centres, np.array([2.0, 1.0]), np.nan)
    assert (np.diag(unsure) > np.diag(sure)).all()
    scaled, _ = known.covariance(centres, np.array([2.0, 1.0]), 0.1)
    np.testing.assert_allclose(scaled - sure, np.diag([0.01, 0, 0, 0, 0, 0]), atol=1e-12)
