# SPDX-License-Identifier: Apache-2.0
"""Drift of the map over long sequences of windows with noisy predictions.

Expected drift: the rotation between two windows is estimated from four shared cameras, each
predicted twice with 0.3 degrees of noise, so its error is 0.3 * sqrt(2 / 4) = 0.21 degrees. Over
124 registrations the random walk ends at 0.21 * sqrt(124) = 2.4 degrees, and at 1 degree on
average after alignment by one rotation.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from vggt_ros.cli.evaluate import Evaluate
from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.camera import decode_pose, encode_pose
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
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

FRAMES, HEIGHT, WIDTH = 500, 28, 42
NOISE = PredictionNoise(depth=0.01, rotation=math.radians(0.3), translation=0.01)
WINDOWS = Settings.from_flat({'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0})
BLACK_IMAGE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def world(name: str) -> World:
    return sequence_world(SEQUENCES[name](FRAMES))


@functools.cache
def run(
    name: str,
    noise: PredictionNoise | None = None,
    frames: int = FRAMES,
    failed_window: int | None = None,
) -> tuple[list[MapUpdate], dict[str, Any]]:
    """Map the first frames of a sequence and evaluate the map; tests share the results."""
    room = world(name)
    updates = map_sequence(TruthNetwork(room, noise, WIDTH), [BLACK_IMAGE] * frames, failed_window)
    truth = SEQUENCES[name](FRAMES).world_from_camera.numpy()
    return updates, evaluate_sequence(
        updates, truth, lambda i: room.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )


@pytest.mark.parametrize('name', SEQUENCES)
def test_without_noise_the_map_is_exact(name: str) -> None:
    updates, metrics = run(name, frames=100)
    ours = metrics['ours']
    assert (ours['maps'], ours['windows'], ours['frames']) == (1, 24, 100)
    assert ours['rotation_deg'] < 0.01 and ours['scale_drift_percent'] < 0.01
    if name == 'rotation':
        assert ours['ate_percent'] is None
        distances = [np.abs(update.world_from_camera[:, :3, 3]).max() for update in updates]
        assert max(distances) < 1e-4
    else:
        assert ours['ate_percent'] < 0.01


@pytest.mark.parametrize('name', SEQUENCES)
def test_drift_under_noise_is_within_the_expected_bounds(name: str) -> None:
    ours = run(name, NOISE)[1]['ours']
    print(name, ours)
    assert (ours['maps'], ours['windows'], ours['frames']) == (1, 124, FRAMES)
    assert ours['rotation_deg'] <= 2.5
    assert ours['scale_drift_percent'] <= 2
    if name != 'rotation':
        assert ours['ate_percent'] <= 1.5


def test_anchor_frames_reduce_rotational_drift() -> None:
    room = world('corridor')
    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'anchor_windows': 30}
    streaming = StreamingEngine(Settings.from_flat(settings), TruthNetwork(room, NOISE, WIDTH))
    added = [
        streaming.add(Frame(BLACK_IMAGE, i * FRAME_PERIOD_NS, 'camera')) for i in range(FRAMES)
    ]
    updates = [update for update in added if update is not None]
    truth = SEQUENCES['corridor'](FRAMES).world_from_camera.numpy()
    anchored = evaluate_sequence(
        updates, truth, lambda i: room.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )['ours']
    plain = run('corridor', NOISE)[1]['ours']
    print(anchored, plain)
    assert (anchored['maps'], anchored['windows']) == (1, 124)
    assert anchored['rotation_deg'] < 0.8 * plain['rotation_deg']


def test_registration_on_a_straight_line_is_better_than_by_camera_centres() -> None:
    metrics = run('corridor', NOISE)[1]
    ours, baseline = metrics['ours'], metrics['baselines']['centres']
    print(ours, baseline)
    assert 3 * ours['ate_percent'] < baseline['ate_percent']
    assert 3 * ours['rotation_deg'] < baseline['rotation_deg']


@pytest.mark.parametrize(('name', 'held'), [('rotation', True), ('corridor', False)])
def test_the_scale_is_held_where_depth_is_noisy_and_the_camera_only_rotates(
    name: str, held: bool
) -> None:
    network = TruthNetwork(world(name), PredictionNoise(depth=0.15), WIDTH)
    streaming = StreamingEngine(WINDOWS, network)
    added = (streaming.add(Frame(BLACK_IMAGE, i * FRAME_PERIOD_NS, 'camera')) for i in range(12))
    first, second = (update for update in added if update is not None)
    assert (first.registration.scale_held, second.registration.scale_held) == (False, held)
    assert streaming.counts.get('held_scales', 0) == held
    # The scale of this network differs in each window, so the held scale is rejected.
    assert second.map_start_reason.startswith('points of the shared frames differ') == held


def test_registration_is_robust_to_one_wrong_camera() -> None:
    class OneWrongCamera(TruthNetwork):
        """Predicts the last camera but one with a roll of 20 degrees."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            prediction = super().__call__(batch, heads)
            assert prediction.pose_encodings is not None
            encoding = prediction.pose_encodings[-1][0, -2]  # a view
            camera_from_window, intrinsics = decode_pose(encoding.double(), *batch.image_size)
            cos, sin = math.cos(math.radians(20)), math.sin(math.radians(20))
            roll = torch.tensor([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
            encoding[:] = encode_pose(roll @ camera_from_window, intrinsics, *batch.image_size)
            return prediction

    room = world('corridor')
    streaming = StreamingEngine(WINDOWS, OneWrongCamera(room, NOISE, WIDTH))
    added = [streaming.add(Frame(BLACK_IMAGE, i * FRAME_PERIOD_NS, 'camera')) for i in range(12)]
    update = added[-1]
    assert update is not None and update.window_id == 1
    # The plain mean of four rotations would have an error of 20 / 4 degrees.
    errors = orientation_errors(
        room.cameras([0, update.batch.frames[-1].stamp_ns]),
        np.stack([np.eye(4), update.world_from_camera[-1]]),
    )
    assert np.degrees(2 * errors[0]) < 3


def test_a_failed_window_starts_a_new_map_that_is_exact_as_well() -> None:
    updates, metrics = run('corridor', frames=40, failed_window=3)
    assert [update.map_id for update in updates] == [0] * 3 + [1] * 5
    assert (metrics['ours']['maps'], metrics['ours']['windows']) == (2, 5)
    assert updates[3].map_start_reason == 'no frame is shared with the map'
    np.testing.assert_array_equal(updates[3].world_from_camera[0], np.eye(4))
    for map_id in (0, 1):
        own = [update for update in updates if update.map_id == map_id]
        stamps = [frame.stamp_ns for update in own for frame in update.batch.frames]
        estimate = np.concatenate([update.world_from_camera for update in own])
        errors = compare_trajectories(world('corridor').cameras(stamps), estimate)
        assert errors.position_rms < 1e-4 * errors.length


# --- the command


def test_a_rendered_sequence_is_consistent_with_its_world() -> None:
    sequence = SEQUENCES['loop'](12)
    images, depth = render_sequence(sequence, 0, HEIGHT, WIDTH)
    assert images.shape == (12, HEIGHT, WIDTH, 3) and images.std() > 5
    empty_room = sequence_world(sequence)
    wall_shares = []
    for i in range(12):
        walls = empty_room.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH)
        assert (depth[i] < 1.001 * walls).all()  # furniture is in front of the walls
        wall_shares.append((np.abs(depth[i] / walls - 1) < 0.001).mean())
    assert np.mean(wall_shares) > 0.3


def test_the_command_evaluates_a_sequence(tmp_path, capsys) -> None:
    file = tmp_path / 'metrics.json'
    common = ('--sequence', 'stop_and_go', '--json', str(file))
    noisy = ('--frames', '28', '--model', 'truth', '--noise', '1,0.3,1')
    assert Evaluate.main([*common, *noisy, '--drop-window', '1', '--seed', '3']) == 0
    metrics = json.loads(file.read_text())
    assert (metrics['model'], metrics['frames'], metrics['seed']) == ('truth', 28, 3)
    assert (metrics['ours']['maps'], metrics['ours']['windows']) == (2, 4)
    assert 0 < metrics['ours']['ate_percent'] < 5
    assert set(metrics['baselines']) == {'centres'}
    assert Evaluate.main([*common, '--frames', '12', '--model', 'untrained']) == 0
    metrics = json.loads(file.read_text())
    assert set(metrics['baselines']) == {'centres', 'two_view'}
    assert metrics['baselines']['two_view']['windows'] == 11
    assert 'UNTRAINED' in capsys.readouterr().out


def test_the_command_rejects_options_that_do_not_apply(capsys) -> None:
    for arguments, error in (
        (['--synthetic', '--model', 'truth'], '--model truth is for --sequence'),
        (['--sequence', 'loop', '--noise', '1,1,1'], '--noise is for --model truth'),
        (['--sequence', 'loop', '--noise', '1,1'], 'expected three numbers'),
        (['--sequence', 'loop', '--noise', '1,1,nan'], 'expected three numbers'),
        (
            ['--sequence', 'loop', '--frames', '5', '--model', 'truth'],
            'the sequence is shorter than a window',
        ),
    ):
        assert Evaluate.main(arguments) == 2
        assert error in capsys.readouterr().err
