# SPDX-License-Identifier: Apache-2.0
"""Long ways through many windows: how far the map drifts when every window errs a little.

What noise allows: the turn between two windows is known from four shared cameras, each seen twice
with 0.3 degrees, so to 0.3 * sqrt(2 / 4) = 0.21 degrees; over 124 joints a random walk ends
0.21 * sqrt(124) = 2.4 degrees off, and is off by 1 degree on average after one rotation is fitted
to all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from fake_network import Errors, Failure, FakeNetwork, World

from vggt_ros.engine import StreamingEngine
from vggt_ros.evaluation.naive_join import join_by_centres
from vggt_ros.evaluation.trajectory import compare_orientations, compare_paths
from vggt_ros.frames import Frame
from vggt_ros.reconstruct import PredictionError
from vggt_ros.scene_map import MapUpdate
from vggt_ros.settings import Settings
from vggt_ros.synthetic.sequences import SEQUENCES

FRAMES, HEIGHT, WIDTH = 500, 28, 42
STEP_NS = 50_000_000
NOISE = Errors(depth=0.01, rotation=math.radians(0.3), translation=0.01)


def world_of(name: str) -> World:
    """Put the origin into the middle of the room, where the fake wants it."""
    sequence = SEQUENCES[name](FRAMES)
    poses = sequence.world_from_camera.numpy().copy()
    poses[:, 2, 3] -= sequence.half_room[2]
    return World(np.array(sequence.half_room), lambda stamps: poses[np.array(stamps) // STEP_NS])


@dataclass
class Run:
    """A whole way and what became of it."""

    updates: list[MapUpdate]
    truth: np.ndarray  # (S, 4, 4)
    estimate: np.ndarray  # (S, 4, 4), of the same frames
    scales: np.ndarray  # (W,), map units per metre in each window


@functools.cache
def run(name: str, errors: Errors | None = None, frames: int = FRAMES) -> Run:
    """Send the first frames of a sequence through an engine; tests share what comes out."""
    world = world_of(name)
    settings = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
    streaming = StreamingEngine(settings, FakeNetwork(0, WIDTH, world, errors))
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = (streaming.add(Frame(picture, i * STEP_NS, 'camera')) for i in range(frames))
    updates = [update for update in added if update is not None]
    assert {update.map_id for update in updates} == {0}
    poses, stamps, scales = [], [], []
    for update in updates:
        new = np.flatnonzero(update.is_new)
        poses.append(update.map_from_camera[new])
        stamps += [update.batch.frames[i].stamp_ns for i in new]
        newest = update.batch.frames[-1].stamp_ns
        scales.append(np.nanmedian(update.depth(-1) / world.depth(newest, HEIGHT, WIDTH)))
    return Run(updates, world.cameras(stamps), np.concatenate(poses), np.array(scales))


def drift(found: Run) -> float:
    return float(np.abs(found.scales / found.scales[0] - 1).max())


@pytest.mark.parametrize('name', SEQUENCES)
def test_without_noise_the_map_is_exact(name: str) -> None:
    found = run(name, frames=100)
    assert len(found.updates) == 24 and len(found.estimate) == 100
    assert np.degrees(compare_orientations(found.truth, found.estimate).max()) < 0.01
    assert drift(found) < 1e-4
    if name == 'pure_rotation':
        assert np.linalg.norm(found.estimate[:, :3, 3], axis=1).max() < 1e-4
    else:
        errors = compare_paths(found.truth, found.estimate)
        assert errors.position_rms < 1e-4 * errors.length


@pytest.mark.parametrize('name', SEQUENCES)
def test_noise_makes_the_map_drift_no_more_than_it_must(name: str) -> None:
    found = run(name, NOISE)
    turned = np.degrees(compare_orientations(found.truth, found.estimate).mean())
    print(f'{name}: rotation {turned:.2f} degrees, scale {100 * drift(found):.2f} %')
    assert turned <= 2.5
    assert drift(found) <= 0.02
    if name != 'pure_rotation':
        errors = compare_paths(found.truth, found.estimate)
        print(f'{name}: position {errors.position_percent:.2f} % of {errors.length:.1f} m')
        assert errors.position_percent <= 1.5


def test_a_straight_line_is_joined_better_than_by_camera_centres() -> None:
    found = run('corridor', NOISE)
    naive = join_by_centres([(u.batch.ids, u.reconstruction) for u in found.updates])
    by_centres = np.stack([naive[number] for number in sorted(naive)])
    ours = compare_paths(found.truth, found.estimate)
    theirs = compare_paths(found.truth, by_centres)
    print(f'position {ours.position_percent:.2f} against {theirs.position_percent:.2f} %')
    assert 3 * ours.position_rms < theirs.position_rms
    assert 3 * ours.rotation_mean < theirs.rotation_mean


@pytest.mark.parametrize(('name', 'held'), [('pure_rotation', True), ('corridor', False)])
def test_depth_that_contradicts_itself_tells_no_scale_without_motion(
    name: str, held: bool
) -> None:
    settings = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
    network = FakeNetwork(0, WIDTH, world_of(name), Errors(depth=0.15))
    streaming = StreamingEngine(settings, network)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = (streaming.add(Frame(picture, i * STEP_NS, 'camera')) for i in range(12))
    first, second = (update for update in added if update is not None)
    assert (first.alignment.scale_held, second.alignment.scale_held) == (False, held)
    assert streaming.counts.get('held_scales', 0) == held
    # The unit of this network is another one in each window, so what is held misses the map.
    assert second.map_started_because.startswith('points of the shared frames differ') == held


def test_one_wrong_camera_does_not_bend_the_map() -> None:
    class OneWrongCamera(FakeNetwork):
        def _err_in_poses(self, cameras: np.ndarray, generator: np.random.Generator) -> np.ndarray:
            moved = super()._err_in_poses(cameras, generator)
            angle = math.radians(20)
            roll = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            moved[-2, :3, :2] = moved[-2, :3, :2] @ roll
            return moved

    world = world_of('corridor')
    settings = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
    streaming = StreamingEngine(settings, OneWrongCamera(0, WIDTH, world, NOISE))
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = [streaming.add(Frame(picture, i * STEP_NS, 'camera')) for i in range(12)]
    update = added[-1]
    assert update is not None and update.window_id == 1
    # The plain mean of four rotations would be off by 20 / 4 degrees.
    newest = [frame.stamp_ns for frame in update.batch.frames]
    wrong = compare_orientations(
        np.concatenate([world.cameras([0]), world.cameras(newest[-1:])]),
        np.stack([np.eye(4), update.map_from_camera[-1]]),
    )
    assert np.degrees(2 * wrong[0]) < 3


def test_a_lost_window_is_a_declared_break_and_no_false_join() -> None:
    world = world_of('corridor')
    settings = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
    streaming = StreamingEngine(settings, FakeNetwork(0, WIDTH, world))
    updates: list[MapUpdate] = []
    lost = 0
    for i in range(40):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        if i == 19:  # the newest frame of the fourth window
            picture[0, 0, 0] = Failure.NAN
        try:
            update = streaming.add(Frame(picture, i * STEP_NS, 'camera'))
        except PredictionError:
            lost += 1
            continue
        if update is not None:
            updates.append(update)
    assert lost == 1
    assert [update.map_id for update in updates] == [0] * 3 + [1] * 5
    assert updates[3].map_started_because == 'no frame is shared with the map'
    np.testing.assert_array_equal(updates[3].map_from_camera[0], np.eye(4))
    for number in (0, 1):
        mine = [update for update in updates if update.map_id == number]
        stamps = [frame.stamp_ns for update in mine for frame in update.batch.frames]
        estimate = np.concatenate([update.map_from_camera for update in mine])
        errors = compare_paths(world.cameras(stamps), estimate)
        assert errors.position_rms < 1e-4 * errors.length
