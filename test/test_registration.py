# SPDX-License-Identifier: Apache-2.0
"""Long ways through many windows: how far the map drifts when every window errs a little.

What noise allows: the turn between two windows is known from four shared cameras, each seen twice
with 0.3 degrees, so to 0.3 * sqrt(2 / 4) = 0.21 degrees; over 124 joints a random walk ends
0.21 * sqrt(124) = 2.4 degrees off, and is off by 1 degree on average after one rotation is fitted
to all.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest

from vggt_ros.cli.evaluate import Evaluate
from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.lab.evaluation.sequences import (
    FRAME_PERIOD_NS,
    evaluate_sequence,
    map_sequence,
    render_sequence,
    sequence_world,
)
from vggt_ros.lab.evaluation.trajectory_errors import compare_trajectories, orientation_errors
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork, World
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.settings import Settings

FRAMES, HEIGHT, WIDTH = 500, 28, 42
NOISE = PredictionNoise(depth=0.01, rotation=math.radians(0.3), translation=0.01)
WINDOWS = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
PICTURE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def world(name: str) -> World:
    return sequence_world(SEQUENCES[name](FRAMES))


@functools.cache
def run(
    name: str, errors: PredictionNoise | None = None, frames: int = FRAMES, lost: int | None = None
) -> tuple[list[MapUpdate], dict[str, Any]]:
    """Send the first frames of a sequence through an engine; tests share what comes out."""
    seen = world(name)
    updates = map_sequence(TruthNetwork(seen, errors, WIDTH), [PICTURE] * frames, lost)
    truth = SEQUENCES[name](FRAMES).world_from_camera.numpy()
    return updates, evaluate_sequence(
        updates, truth, lambda i: seen.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )


@pytest.mark.parametrize('name', SEQUENCES)
def test_without_noise_the_map_is_exact(name: str) -> None:
    updates, figures = run(name, frames=100)
    ours = figures['ours']
    assert (ours['maps'], ours['windows'], ours['frames']) == (1, 24, 100)
    assert ours['rotation_deg'] < 0.01 and ours['scale_drift_percent'] < 0.01
    if name == 'rotation':
        assert ours['ate_percent'] is None
        moved = [np.abs(update.world_from_camera[:, :3, 3]).max() for update in updates]
        assert max(moved) < 1e-4
    else:
        assert ours['ate_percent'] < 0.01


@pytest.mark.parametrize('name', SEQUENCES)
def test_noise_makes_the_map_drift_no_more_than_it_must(name: str) -> None:
    ours = run(name, NOISE)[1]['ours']
    print(name, ours)
    assert (ours['maps'], ours['windows'], ours['frames']) == (1, 124, FRAMES)
    assert ours['rotation_deg'] <= 2.5
    assert ours['scale_drift_percent'] <= 2
    if name != 'rotation':
        assert ours['ate_percent'] <= 1.5


def test_an_anchor_slows_down_how_turns_add_up() -> None:
    seen = world('corridor')
    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'anchor_windows': 30}
    streaming = StreamingEngine(Settings.from_flat(settings), TruthNetwork(seen, NOISE, WIDTH))
    added = [streaming.add(Frame(PICTURE, i * FRAME_PERIOD_NS, 'camera')) for i in range(FRAMES)]
    updates = [update for update in added if update is not None]
    truth = SEQUENCES['corridor'](FRAMES).world_from_camera.numpy()
    held = evaluate_sequence(
        updates, truth, lambda i: seen.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )['ours']
    free = run('corridor', NOISE)[1]['ours']
    print(held, free)
    assert (held['maps'], held['windows']) == (1, 124)
    assert held['rotation_deg'] < 0.8 * free['rotation_deg']


def test_a_straight_line_is_joined_better_than_by_camera_centres() -> None:
    figures = run('corridor', NOISE)[1]
    ours, theirs = figures['ours'], figures['baselines']['centres']
    print(ours, theirs)
    assert 3 * ours['ate_percent'] < theirs['ate_percent']
    assert 3 * ours['rotation_deg'] < theirs['rotation_deg']


@pytest.mark.parametrize(('name', 'held'), [('rotation', True), ('corridor', False)])
def test_depth_that_contradicts_itself_tells_no_scale_without_motion(
    name: str, held: bool
) -> None:
    network = TruthNetwork(world(name), PredictionNoise(depth=0.15), WIDTH)
    streaming = StreamingEngine(WINDOWS, network)
    added = (streaming.add(Frame(PICTURE, i * FRAME_PERIOD_NS, 'camera')) for i in range(12))
    first, second = (update for update in added if update is not None)
    assert (first.registration.scale_held, second.registration.scale_held) == (False, held)
    assert streaming.counts.get('held_scales', 0) == held
    # The unit of this network is another one in each window, so what is held misses the map.
    assert second.map_start_reason.startswith('points of the shared frames differ') == held


def test_one_wrong_camera_does_not_bend_the_map() -> None:
    class OneWrongCamera(TruthNetwork):
        def _err_in_poses(self, cameras: np.ndarray, generator: np.random.Generator) -> np.ndarray:
            moved = super()._err_in_poses(cameras, generator)
            angle = math.radians(20)
            roll = np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            moved[-2, :3, :2] = moved[-2, :3, :2] @ roll
            return moved

    seen = world('corridor')
    streaming = StreamingEngine(WINDOWS, OneWrongCamera(seen, NOISE, WIDTH))
    added = [streaming.add(Frame(PICTURE, i * FRAME_PERIOD_NS, 'camera')) for i in range(12)]
    update = added[-1]
    assert update is not None and update.window_id == 1
    # The plain mean of four rotations would be off by 20 / 4 degrees.
    newest = [frame.stamp_ns for frame in update.batch.frames]
    wrong = orientation_errors(
        np.concatenate([seen.cameras([0]), seen.cameras(newest[-1:])]),
        np.stack([np.eye(4), update.world_from_camera[-1]]),
    )
    assert np.degrees(2 * wrong[0]) < 3


def test_a_lost_window_is_a_declared_break_and_no_false_join() -> None:
    updates, figures = run('corridor', frames=40, lost=3)
    assert [update.map_id for update in updates] == [0] * 3 + [1] * 5
    assert (figures['ours']['maps'], figures['ours']['windows']) == (2, 5)
    assert updates[3].map_start_reason == 'no frame is shared with the map'
    np.testing.assert_array_equal(updates[3].world_from_camera[0], np.eye(4))
    for number in (0, 1):
        mine = [update for update in updates if update.map_id == number]
        stamps = [frame.stamp_ns for update in mine for frame in update.batch.frames]
        estimate = np.concatenate([update.world_from_camera for update in mine])
        errors = compare_trajectories(world('corridor').cameras(stamps), estimate)
        assert errors.position_rms < 1e-4 * errors.length


# --- the command


def test_what_is_rendered_is_what_the_way_sees() -> None:
    way = SEQUENCES['loop'](12)
    images, depth = render_sequence(way, 0, HEIGHT, WIDTH)
    assert images.shape == (12, HEIGHT, WIDTH, 3) and images.std() > 5
    empty = sequence_world(way)
    bare = []
    for i in range(12):
        walls = empty.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH)
        assert (depth[i] < 1.001 * walls).all()  # furniture stands before the walls
        bare.append((np.abs(depth[i] / walls - 1) < 0.001).mean())
    assert np.mean(bare) > 0.3


def test_the_command_measures_a_sequence(tmp_path, capsys) -> None:
    file = tmp_path / 'figures.json'
    common = ('--sequence', 'stop_and_go', '--json', str(file))
    noisy = ('--frames', '28', '--model', 'truth', '--noise', '1,0.3,1')
    assert Evaluate.main([*common, *noisy, '--drop-window', '1', '--seed', '3']) == 0
    told = json.loads(file.read_text())
    assert (told['model'], told['frames'], told['seed']) == ('truth', 28, 3)
    assert (told['ours']['maps'], told['ours']['windows']) == (2, 4)
    assert 0 < told['ours']['ate_percent'] < 5
    assert set(told['baselines']) == {'centres'}
    assert Evaluate.main([*common, '--frames', '12', '--model', 'untrained']) == 0
    told = json.loads(file.read_text())
    assert set(told['baselines']) == {'centres', 'two_view'}
    assert told['baselines']['two_view']['windows'] == 11
    assert 'UNTRAINED' in capsys.readouterr().out


def test_the_command_refuses_what_means_nothing(capsys) -> None:
    for arguments, error in (
        (['--synthetic', '--model', 'truth'], '--model truth is for --sequence'),
        (['--sequence', 'loop', '--noise', '1,1,1'], '--noise is for --model truth'),
        (['--sequence', 'loop', '--noise', '1,1'], 'expected three numbers'),
        (['--sequence', 'loop', '--noise', '1,1,nan'], 'expected three numbers'),
        (
            ['--sequence', 'loop', '--frames', '5', '--model', 'truth'],
            'the way is shorter than a window',
        ),
    ):
        assert Evaluate.main(arguments) == 2
        assert error in capsys.readouterr().err
