# SPDX-License-Identifier: Apache-2.0
"""Metric scale from TF, odometry and depth: measured, held, rejected, applied to all lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_network import FakeNetwork, true_cameras, true_depth

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, World
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import DepthScale, MotionScale, ScaleSource
from vggt_ros.settings import Settings

FRAMES = 120
STEP_NS = 100_000_000
HEIGHT, WIDTH = 48, 64  # of the camera images
SILENCE = (5.0, 10.0)  # s without measurements
NOISE = PredictionNoise(depth=0.01, rotation=0.005, translation=0.01)


def is_silent(stamp: float) -> bool:
    return SILENCE[0] <= stamp < SILENCE[1]


class NoisyPositions:
    """True camera positions; a tenth are outliers of about a metre, some are missing."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, stamps: np.ndarray, camera_frame: str) -> np.ndarray:
        assert camera_frame == 'camera'
        positions = true_cameras([round(stamp * 1e9) for stamp in stamps])[:, :3, 3]
        outliers = self.random.random(len(stamps)) < 0.1
        positions[outliers] += self.random.normal(size=(int(outliers.sum()), 3))
        positions[[is_silent(stamp) for stamp in stamps]] = np.nan
        return positions


class NoisyDepth:
    """A depth sensor of twice the resolution; a tenth of its pixels are outliers, a tenth NaN."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, stamp_ns: int) -> np.ndarray:
        if is_silent(stamp_ns * 1e-9):
            raise LookupError('the sensor is silent')
        depth = true_depth(stamp_ns, 2 * HEIGHT, 2 * WIDTH).astype(np.float32)
        uniform = self.random.random(depth.shape)
        depth[uniform < 0.1] *= 3
        depth[uniform > 0.9] = np.nan
        return depth


def engine(source: ScaleSource | None, **values: object) -> StreamingEngine:
    flat = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, **values}
    return StreamingEngine(Settings.from_flat(flat), FakeNetwork(prediction_noise=NOISE), source)


def run(streaming: StreamingEngine, numbers: range = range(FRAMES)) -> list[MapUpdate]:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = [streaming.add(Frame(image, i * STEP_NS, 'camera')) for i in numbers]
    return [update for update in added if update is not None]


def scale_error(update: MapUpdate) -> float:
    """Return the relative error of the depth of the newest frame against metres."""
    newest = update.batch.frames[-1].stamp_ns
    truth = true_depth(newest, *update.batch.image_size)
    return float(np.nanmedian(update.depth(len(update.batch.ids) - 1) / truth) - 1)


def make_source(name: str, report: Callable[[str], None]) -> ScaleSource:
    return (
        DepthScale(NoisyDepth(), report)
        if name == 'depth'
        else MotionScale(NoisyPositions(), 0.05)
    )


@pytest.mark.parametrize('name', ['tf', 'odometry', 'depth'])
def test_the_scale_is_robust_to_outliers_and_held_while_the_source_is_silent(name: str) -> None:
    reports: list[str] = []
    updates = run(engine(make_source(name, reports.append), scale_source=name))
    assert {update.map_id for update in updates} == {0}
    assert all(update.metric.valid and update.metric.source == name for update in updates)
    for update in updates[2:]:
        assert abs(scale_error(update)) < 0.02, update.window_id
    metric = {update.batch.frames[-1].stamp_ns * 1e-9: update.metric for update in updates}
    assert metric[4.7].age == 0 and metric[11.9].age == 0
    # Windows that begin before the silence are still measured in part.
    silence = [m for stamp, m in metric.items() if SILENCE[0] + 0.8 <= stamp < SILENCE[1]]
    ages = [each.age for each in silence]
    assert max(ages) > 3 and ages == sorted(ages)
    silent = [u for u in updates if all(is_silent(f.stamp_ns * 1e-9) for f in u.batch.frames)]
    assert len(reports) == (len(silent) if name == 'depth' else 0)
    factors = {each.factor for each in silence}
    assert len(factors) == 1
    assert 0 < updates[-1].metric.spread < 0.05


def test_one_factor_scales_cameras_depth_and_points() -> None:
    scaled = run(engine(None, scale_source='fixed', scale_factor=3.0), range(8))[0]
    plain = run(engine(None), range(8))[0]
    assert scaled.metric.valid and not plain.metric.valid
    np.testing.assert_allclose(
        scaled.world_from_camera[:, :3, 3], 3 * plain.world_from_camera[:, :3, 3]
    )
    np.testing.assert_array_equal(
        scaled.world_from_camera[:, :3, :3], plain.world_from_camera[:, :3, :3]
    )
    np.testing.assert_allclose(scaled.depth(3), 3 * plain.depth(3), rtol=1e-6)
    np.testing.assert_allclose(scaled.point_cloud(3).xyz, 3 * plain.point_cloud(3).xyz, atol=1e-5)


def test_a_new_map_has_a_scale_of_its_own() -> None:
    streaming = engine(MotionScale(NoisyPositions(), 0.05), scale_source='tf')
    before = run(streaming, range(40))
    streaming.reset('a test')
    after = run(streaming, range(110, 150))
    assert before[-1].map_id == 0 and after[0].map_id == 1
    assert before[-1].metric.factor != after[0].metric.factor
    for update in (before[-1], after[-1]):
        assert abs(scale_error(update)) < 0.02


def test_a_stationary_camera_gives_no_scale() -> None:
    world = World(
        np.array([4.0, 3.0, 5.0]), lambda stamps: np.tile(true_cameras([0]), (len(stamps), 1, 1))
    )
    settings = Settings.from_flat(
        {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, 'scale_source': 'tf'}
    )
    stationary = MotionScale(
        lambda stamps, _frame: (
            world.cameras([round(s * 1e9) for s in stamps])[:, :3, 3]
            + 0.001 * np.random.default_rng(1).normal(size=(len(stamps), 3))
        ),
        0.05,
    )
    streaming = StreamingEngine(
        settings, FakeNetwork(world=world, prediction_noise=NOISE), stationary
    )
    updates = run(streaming, range(16))
    assert updates and not any(update.metric.valid for update in updates)
    assert all(np.isnan(update.metric.age) for update in updates)


def test_implausible_scales_are_rejected_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    streaming = engine(
        MotionScale(NoisyPositions(), 0.05),
        scale_source='odometry',
        min_scale=100.0,
        max_scale=200.0,
    )
    updates = run(streaming, range(40))
    assert not any(update.metric.valid for update in updates)
    assert streaming.counts['rejected_scales'] == len(updates)
    assert caplog.text.count('m per map unit (odometry): expected 100 to 200') == 1


def test_depth_of_another_aspect_ratio_is_reported_and_ignored() -> None:
    def square_depth(stamp_ns: int) -> np.ndarray:
        return true_depth(stamp_ns, HEIGHT, HEIGHT).astype(np.float32)

    reports: list[str] = []
    source = DepthScale(square_depth, reports.append)
    updates = run(engine(source, scale_source='depth'), range(16))
    assert not any(update.metric.valid for update in updates)
    assert len(reports) == sum(len(update.reconstruction.depth) for update in updates)
    assert f'depth of {HEIGHT}x{HEIGHT} pixels' in reports[0]
    assert 'expected depth registered' in reports[0]


def test_a_missing_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="scale_source is 'tf', but nothing provides it"):
        engine(None, scale_source='tf')
