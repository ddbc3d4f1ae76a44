# SPDX-License-Identifier: Apache-2.0
"""Loop closure: true loops are closed and reduce drift, false ones are rejected."""

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
SIGMAS = NoiseSigmas(rotation=0.01, translation=0.01, scale=0.01)


@functools.cache
def render(name: str, frames: int) -> tuple[World, list[np.ndarray]]:
    """Return a sequence as a world, and its images."""
    world = sequence_world(SEQUENCES[name](frames))
    return world, [world.render_image(i * FRAME_PERIOD_NS, HEIGHT, WIDTH) for i in range(frames)]


def evaluate(updates: list[MapUpdate], name: str, frames: int) -> dict[str, Any]:
    truth = SEQUENCES[name](frames).world_from_camera.numpy()
    world = render(name, frames)[0]
    metrics = evaluate_sequence(
        updates, truth, lambda i: world.depth(i * FRAME_PERIOD_NS, HEIGHT, WIDTH), None
    )
    print(name, metrics['ours'])
    return metrics['ours']


@functools.cache
def run(name: str, **settings: object) -> tuple[list[MapUpdate], dict[str, Any]]:
    world, images = render(name, 500)
    updates = map_sequence(TruthNetwork(world, NOISE, WIDTH), images, **settings)
    return updates, evaluate(updates, name, 500)


def test_a_closed_loop_reduces_drift() -> None:
    updates, closed = run('loop', loop_closure=True)
    _, open_loop = run('loop')
    assert open_loop['loops'] == 0 and closed['loops'] >= 1
    ends = [(u.loop_closure.with_window, u.window_id) for u in updates if u.loop_closure]
    assert ends[-1][0] < 3 and ends[-1][1] > 120
    assert closed['ate_percent'] < 0.6 * open_loop['ate_percent']
    assert closed['rotation_deg'] < 0.8 * open_loop['rotation_deg']
    assert closed['scale_drift_percent'] < 1


def test_a_full_rotation_in_place_closes_a_loop() -> None:
    assert run('rotation', loop_closure=True)[1]['loops'] >= 1
    assert run('rotation', loop_closure=True)[1]['rotation_deg'] < (
        0.8 * run('rotation')[1]['rotation_deg']
    )


def test_loops_are_closed_with_few_stored_windows() -> None:
    updates, closed = run('loop', loop_closure=True, loop_windows=20)
    assert closed['loops'] >= 1
    ends = [(u.loop_closure.with_window, u.window_id) for u in updates if u.loop_closure]
    assert ends[-1][0] < 3 and ends[-1][1] > 115


def test_views_that_only_look_similar_close_no_loop() -> None:
    world, images = render('rotation', 250)  # at twice the rotation rate

    class PerceptualAliasing(TruthNetwork):
        """Cannot distinguish a view from the opposite one."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            prediction = super().__call__(batch, heads)
            cameras = world.cameras([frame.stamp_ns for frame in batch.frames])
            axes = cameras[:, :3, 2]
            descriptors = np.einsum('si,sj->sij', axes, axes).reshape(1, len(axes), 9)
            steps = np.linalg.norm(np.diff(cameras[:, :3, :3], axis=0), axis=(1, 2))
            half = len(cameras) // 2
            if steps[half - 1] > 4 * np.median(steps):  # a joint window of two locations
                assert prediction.pose_encodings is not None
                encodings = prediction.pose_encodings[-1][0]
                encodings[half:] = encodings[: len(encodings) - half].clone()
            return replace(prediction, descriptors=torch.from_numpy(descriptors))

    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'loop_closure': True}
    engine = StreamingEngine(Settings.from_flat(settings), PerceptualAliasing(world, NOISE, WIDTH))
    for i, image in enumerate(images[:240]):
        update = engine.add(Frame(image, i * FRAME_PERIOD_NS, 'camera'))
        assert update is None or update.loop_closure is None
    assert engine.counts['rejected_loops'] > 3 and 'closed_loops' not in engine.counts


def test_images_without_texture_close_no_loop() -> None:
    world, images = render('rotation', 250)
    blank = [np.full_like(image, 90) for image in images]
    updates = map_sequence(TruthNetwork(world, NOISE, WIDTH), blank, loop_closure=True)
    assert not any(update.loop_closure for update in updates)


def test_out_of_memory_in_a_joint_window_rejects_the_loop_only() -> None:
    class LimitedMemory(TruthNetwork):
        """Runs out of memory in joint windows."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            if batch.ids[0] + 8 < batch.ids[-1]:
                raise torch.cuda.OutOfMemoryError('the fake device is out of memory')
            return super().__call__(batch, heads)

    world, images = render('rotation', 250)
    settings = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'loop_closure': True}
    engine = StreamingEngine(Settings.from_flat(settings), LimitedMemory(world, NOISE, WIDTH))
    added = [engine.add(Frame(p, i * FRAME_PERIOD_NS, 'camera')) for i, p in enumerate(images)]
    updates = [update for update in added if update is not None]
    assert len(updates) == 61 and {update.map_id for update in updates} == {0}
    assert engine.counts['rejected_loops'] > 0 and 'closed_loops' not in engine.counts


def test_a_network_without_descriptors_closes_no_loop() -> None:
    class WithoutDescriptors(TruthNetwork):
        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            return replace(super().__call__(batch, heads), descriptors=None)

    world, images = render('rotation', 250)
    updates = map_sequence(WithoutDescriptors(world, NOISE, WIDTH), images, loop_closure=True)
    assert len(updates) > 50 and not any(update.loop_closure for update in updates)


def test_the_metric_scale_follows_the_corrections_of_a_loop() -> None:
    world, images = render('loop', 500)
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
    added = [engine.add(Frame(p, i * FRAME_PERIOD_NS, 'camera')) for i, p in enumerate(images)]
    updates = [update for update in added if update is not None]
    assert any(update.loop_closure for update in updates)
    for update in updates[2:]:
        truth = world.depth(update.batch.frames[-1].stamp_ns, HEIGHT, WIDTH)
        assert abs(np.nanmedian(update.depth(len(update.batch.ids) - 1) / truth) - 1) < 0.02


def test_the_pose_graph_distributes_the_drift_over_its_factors() -> None:
    """Equal errors of all factors get equal corrections, and the first pose is fixed."""
    count = 24
    angle = 2 * math.pi / count
    rotation = np.array(
        [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    )
    step = Sim3(1.0, rotation, np.array([0.0, 0.0, 1.0]))
    drifting_step = step @ Sim3(1.01, np.eye(3), np.array([0.01, 0.02, 0.0]))
    graph, pose, truth = PoseGraph(), Sim3(2.0), [Sim3(2.0)]
    graph.add(pose, None)
    for _ in range(count):
        pose = pose @ drifting_step
        graph.add(pose, SIGMAS)
        truth.append(truth[-1] @ step)
    before = graph.map_from_window[count].translation
    tight = NoiseSigmas(rotation=1e-5, translation=1e-5, scale=1e-5)
    corrections = graph.close_loop(0, count, Sim3(), tight)
    np.testing.assert_allclose(corrections[0].matrix(), np.eye(4), atol=1e-6)
    first, last = graph.map_from_window[0], graph.map_from_window[count]
    np.testing.assert_allclose(last.matrix(), first.matrix(), atol=1e-2)
    errors = [
        np.linalg.norm(estimate.translation - true.translation)
        for estimate, true in zip(graph.map_from_window, truth)
    ]
    assert max(errors) < 0.2 * np.linalg.norm(before)
    scales = np.array([estimate.scale for estimate in graph.map_from_window])
    assert np.abs(scales / 2 - 1).max() < 0.1 < 1.01**count - 1


def test_without_gtsam_loop_closure_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, 'gtsam', None)
    network = TruthNetwork(render('rotation', 250)[0])
    with pytest.raises(ValueError, match=r'loop_closure needs GTSAM.*pip install gtsam'):
        StreamingEngine(Settings.from_flat({'loop_closure': True}), network)
    StreamingEngine(Settings(), network)
