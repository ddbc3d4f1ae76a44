# SPDX-License-Identifier: Apache-2.0
"""The camera comes back: right loops are closed and make the map better, wrong ones are not."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip('gtsam', reason='needs GTSAM')
from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.lab.evaluation.sequences import (
    FRAME_PERIOD_NS,
    evaluate_sequence,
    map_sequence,
    sequence_world,
)
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork, World
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import MotionScale
from vggt_ros.mapping.pose_graph import NoiseSigmas, PoseGraph
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

HEIGHT, WIDTH = 28, 42
NOISE = PredictionNoise(depth=0.01, rotation=math.radians(0.3), translation=0.01)
KNOWN = NoiseSigmas(rotation=0.01, translation=0.01, scale=0.01)


@functools.cache
def seen(name: str, frames: int) -> tuple[World, list[np.ndarray]]:
    world = sequence_world(SEQUENCES[name](frames))
    return world, [world.render_image(i * FRAME_PERIOD_NS, HEIGHT, WIDTH) for i in range(frames)]


def figures(updates: list[MapUpdate], name: str, frames: int) -> dict[str, Any]:
    truth = SEQUENCES[name](frames).world_from_camera.numpy()
    world = seen(name, frames)[0]
    found = evaluate_sequence(
        updates, truth, lambda i: world.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )
    print(name, found['ours'])
    return found['ours']


@functools.cache
def run(name: str, **settings: object) -> tuple[list[MapUpdate], dict[str, Any]]:
    world, pictures = seen(name, 500)
    updates = map_sequence(TruthNetwork(world, NOISE, WIDTH), pictures, **settings)
    return updates, figures(updates, name, 500)


def test_a_closed_loop_takes_the_drift_out_of_the_map() -> None:
    updates, closed = run('loop', loop_closure=True)
    _, free = run('loop')
    assert free['loops'] == 0 and closed['loops'] >= 1
    ends = [(u.loop_closure.with_window, u.window_id) for u in updates if u.loop_closure]
    assert ends[-1][0] < 3 and ends[-1][1] > 120
    assert closed['ate_percent'] < 0.6 * free['ate_percent']
    assert closed['rotation_deg'] < 0.8 * free['rotation_deg']
    assert closed['scale_drift_percent'] < 1


def test_turning_once_on_the_spot_is_a_loop_too() -> None:
    assert run('rotation', loop_closure=True)[1]['loops'] >= 1
    assert run('rotation', loop_closure=True)[1]['rotation_deg'] < (
        0.8 * run('rotation')[1]['rotation_deg']
    )


def test_few_remembered_windows_suffice() -> None:
    updates, closed = run('loop', loop_closure=True, loop_windows=20)
    assert closed['loops'] >= 1
    ends = [(u.loop_closure.with_window, u.window_id) for u in updates if u.loop_closure]
    assert ends[-1][0] < 3 and ends[-1][1] > 115


class Deluded(TruthNetwork):
    """Sees no difference between a view and the opposite one."""

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        ahead = self._world.cameras([frame.stamp_ns for frame in batch.frames])[:, :3, 2]
        alike = np.einsum('si,sj->sij', ahead, ahead).reshape(1, len(ahead), 9)
        return replace(super().__call__(batch, heads), descriptors=torch.from_numpy(alike))

    def _err_in_poses(self, cameras: Array, generator: np.random.Generator) -> Array:
        moved = super()._err_in_poses(cameras, generator)
        steps = np.linalg.norm(np.diff(cameras[:, :3, :3], axis=0), axis=(1, 2))
        half = len(cameras) // 2
        if steps[half - 1] > 4 * np.median(steps):
            moved[half:] = moved[: len(moved) - half]
        return moved


def test_places_that_only_look_alike_close_no_loop() -> None:
    world, pictures = seen('rotation', 250)  # in steps twice as wide
    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'loop_closure': True}
    engine = StreamingEngine(Settings.from_flat(settings), Deluded(world, NOISE, WIDTH))
    for i, picture in enumerate(pictures[:240]):
        update = engine.add(Frame(picture, i * FRAME_PERIOD_NS, 'camera'))
        assert update is None or update.loop_closure is None
    assert engine.counts['rejected_loops'] > 3 and 'closed_loops' not in engine.counts


def test_pictures_without_anything_on_them_close_no_loop() -> None:
    world, pictures = seen('rotation', 250)
    blank = [np.full_like(picture, 90) for picture in pictures]
    updates = map_sequence(TruthNetwork(world, NOISE, WIDTH), blank, loop_closure=True)
    assert not any(update.loop_closure for update in updates)


def test_a_joint_window_that_fails_costs_no_window_of_the_map() -> None:
    class Narrow(TruthNetwork):
        """Has memory for what the engine asks of a window, not for depth of all frames."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            if batch.ids[0] + 8 < batch.ids[-1]:
                raise torch.cuda.OutOfMemoryError('the fake device has no memory left')
            return super().__call__(batch, heads)

    world, pictures = seen('rotation', 250)
    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'loop_closure': True}
    engine = StreamingEngine(Settings.from_flat(settings), Narrow(world, NOISE, WIDTH))
    added = [engine.add(Frame(p, i * FRAME_PERIOD_NS, 'camera')) for i, p in enumerate(pictures)]
    updates = [update for update in added if update is not None]
    assert len(updates) == 61 and {update.map_id for update in updates} == {0}
    assert engine.counts['rejected_loops'] > 0 and 'closed_loops' not in engine.counts


def test_a_network_without_descriptors_finds_no_loops() -> None:
    class Silent(TruthNetwork):
        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            return replace(super().__call__(batch, heads), descriptors=None)

    world, pictures = seen('rotation', 250)
    updates = map_sequence(Silent(world, NOISE, WIDTH), pictures, loop_closure=True)
    assert len(updates) > 50 and not any(update.loop_closure for update in updates)


def test_the_metric_scale_goes_on_in_the_corrected_map() -> None:
    world, pictures = seen('loop', 500)
    flat = {
        'window_size': 8,
        'window_stride': 4,
        'min_parallax': 0.0,
        'loop_closure': True,
        'scale_source': 'tf',
    }
    source = MotionScale(
        lambda stamps, _frame: world.cameras([round(s * 1e9) for s in stamps])[:, :3, 3], 0.05
    )
    engine = StreamingEngine(Settings.from_flat(flat), TruthNetwork(world, NOISE, WIDTH), source)
    added = [engine.add(Frame(p, i * FRAME_PERIOD_NS, 'camera')) for i, p in enumerate(pictures)]
    updates = [update for update in added if update is not None]
    assert any(update.loop_closure for update in updates)
    for update in updates[2:]:
        truth = world.depth(update.batch.frames[-1].stamp_ns, HEIGHT, WIDTH)
        assert abs(np.nanmedian(update.depth(len(update.batch.ids) - 1) / truth) - 1) < 0.02


def test_a_graph_gives_drift_back_to_where_it_came_from() -> None:
    """Joints that are all wrong by the same are corrected by the same, and the first stays."""
    count = 24
    angle = 2 * math.pi / count
    turn = np.array(
        [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    )
    step = Sim3(1.0, turn, np.array([0.0, 0.0, 1.0]))
    wrong = step @ Sim3(1.01, np.eye(3), np.array([0.01, 0.02, 0.0]))
    graph, place, truth = PoseGraph(), Sim3(2.0), [Sim3(2.0)]
    graph.add(place, None)
    for _ in range(count):
        place = place @ wrong
        graph.add(place, KNOWN)
        truth.append(truth[-1] @ step)
    before = graph.map_from_window[count].translation
    tight = NoiseSigmas(rotation=1e-5, translation=1e-5, scale=1e-5)
    moved = graph.close_loop(0, count, Sim3(), tight)
    np.testing.assert_allclose(moved[0].matrix(), np.eye(4), atol=1e-6)
    first, last = graph.map_from_window[0], graph.map_from_window[count]
    np.testing.assert_allclose(last.matrix(), first.matrix(), atol=1e-2)
    off = [
        np.linalg.norm(found.translation - true.translation)
        for found, true in zip(graph.map_from_window, truth)
    ]
    assert max(off) < 0.2 * np.linalg.norm(before)
    scales = np.array([found.scale for found in graph.map_from_window])
    assert np.abs(scales / 2 - 1).max() < 0.1 < 1.01**count - 1


def test_without_gtsam_the_setting_is_refused_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, 'gtsam', None)
    network = TruthNetwork(seen('rotation', 250)[0])
    with pytest.raises(ValueError, match=r'loop_closure needs GTSAM.*pip install gtsam'):
        StreamingEngine(Settings.from_flat({'loop_closure': True}), network)
    StreamingEngine(Settings(), network)
