# SPDX-License-Identifier: Apache-2.0
"""The state of an engine is plain data, from which another engine continues."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_network import FakeNetwork, true_cameras

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import MotionScale
from vggt_ros.settings import Settings

STEP_NS = 100_000_000
FISHEYE = Calibration(
    width=64,
    height=48,
    distortion_model='equidistant',
    K=np.array([[40.0, 0, 31.5], [0, 40, 23.5], [0, 0, 1]]),
    D=np.array([0.01, 0, 0, 0]),
)


def make_engine(**settings: object) -> StreamingEngine:
    flat = {
        'window_size': 6,
        'window_stride': 2,
        'min_parallax': 0.0,
        'anchor_windows': 3,
        'scale_source': 'odometry',
        'track_points': 8,
        **settings,
    }
    positions = lambda stamps, _: true_cameras([round(t * 1e9) for t in stamps])[:, :3, 3]  # noqa: E731
    return StreamingEngine(
        Settings.from_flat(flat), FakeNetwork(), MotionScale(positions, min_travel=0.01)
    )


def feed(engine: StreamingEngine, numbers: range) -> list[MapUpdate]:
    """Add frames of two cameras, one calibrated, the other missing at times."""
    updates = []
    for number in numbers:
        image = np.random.default_rng(number).integers(0, 200, (48, 64, 3), np.uint8)
        frames = [Frame(image, number * STEP_NS, 'left', FISHEYE)]
        if number % 5:
            frames.append(Frame(image[::-1].copy(), number * STEP_NS, 'right', camera=1))
        update = engine.add(frames)
        if update is not None:
            updates.append(update)
    return updates


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


@pytest.mark.parametrize('loop_closure', [False, True])
def test_another_engine_continues_with_identical_results(loop_closure: bool) -> None:
    if loop_closure:
        pytest.importorskip('gtsam', reason='loop_closure needs GTSAM')
    first, second = make_engine(loop_closure=loop_closure), make_engine(loop_closure=loop_closure)
    feed(first, range(23))
    second.load_state_dict(first.state_dict())
    expected, found = feed(first, range(23, 50)), feed(second, range(23, 50))
    assert len(expected) > 10
    assert first.counts == second.counts
    for one, other in zip(expected, found, strict=True):
        assert (one.map_id, one.window_id, one.batch.ids) == (
            other.map_id,
            other.window_id,
            other.batch.ids,
        )
        np.testing.assert_array_equal(one.world_from_camera, other.world_from_camera)
        np.testing.assert_array_equal(one.covariance, other.covariance)
        assert one.metric == other.metric
        assert one.tracks is not None
        assert other.tracks is not None
        np.testing.assert_array_equal(one.tracks.pixels, other.tracks.pixels)
        np.testing.assert_array_equal(one.tracks.ids, other.tracks.ids)


def test_a_state_consists_of_json_and_arrays() -> None:
    engine = make_engine()
    feed(engine, range(23))
    for leaf in leaves(engine.state_dict()):
        assert leaf is None or isinstance(leaf, (bool, int, float, str, np.ndarray))
        if isinstance(leaf, np.ndarray):
            assert leaf.dtype.kind in 'biuf'
        else:
            json.dumps(leaf, allow_nan=False)


def assign(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            key = next(iter(state)) if key == 'FRAME' else key
            key = next(iter(state)) if key == 'FIRST' else key
            state = state[key]  # type: ignore[index]
        state[path[-1]] = to  # type: ignore[index]

    return apply


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda state: state.clear(), 'missing required field `sliding_window`'),
        (lambda state: state['map'].pop('frames') and None, None),
        (assign('map', to=[1, 2]), r'Expected `object`, got `array` - at `\$.map`'),
        (assign('map', 'map_id', to='zero'), r'Expected `int`, got `str` - at `\$.map.map_id`'),
        (assign('map', 'map_id', to=2**63), r'state.map.map_id is 9223372036854775808, expected'),
        (assign('map', 'frames', 'scale', to=float('nan')), 'state.map.frames.scale is nan'),
        (assign('sliding_window', 'size', to=10**12), 'windows of 1000000000000 frame sets'),
        (assign('sliding_window', 'stride', to=0), 'windows of 6 frame sets, 0 of them new'),
        (
            assign('map', 'uncertainty', 'window', to=np.full((7, 7), np.nan)),
            'state.map.uncertainty.window has values that are not finite',
        ),
        (
            assign('map', 'uncertainty', 'window', to=np.zeros((2, 2))),
            r'covariance of shape \(2, 2\), expected \(7, 7\)',
        ),
        (
            assign('map', 'uncertainty', 'window', to=np.zeros((7, 7), np.uint8)),
            'array of uint8, expected float64',
        ),
        (assign('map', 'uncertainty', 'window', to='import os'), 'Expected `numpy.ndarray`'),
        (
            assign('map', 'frames', 'frames', 'FIRST', 'intrinsics', to=np.zeros((3, 3))),
            'expected focal lengths above 0',
        ),
        (
            assign('sliding_window', 'anchor', 0, 'frame', 'calibration', 'height', to=2**61),
            'the calibration is of 64x2305843009213693952 pixels',
        ),
        (assign('sliding_window', 'new', to=7), 'they contradict each other'),
        (assign('sliding_window', 'next_frame_id', to=1), 'they contradict each other'),
        (assign('map', 'loops', 'window_ids', to=[0, 1, 2]), 'a pose graph of 0 nodes with 3'),
        (
            assign('sliding_window', 'frame_sets', 0, 0, 'frame', 'image', to=np.zeros((2, 2, 2))),
            'array of float64, expected uint8',
        ),
    ],
)
def test_an_invalid_state_is_a_clear_error_and_changes_nothing(
    damage: Any, message: str | None
) -> None:
    engine = make_engine()
    feed(engine, range(23))
    state = copy.deepcopy(engine.state_dict())
    damage(state)
    other = make_engine()
    if message is None:  # an optional field has its default
        other.load_state_dict(state)
        return
    with pytest.raises(ValueError, match=message) as caught:
        other.load_state_dict(state)
    assert '\n' not in str(caught.value)
    # the engine behaves like a new one
    assert [u.map_id for u in feed(other, range(12))] == [
        u.map_id for u in feed(make_engine(), range(12))
    ]
