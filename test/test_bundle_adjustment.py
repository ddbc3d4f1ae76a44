# SPDX-License-Identifier: Apache-2.0
"""Cameras that are off are brought back by tracks, and stay where tracks cannot tell."""

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
from vggt_ros.offline.bundle_adjustment import refine
from vggt_ros.offline.colmap_problem import ColmapProblem, View
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks
from vggt_ros.offline.triangulation import triangulate
from vggt_ros.offline.weakness import measure_parallax

HEIGHT, WIDTH, FOCAL = 392, 518, 400.0


def turns(random: np.random.Generator, count: int, degrees: float) -> Array:
    """Rotations (count, 3, 3) by this angle about axes drawn by chance."""
    axes = random.normal(size=(count, 3))
    axes *= math.sin(math.radians(degrees) / 2) / np.linalg.norm(axes, axis=1, keepdims=True)
    w = np.full((count, 1), math.cos(math.radians(degrees) / 2))
    return matrix_from_quaternion(torch.from_numpy(np.hstack([axes, w]))).numpy()


class World:
    """Points before a camera that walks by and keeps looking at them, unless turn is 0."""

    def __init__(
        self, frames: int = 8, count: int = 1200, step: float = 5.0, turn: float = 5.0
    ) -> None:
        self.random = np.random.default_rng(0)
        middle, start = np.array([1.0, 2.0, 9.5]), np.array([1.0, 2.0, 3.0])
        cameras = np.tile(np.eye(4), (frames, 1, 1))
        share = np.linspace(-0.5, 0.5, frames)
        way = np.stack([share, 0.2 * np.sin(9 * share), 0.2 * np.cos(7 * share)], -1)
        cameras[:, :3, 3] = start + step * way
        if turn:
            yaw = np.arctan2(*(middle - cameras[:, :3, 3])[:, [0, 2]].T)
            about_y = np.stack([0 * yaw, np.sin(yaw / 2), 0 * yaw, np.cos(yaw / 2)], -1)
            cameras[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(about_y)).numpy()
            cameras[:, :3, :3] @= turns(self.random, frames, turn)
        matrix = np.array([[FOCAL, 0, WIDTH / 2], [0, 1.02 * FOCAL, HEIGHT / 2], [0, 0, 1]])
        points = middle + self.random.uniform(-1, 1, (count, 3)) * [3.5, 2.5, 2.5]
        self.truth = View(cameras, np.tile(matrix, (frames, 1, 1)), points)

    def see(self, noise: float = 1.0, outliers: float = 0.0, confidence: float = 0.9) -> Tracks:
        """Tracks with errors; outliers are the share of tracks that are anywhere in each frame."""
        count, frames = len(self.truth.points), len(self.truth.world_from_camera)
        pixels = self.truth.errors(np.zeros((frames, count, 2)))
        observed = ((pixels >= 0) & (pixels <= [WIDTH - 1, HEIGHT - 1])).all(-1)
        pixels = np.nan_to_num(pixels) + noise * self.random.normal(size=pixels.shape)
        wrong = self.random.random(count) < outliers
        anywhere = self.random.uniform(0, [WIDTH, HEIGHT], pixels.shape)
        pixels[:, wrong] = anywhere[:, wrong]
        return Tracks(pixels, observed, np.full(observed.shape, confidence))

    def disturb(self, degrees: float = 2.0, share: float = 0.05) -> Array:
        """Cameras that are turned, and moved by a share of the way; all but the first."""
        cameras = self.truth.world_from_camera.copy()
        extent = np.linalg.norm(np.ptp(cameras[:, :3, 3], axis=0)) or 1.0
        steps = self.random.normal(size=(len(cameras) - 1, 3))
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        cameras[1:, :3, :3] @= turns(self.random, len(cameras) - 1, degrees)
        cameras[1:, :3, 3] += share * extent * steps
        return cameras

    def refine(
        self, cameras: Array, tracks: Tracks, focal: float = 1.0, **more: Any
    ) -> Refinement:
        intrinsics = self.truth.intrinsics.copy()
        intrinsics[:, [0, 1], [0, 1]] *= focal
        more.setdefault('camera_index', np.zeros(len(cameras), np.int64))
        result = refine(cameras, intrinsics, tracks=tracks, **more)
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
        assert result.accepted, result.why_not
        assert self.rotation_error(cameras) > 1.9
        assert self.rotation_error(result.world_from_camera) < 0.1
        assert result.rms_before > 5 and result.rms_after < 1.2
        assert result.judges > 30 and result.foretold_after < 0.3 * result.foretold_before
        np.testing.assert_array_equal(result.world_from_camera[0], cameras[0])


def test_cameras_that_are_off_are_brought_back() -> None:
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


def test_the_focal_length_is_found_where_the_camera_turns() -> None:
    world = World()
    cameras = world.disturb()
    result = world.refine(cameras, world.see(), focal=1.05)
    world.assert_refined(cameras, result)
    assert result.focal_refined
    np.testing.assert_allclose(
        result.intrinsics[:, [0, 1], [0, 1]], [[FOCAL, 1.02 * FOCAL]] * 8, rtol=0.01
    )
    np.testing.assert_array_equal(result.intrinsics[:, 0, 2], world.truth.intrinsics[:, 0, 2])


def test_a_camera_that_does_not_turn_says_nothing_of_its_focal_length() -> None:
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
def test_tracks_that_are_wrong_are_left_out(share: float) -> None:
    world = World()
    cameras, tracks = world.disturb(), world.see(outliers=share)
    result = world.refine(cameras, tracks)
    world.assert_refined(cameras, result)
    far_off = np.linalg.norm(world.truth.errors(tracks.pixels), axis=-1) > 10
    assert (far_off & tracks.observed).sum() > 0.7 * share * tracks.observed.sum()
    assert result.kept[far_off].mean() < 0.02
    assert result.kept[tracks.observed & ~far_off].mean() > 0.8  # the judges are not kept


def test_the_unit_of_given_points_is_kept() -> None:
    world = World()
    cameras, tracks = world.disturb(), world.see()
    cameras[:, :3, 3] = cameras[0, :3, 3] + 10 * (cameras[:, :3, 3] - cameras[0, :3, 3])
    origin = cameras[0, :3, 3]
    points = origin + 10 * (world.truth.points - origin)
    points *= 1 + 0.05 * world.random.normal(size=(len(points), 1))
    points[::7] = np.nan
    result = world.refine(cameras, tracks, points=points)
    assert result.accepted
    ways = [
        np.linalg.norm(np.diff(each[:, :3, 3], axis=0), axis=-1).sum()
        for each in (result.world_from_camera, world.truth.world_from_camera)
    ]
    assert ways[0] / ways[1] == pytest.approx(10, rel=0.1)
    assert np.isfinite(result.points[result.kept.any(0)]).all()


@pytest.mark.parametrize('noise', [0.0, 1.0])
def test_right_cameras_are_not_moved_by_noise(noise: float) -> None:
    world = World()
    cameras = world.disturb(0, 0)
    result = world.refine(cameras, world.see(noise))
    if noise:
        assert 'foretells no better' in result.why_not
    assert np.abs(result.world_from_camera - cameras).max() < 1e-6


def test_two_frames_are_refined_though_nothing_can_judge() -> None:
    world = World(frames=2, step=1.5)
    cameras = world.disturb()
    result = world.refine(cameras, world.see(0.5))
    assert result.accepted and result.judges == 0 and not result.focal_refined
    assert world.rotation_error(result.world_from_camera) < 0.5 * world.rotation_error(cameras)


def refused(world: World, tracks: Tracks, **more: Any) -> str:
    """Refine in vain; what went in comes out, and the reason is said."""
    cameras = world.disturb()
    result = world.refine(cameras, tracks, **more)
    assert not result.accepted
    np.testing.assert_array_equal(result.world_from_camera, cameras)
    np.testing.assert_array_equal(result.intrinsics, world.truth.intrinsics)
    return result.why_not


@pytest.mark.parametrize('turn', [0.0, 8.0], ids=['standing still', 'turning on the spot'])
@pytest.mark.parametrize('noise', [0.0, 1.0, 2.0])
def test_cameras_in_one_place_are_refused(turn: float, noise: float) -> None:
    world = World(step=0, turn=turn)
    assert 'parallax' in refused(world, world.see(noise))
    assert 'parallax' in refused(world, world.see(noise), points=world.truth.points)


def test_parallax_is_what_a_rotation_leaves() -> None:
    intrinsics = World().truth.intrinsics
    found = []
    for step in (0.0, 1.0, 2.0):
        tracks = World(step=step).see(noise=0, outliers=0.2)
        found.append(measure_parallax(tracks.pixels, intrinsics, tracks.observed, 10))
    assert found[0] < 1e-6 and found[1] > 2 and found[2] > 1.5 * found[1]


def test_too_few_tracks_are_refused() -> None:
    world = World(count=3)
    assert refused(world, world.see()).startswith('3 tracks are seen in two frames or more, 20')


def test_a_frame_that_sees_too_little_is_refused() -> None:
    world, tracks = World(), World().see()
    tracks.observed[5, 9:] = False
    assert 'frame 5 sees' in refused(world, tracks)


def test_frames_that_share_no_tracks_with_the_first_are_refused() -> None:
    world, tracks = World(), World().see()
    tracks.observed[4:, ::2] = tracks.observed[:4, 1::2] = False
    assert 'frames [4, 5, 6, 7] share' in refused(world, tracks)


def test_weak_confidence_is_refused() -> None:
    world = World()
    assert 'the median of all is 0.30' in refused(world, world.see(confidence=0.3))
    assert world.refine(
        world.disturb(), world.see(confidence=0.3), criteria=Criteria(min_confidence=0.2)
    ).accepted


def test_points_on_a_line_are_refused() -> None:
    world = World()
    along = np.linspace(-1, 1, len(world.truth.points))[:, None]
    world.truth.points[:] = [1, 2, 9] + along * [3, 0.2, 0.5]
    assert 'on one line' in refused(world, world.see())


@pytest.mark.parametrize('frames', [2, 3, 8])
def test_tracks_by_chance_are_refused(frames: int) -> None:
    world = World(frames=frames)
    assert 'contradict each other' in refused(world, world.see(outliers=1.0))


def test_a_frame_whose_tracks_are_all_wrong_is_refused() -> None:
    world, tracks = World(), World().see()
    tracks.pixels[3] = world.random.uniform(0, [WIDTH, HEIGHT], tracks.pixels[3].shape)
    assert refused(world, tracks)


def test_the_first_camera_stays_while_the_others_move() -> None:
    world = World()
    start = View(world.disturb(), world.truth.intrinsics, world.truth.points)
    tracks = world.see()
    problem = ColmapProblem(tracks.pixels, np.zeros(8, np.int64))
    used = tracks.observed & (tracks.observed.sum(0) >= 2)
    found = problem.solve(start, used, loss=20, cameras=True, focal=False)
    moved = np.abs(found.world_from_camera - start.world_from_camera).max((1, 2))
    assert moved[0] < 1e-12 and (moved[1:] > 0.01).all()


def test_cameras_that_are_said_to_be_in_one_place_are_pulled_apart() -> None:
    world = World()
    cameras = np.tile(world.truth.world_from_camera[:1], (8, 1, 1))
    result = world.refine(cameras, world.see(), points=world.truth.points)
    assert result.accepted and result.rms_after < 1.2
    assert world.rotation_error(result.world_from_camera) < 0.2


def test_rays_meet_in_the_point_that_they_came_from() -> None:
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


def test_pycolmap_is_quiet_and_its_logging_is_left_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = pycolmap.logging.minloglevel
    world = World(frames=3)
    refine(world.disturb(), world.truth.intrinsics, np.zeros(3, np.int64), world.see(outliers=1.0))
    assert capfd.readouterr() == ('', '')
    assert pycolmap.logging.minloglevel == before


def test_arrays_that_do_not_fit_are_named() -> None:
    world = World()
    tracks, cameras = world.see(), world.truth.world_from_camera
    index = np.zeros(8, np.int64)
    with pytest.raises(ValueError, match=r'intrinsics is \(7, 3, 3\).*\(8, 3, 3\)'):
        refine(cameras, world.truth.intrinsics[1:], index, tracks)
    with pytest.raises(ValueError, match='world_from_camera has values that are not finite'):
        refine(cameras * np.nan, world.truth.intrinsics, index, tracks)
    with pytest.raises(ValueError, match='camera_index has -1'):
        refine(cameras, world.truth.intrinsics, index - 1, tracks)
    with pytest.raises(ValueError, match=r'tracks are .*expected \(S, K, 2\)'):
        Tracks(tracks.pixels[:3], tracks.observed, tracks.confidence)
    with pytest.raises(ValueError, match='observed pixel is not finite'):
        Tracks(tracks.pixels * np.nan, tracks.observed, tracks.confidence)


def test_without_pycolmap_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setitem(sys.modules, 'pycolmap', None)
    with pytest.raises(ValueError, match=r'needs pycolmap.*pip install pycolmap'):
        world.refine(world.disturb(), world.see())
