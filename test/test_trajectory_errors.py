# SPDX-License-Identifier: Apache-2.0
"""Trajectory errors: invariant to frame and scale, of the size of the perturbation."""

import math

import numpy as np
import pytest

from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.lab.evaluation.trajectory_errors import compare_trajectories, fit_sim3


def rotation_about(axis, angle):
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def random_trajectory(rng, frames=12):
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, :3, 3] = np.cumsum(rng.normal(size=(frames, 3)), axis=0)
    for pose in poses:
        pose[:3, :3] = rotation_about(rng.normal(size=3), rng.uniform(0, 3))
    return poses


def test_the_fit_recovers_any_similarity():
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 40.0):
        expected = Sim3(scale, rotation_about(rng.normal(size=3), 2.5), rng.normal(size=3) * 5)
        points = rng.normal(size=(20, 3))
        found = fit_sim3(expected.apply(points), points)
        assert np.allclose(found.matrix(), expected.matrix(), atol=1e-9 * scale + 1e-9)


def test_the_fit_of_a_planar_trajectory_is_a_rotation_and_not_a_reflection():
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(10, 3)) * [1, 1, 0]
    found = fit_sim3(flat * [1, -1, 1], flat)  # a rotation by 180 degrees about x
    assert np.isclose(np.linalg.det(found.rotation), 1)
    assert np.allclose(found.apply(flat), flat * [1, -1, 1])


def test_an_exact_trajectory_in_another_frame_and_scale_has_no_error():
    rng = np.random.default_rng(2)
    truth = random_trajectory(rng)
    estimate = Sim3(0.3, rotation_about([1, 2, 3], 1.0), np.array([4.0, 5, 6])).transform_poses(
        truth
    )
    errors = compare_trajectories(truth, estimate)
    assert errors.position_rms < 1e-9
    assert errors.rotation_median < 1e-6
    steps = np.diff(truth[:, :3, 3], axis=0)
    assert np.isclose(errors.length, np.linalg.norm(steps, axis=1).sum())


def test_errors_have_the_size_of_the_perturbation():
    rng = np.random.default_rng(3)
    truth = random_trajectory(rng, frames=400)
    estimate = truth.copy()
    rotations = np.stack([rotation_about(axis, 0.1) for axis in rng.normal(size=(400, 3))])
    estimate[:, :3, :3] = truth[:, :3, :3] @ rotations
    estimate[:, :3, 3] += rng.normal(size=(400, 3)) * 0.2
    errors = compare_trajectories(truth, estimate)
    assert errors.rotation_median == pytest.approx(0.1, rel=0.1)
    assert errors.position_rms == pytest.approx(0.2 * math.sqrt(3), rel=0.1)
    assert errors.position_percent == pytest.approx(100 * errors.position_rms / errors.length)


@pytest.mark.parametrize('points', [np.ones((5, 3)), np.ones((2, 3)), np.full((4, 3), np.nan)])
def test_points_that_do_not_determine_a_scale_are_rejected(points):
    with pytest.raises((ValueError, np.linalg.LinAlgError)):
        fit_sim3(np.random.default_rng(0).normal(size=points.shape), points)
