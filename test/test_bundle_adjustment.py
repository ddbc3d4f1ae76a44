# SPDX-License-Identifier: Apache-2.0
"""Tracks correct cameras, and leave them unchanged where they do not determine them."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip('pycolmap', reason='needs pycolmap')
import pycolmap

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import matrix_from_quaternion, rotation_angle
from vggt_ros.offline.bundle_adjustment import refine_cameras
from vggt_ros.offline.colmap_problem import ColmapProblem, SparseModel
from vggt_ros.offline.degeneracy import measure_parallax, triangulate
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks

HEIGHT, WIDTH, FOCAL = 392, 518, 400.0


def rotations(random: np.random.Generator, count: int, degrees: float) -> Array:
    """Rotations (count, 3, 3) by this angle about random axes."""
    axes = random.normal(size=(count, 3))
    axes *= math.sin(math.radians(degrees) / 2) / np.linalg.norm(axes, axis=1, keepdims=True)
    w = np.full((count, 1), math.cos(math.radians(degrees) / 2))
    return matrix_from_quaternion(torch.from_numpy(np.hstack([axes, w]))).numpy()


class World:
    """Points in front of a camera that passes them; it keeps looking at them unless turn is 0."""

    def __init__(
        self, frames: int = 8, count: int = 1200, step: float = 5.0, turn: float = 5.0
    ) -> None:
        self.random = np.random.default_rng(0)
        centre, start = np.array([1.0, 2.0, 9.5]), np.array([1.0, 2.0, 3.0])
        cameras = np.tile(np.eye(4), (frames, 1, 1))
        share = np.linspace(-0.5, 0.5, frames)
        path = np.stack([share, 0.2 * np.sin(9 * share), 0.2 * np.cos(7 * share)], -1)
        cameras[:, :3, 3] = start + step * path
        if turn:
            yaw = np.arctan2(*(centre - cameras[:, :3, 3])[:, [0, 2]].T)
            about_y = np.stack([0 * yaw, np.sin(yaw / 2), 0 * yaw, np.cos(yaw / 2)], -1)
            cameras[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(about_y)).numpy()
            cameras[:, :3, :3] @= rotations(self.random, frames, turn)
        matrix = np.array([[FOCAL, 0, WIDTH / 2], [0, 1.02 * FOCAL, HEIGHT / 2], [0, 0, 1]])
        points = centre + self.random.uniform(-1, 1, (count, 3)) * [3.5, 2.5, 2.5]
        self.truth = SparseModel(cameras, np.tile(matrix, (frames, 1, 1)), points)

    def see(self, noise: float = 1.0, outliers: float = 0.0, confidence: float = 0.9) -> Tracks:
        """Tracks with errors; outliers are the share of tracks that are random in each frame."""
        count, frames = len(self.truth.points), len(self.truth.world_from_camera)
        pixels = self.truth.residuals(np.zeros((frames, count, 2)))
        observed = ((pixels >= 0) & (pixels <= [WIDTH - 1, HEIGHT - 1])).all(-1)
        pixels = np.nan_to_num(pixels) + noise * self.random.normal(size=pixels.shape)
        wrong = self.random.random(count) < outliers
        random_pixels = self.random.uniform(0, [WIDTH, HEIGHT], pixels.shape)
        pixels[:, wrong] = random_pixels[:, wrong]
        return Tracks(pixels, observed, np.full(observed.shape, confidence))

    def disturb(self, degrees: float = 2.0, share: float = 0.05) -> Array:
        """Cameras rotated, and moved by a share of the path's extent; all but the first."""
        cameras = self.truth.world_from_camera.copy()
        extent = np.linalg.norm(np.ptp(cameras[:, :3, 3], axis=0)) or 1.0
        steps = self.random.normal(size=(len(cameras) - 1, 3))
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        cameras[1:, :3, :3] @= rotations(self.random, len(cameras) - 1, degrees)
        cameras[1:, :3, 3] += share * extent * steps
        return cameras

    def refine(
        self, cameras: Array, tracks: Tracks, focal: float = 1.0, **more: Any
    ) -> Refinement:
        intrinsics = self.truth.intrinsics.copy()
        intrinsics[:, [0, 1], [0, 1]] *= focal
        more.setdefault('camera_index', np.zeros(len(cameras), np.int64))
        result = refine_cameras(cameras, intrinsics, tracks=tracks, **more)
        print(result)
        return result

    def rotation_error(self, cameras: Array) -> float:
        """Mean angle to the truth, degrees, all relative to the first camera."""
        found, true = (
            each[0, :3, :3].T @ each[1:, :3, :3]
            for each in (cameras, self.truth.world_from_camera)
        )
        angles = rotation_angle(torch.from_numpy(found.transpose(0, 2, 1) @ true))
        return math.degrees(float(angles.mean()))

    def assert_refined(self, cameras: Array, result: Refinement) -> None:
        assert result.accepted, result.rejection_reason
        assert self.rotation_error(cameras) > 1.9
        assert self.rotation_error(result.world_from_camera) < 0.1
        assert result.rms_before > 5 and result.rms_after < 1.2
        assert result.held_out > 30 and result.held_out_after < 0.3 * result.held_out_before
        np.testing.assert_array_equal(result.world_from_camera[0], cameras[0])


def test_wrong_cameras_are_corrected() -> None:
    world = World()
    cameras = world.disturb()
    result = world.refine(cameras, world.see())
    world.assert_refined(cameras, result)
    assert result.tracks > 1000 and not result.focal_refined
    centres = result.world_from_camera[:, :3, 3] - cameras[0, :3, 3]
    true = world.truth.world_from_camera[:, :3, 3] - cameras[0, :3, 3]
    scale = (centres * true).sum() / (true * true).sum()
    assert np.abs(centres - scale * true).max() < 0.03  # of 5 m
    assert scale == pytest.approx(1, abs=0.1)


def test_the_focal_length_is_refined_where_the_camera_rotates() -> None:
    world = World()
    cameras = world.disturb()
    result = world.refine(cameras, world.see(), focal=1.05)
    world.assert_refined(cameras, result)
    assert result.focal_refined
    np.testing.assert_allclose(
        result.intrinsics[:, [0, 1], [0, 1]], [[FOCAL, 1.02 * FOCAL]] * 8, rtol=0.01
    )
    np.testing.assert_array_equal(result.intrinsics[:, 0, 2], world.truth.intrinsics[:, 0, 2])


def test_a_camera_that_does_not_rotate_keeps_its_focal_length() -> None:
    world = World(turn=0)
    result = world.refine(world.disturb(), world.see())
    assert result.accepted and not result.focal_refined
    np.testing.assert_array_equal(result.intrinsics, world.truth.intrinsics)


def test_frames_of_one_camera_share_their_intrinsics() -> None:
    world = World()
    world.truth.intrinsics[1::2, :2, :2] *= 0.9
    tracks = world.see()
    index = np.array([0, 7] * 4)
    result = world.refine(world.disturb(), tracks, focal=1.05, camera_index=index)
    assert result.accepted and result.focal_refined
    focal = result.intrinsics[:, 0, 0]
    assert np.ptp(focal[::2]) == np.ptp(focal[1::2]) == 0
    np.testing.assert_allclose(focal[:2], [FOCAL, 0.9 * FOCAL], rtol=0.015)


@pytest.mark.parametrize('share', [0.1, 0.2])
def test_wrong_tracks_are_outliers(share: float) -> None:
    world = World()
    cameras, tracks = world.disturb(), world.see(outliers=share)
    result = world.refine(cameras, tracks)
    world.assert_refined(cameras, result)
    far_off = world.truth.errors(tracks.pixels) > 10
    assert (far_off & tracks.observed).sum() > 0.7 * share * tracks.observed.sum()
    assert result.inliers[far_off].mean() < 0.02
    assert result.inliers[tracks.observed & ~far_off].mean() > 0.8  # the others are held out


def test_the_scale_of_given_points_is_kept() -> None:
    world = World()
    cameras, tracks = world.disturb(), world.see()
    cameras[:, :3, 3] = cameras[0, :3, 3] + 10 * (cameras[:, :3, 3] - cameras[0, :3, 3])
    origin = cameras[0, :3, 3]
    points = origin + 10 * (world.truth.points - origin)
    points *= 1 + 0.05 * world.random.normal(size=(len(points), 1))
    points[::7] = np.nan
    result = world.refine(cameras, tracks, points=points)
    assert result.accepted
    lengths = [
        np.linalg.norm(np.diff(each[:, :3, 3], axis=0), axis=-1).sum()
        for each in (result.world_from_camera, world.truth.world_from_camera)
    ]
    assert lengths[0] / lengths[1] == pytest.approx(10, rel=0.1)
    assert np.isfinite(result.points[result.inliers.any(0)]).all()


@pytest.mark.parametrize('noise', [0.0, 1.0])
def test_noise_does_not_move_correct_cameras(noise: float) -> None:
    world = World()
    cameras = world.disturb(0, 0)
    result = world.refine(cameras, world.see(noise))
    if noise:
        assert 'no improvement' in result.rejection_reason
    assert np.abs(result.world_from_camera - cameras).max() < 1e-6


def test_two_frames_are_refined_without_held_out_observations() -> None:
    world = World(frames=2, step=1.5)
    cameras = world.disturb()
    result = world.refine(cameras, world.see(0.5))
    assert result.accepted and result.held_out == 0 and not result.focal_refined
    assert world.rotation_error(result.world_from_camera) < 0.5 * world.rotation_error(cameras)


def rejected(world: World, tracks: Tracks, **more: Any) -> str:
    """Refine, and expect the given cameras and a reason."""
    cameras = world.disturb()
    result = world.refine(cameras, tracks, **more)
    assert not result.accepted
    np.testing.assert_array_equal(result.world_from_camera, cameras)
    np.testing.assert_array_equal(result.intrinsics, world.truth.intrinsics)
    return result.rejection_reason


@pytest.mark.parametrize('turn', [0.0, 8.0], ids=['stationary', 'rotating'])
@pytest.mark.parametrize('noise', [0.0, 1.0, 2.0])
def test_cameras_without_translation_are_rejected(turn: float, noise: float) -> None:
    world = World(step=0, turn=turn)
    assert 'parallax' in rejected(world, world.see(noise))
    assert 'parallax' in rejected(world, world.see(noise), points=world.truth.points)


def test_parallax_excludes_rotation() -> None:
    intrinsics = World().truth.intrinsics
    found = []
    for step in (0.0, 1.0, 2.0):
        tracks = World(step=step).see(noise=0, outliers=0.2)
        found.append(measure_parallax(tracks.pixels, intrinsics, tracks.observed, 10))
    assert found[0] < 1e-6 and found[1] > 2 and found[2] > 1.5 * found[1]


def test_too_few_tracks_are_rejected() -> None:
    world = World(count=3)
    assert rejected(world, world.see()).startswith('3 tracks have two observations or more, 20')


def test_a_frame_with_too_few_tracks_is_rejected() -> None:
    world, tracks = World(), World().see()
    tracks.observed[5, 9:] = False
    assert 'frame 5 shares' in rejected(world, tracks)


def test_frames_that_share_no_tracks_with_the_first_are_rejected() -> None:
    world, tracks = World(), World().see()
    tracks.observed[4:, ::2] = tracks.observed[:4, 1::2] = False
    assert 'frames [4, 5, 6, 7] share' in rejected(world, tracks)


def test_low_confidence_is_rejected() -> None:
    world = World()
    assert 'the median is 0.30' in rejected(world, world.see(confidence=0.3))
    assert world.refine(
        world.disturb(), world.see(confidence=0.3), criteria=Criteria(min_confidence=0.2)
    ).accepted


def test_collinear_points_are_rejected() -> None:
    world = World()
    along = np.linspace(-1, 1, len(world.truth.points))[:, None]
    world.truth.points[:] = [1, 2, 9] + along * [3, 0.2, 0.5]
    assert 'collinear' in rejected(world, world.see())


@pytest.mark.parametrize('frames', [2, 3, 8])
def test_random_tracks_are_rejected(frames: int) -> None:
    world = World(frames=frames)
    assert 'inconsistent' in rejected(world, world.see(outliers=1.0))


def test_a_frame_whose_tracks_are_all_wrong_is_rejected() -> None:
    world, tracks = World(), World().see()
    tracks.pixels[3] = world.random.uniform(0, [WIDTH, HEIGHT], tracks.pixels[3].shape)
    assert rejected(world, tracks)


def test_the_first_camera_is_constant() -> None:
    world = World()
    start = SparseModel(world.disturb(), world.truth.intrinsics, world.truth.points)
    tracks = world.see()
    problem = ColmapProblem(tracks.pixels, np.zeros(8, np.int64))
    used = tracks.observed & (tracks.observed.sum(0) >= 2)
    found = problem.solve(start, used, loss=20, cameras=True, focal=False)
    moved = np.abs(found.world_from_camera - start.world_from_camera).max((1, 2))
    assert moved[0] < 1e-12 and (moved[1:] > 0.01).all()


def test_cameras_given_in_one_position_are_corrected() -> None:
    world = World()
    cameras = np.tile(world.truth.world_from_camera[:1], (8, 1, 1))
    result = world.refine(cameras, world.see(), points=world.truth.points)
    assert result.accepted and result.rms_after < 1.2
    assert world.rotation_error(result.world_from_camera) < 0.2


def test_triangulation_recovers_the_points() -> None:
    world = World()
    tracks = world.see(noise=0)
    tracks.observed[:, 0] = False
    tracks.observed[1:, 1] = False
    points = triangulate(
        world.truth.world_from_camera, world.truth.intrinsics, tracks.pixels, tracks.observed
    )
    seen = tracks.observed.sum(0) >= 2
    np.testing.assert_allclose(points[seen], world.truth.points[seen], atol=1e-6)
    assert np.isnan(points[~seen]).all() and not seen[:2].any()


def test_pycolmap_logs_nothing_and_its_level_is_restored(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = pycolmap.logging.minloglevel
    world = World(frames=3)
    index = np.zeros(3, np.int64)
    refine_cameras(world.disturb(), world.truth.intrinsics, index, world.see(outliers=1.0))
    assert capfd.readouterr() == ('', '')
    assert pycolmap.logging.minloglevel == before


def test_wrong_shapes_are_named() -> None:
    world = World()
    tracks, cameras = world.see(), world.truth.world_from_camera
    index = np.zeros(8, np.int64)
    with pytest.raises(ValueError, match=r'intrinsics is \(7, 3, 3\).*\(8, 3, 3\)'):
        refine_cameras(cameras, world.truth.intrinsics[1:], index, tracks)
    with pytest.raises(ValueError, match='world_from_camera has values that are not finite'):
        refine_cameras(cameras * np.nan, world.truth.intrinsics, index, tracks)
    with pytest.raises(ValueError, match='camera_index has -1'):
        refine_cameras(cameras, world.truth.intrinsics, index - 1, tracks)
    with pytest.raises(ValueError, match=r'tracks are .*expected \(S, K, 2\)'):
        Tracks(tracks.pixels[:3], tracks.observed, tracks.confidence)
    with pytest.raises(ValueError, match='observed pixel is not finite'):
        Tracks(tracks.pixels * np.nan, tracks.observed, tracks.confidence)


def test_the_error_without_pycolmap_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setitem(sys.modules, 'pycolmap', None)
    with pytest.raises(ValueError, match=r'needs pycolmap.*pip install pycolmap'):
        world.refine(world.disturb(), world.see())
