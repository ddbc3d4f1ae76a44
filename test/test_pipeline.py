# SPDX-License-Identifier: Apache-2.0
"""Frames in, a map out: the whole core with a network that predicts the ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_network import Failure, FakeNetwork, true_cameras, true_depth

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.rotation import rotation_angle
from vggt_ros.inference.load import choose_device, choose_precision, load_network
from vggt_ros.lab.evaluation.truth_network import CONFIDENCE
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.model import CheckpointError, Prediction
from vggt_ros.settings import ModelSettings, Settings

STEP_NS = 200_000_000
ACCURACY = 1e-4  # map units and rad; float32 pose encodings are accurate to about 1e-6


def frame(i: int, red: int = 0, size: tuple[int, int] = (120, 160)) -> Frame:
    image = np.zeros((*size, 3), np.uint8)
    image[0, 0, 0] = red
    return Frame(image, i * STEP_NS, 'camera')


def engine(size: int = 4, stride: int = 2, **values: object) -> StreamingEngine:
    flat = {'window_size': size, 'window_stride': stride, 'min_parallax': 0.0, **values}
    return StreamingEngine(Settings.from_flat(flat), FakeNetwork())


def run(streaming: StreamingEngine, frames: Iterable[Frame]) -> list[MapUpdate]:
    return [update for f in frames if (update := streaming.add(f)) is not None]


def true_map(updates: list[MapUpdate]) -> tuple[float, np.ndarray]:
    """Return the ground truth: map units in one metre, and `map_from_room`, rigid."""
    anchor = true_cameras([updates[0].batch.frames[0].stamp_ns])[0]
    depth = true_depth(updates[0].batch.frames[0].stamp_ns, *updates[0].batch.image_size)
    return float(np.nanmedian(updates[0].depth(0) / depth)), np.linalg.inv(anchor)


def assert_true(updates: list[MapUpdate]) -> None:
    """Compare cameras, depth and points of a whole map with the truth."""
    scale, map_from_room = true_map(updates)
    for update in updates:
        stamps = [f.stamp_ns for f in update.batch.frames]
        expected = map_from_room @ true_cameras(stamps)
        np.testing.assert_allclose(
            update.world_from_camera[:, :3, 3], scale * expected[:, :3, 3], atol=ACCURACY
        )
        rotation = update.world_from_camera[:, :3, :3] @ expected[:, :3, :3].transpose(0, 2, 1)
        assert rotation_angle(torch.from_numpy(rotation)).max() < ACCURACY
        assert all(i in update.reconstruction.depth for i, new in enumerate(update.is_new) if new)
        for i in update.reconstruction.depth:
            depth = true_depth(stamps[i], *update.batch.image_size)
            valid = np.isfinite(update.depth(i))
            assert valid.mean() > 0.9
            np.testing.assert_allclose(update.depth(i)[valid], scale * depth[valid], rtol=ACCURACY)


def test_windows_of_different_scale_join_into_one_map() -> None:
    updates = run(engine(), (frame(i) for i in range(20)))
    assert len(updates) == 9
    assert {u.map_id for u in updates} == {0}
    assert [u.map_start_reason for u in updates] == ['first window'] + [''] * 8
    assert all(u.registration.accepted and u.registration.shared == 2 for u in updates[1:])
    assert_true(updates)


class NoisyDepth(FakeNetwork):
    """Predicts depth with errors of up to a tenth, different in every window."""

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        prediction = super().__call__(batch, heads)
        assert prediction.depth is not None
        generator = torch.Generator().manual_seed(batch.window_id)
        noise = torch.rand(prediction.depth.shape, generator=generator)
        return replace(prediction, depth=prediction.depth * (0.9 + 0.2 * noise))


@pytest.mark.parametrize(('limit', 'maps'), [(0.3, [0, 0, 0]), (0.01, [0, 1, 2])])
def test_a_window_above_the_residual_limit_starts_a_new_map(limit: float, maps: list[int]) -> None:
    streaming = StreamingEngine(
        Settings.from_flat(
            {
                'window_size': 4,
                'window_stride': 2,
                'min_parallax': 0.0,
                'max_registration_residual': limit,
            }
        ),
        NoisyDepth(),
    )
    updates = run(streaming, (frame(i) for i in range(8)))
    assert [update.map_id for update in updates] == maps
    for update in updates[1:]:
        assert 0.01 < update.registration.residual < 0.3
        assert ('differ by' in update.map_start_reason) == (limit == 0.01)
    assert streaming.counts.get('rejected_registrations', 0) == len(set(maps)) - 1


def test_the_first_camera_is_the_origin_of_the_map() -> None:
    (update,) = run(engine(), (frame(i) for i in range(4)))
    np.testing.assert_array_equal(update.world_from_camera[0], np.eye(4))


def test_each_frame_is_new_once() -> None:
    updates = run(engine(4, 1), (frame(i) for i in range(8)))
    assert [u.is_new for u in updates] == [(True,) * 4] + [(False,) * 3 + (True,)] * 4


def test_point_clouds_are_unprojected_depth() -> None:
    updates = run(engine(), (frame(i) for i in range(8)))
    for update in updates:
        newest = len(update.batch.ids) - 1
        cloud = update.point_cloud(newest)
        camera_from_map = np.linalg.inv(update.world_from_camera[newest])
        in_camera = cloud.xyz @ camera_from_map[:3, :3].T + camera_from_map[:3, 3]
        depth = update.depth(newest)
        np.testing.assert_allclose(in_camera[:, 2], depth[np.isfinite(depth)], rtol=1e-4)
        pixels = in_camera @ update.reconstruction.intrinsics[newest].T
        pixels = pixels[:, :2] / pixels[:, 2:]
        v, u = np.nonzero(np.isfinite(depth))
        np.testing.assert_allclose(pixels, np.stack([u, v], -1), atol=1e-2)


def test_pixels_of_low_confidence_are_dropped_and_clouds_are_subsampled() -> None:
    (update,) = run(engine(max_points=100), (frame(i) for i in range(4)))
    assert np.isnan(update.depth(0)[:, 0]).all()
    cloud = update.point_cloud(0)
    assert cloud.xyz.shape == (100, 3)
    assert (cloud.confidence == CONFIDENCE).all()
    (unfiltered,) = run(engine(min_confidence=0.0), (frame(i) for i in range(4)))
    assert np.isfinite(unfiltered.depth(0)).all()


@pytest.mark.parametrize('failure', [Failure.NAN, Failure.ABSURD])
def test_an_invalid_prediction_loses_one_window_and_the_map_continues(failure: Failure) -> None:
    streaming = engine(6, 2)
    updates = run(streaming, (frame(i) for i in range(7)))
    with pytest.raises(PredictionError):
        streaming.add(frame(7, red=failure))
    updates += run(streaming, (frame(i) for i in range(8, 14)))
    assert streaming.counts['rejected_windows'] == 1
    assert {u.map_id for u in updates} == {0}
    assert updates[1].is_new == (False, False, True, True, True, True)
    assert_true(updates)


def test_a_lost_window_without_shared_frames_starts_a_new_map() -> None:
    streaming = engine(4, 3)
    updates = run(streaming, (frame(i) for i in range(4)))
    for i in range(4, 7):
        with nullcontext() if i < 6 else pytest.raises(PredictionError):
            streaming.add(frame(i, red=Failure.NAN if i == 6 else 0))
    updates += run(streaming, (frame(i) for i in range(7, 10)))
    assert [u.map_id for u in updates] == [0, 1]
    assert updates[1].map_start_reason == 'no frame is shared with the map'
    assert_true(updates[1:])


def test_the_reason_of_a_map_start_survives_a_rejected_first_window() -> None:
    streaming = engine(4, 1)
    run(streaming, (frame(i) for i in range(6)))
    streaming.reset('requested')
    with pytest.raises(PredictionError):
        run(streaming, (frame(i, red=Failure.NAN if i == 9 else 0) for i in range(6, 10)))
    update = streaming.add(frame(10))
    assert update is not None
    assert (update.map_id, update.map_start_reason) == (1, 'requested')


def test_depth_that_contradicts_the_map_starts_a_new_map() -> None:
    class RandomDepth(FakeNetwork):
        """Predicts depth unrelated to the scene, different in each window."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            prediction = super().__call__(batch, heads)
            assert prediction.depth is not None
            generator = torch.Generator().manual_seed(batch.window_id)
            noise = torch.randn(prediction.depth.shape, generator=generator).exp()
            return replace(prediction, depth=prediction.depth * noise)

    settings = Settings.from_flat({'window_size': 4, 'window_stride': 2, 'min_parallax': 0.0})
    updates = run(StreamingEngine(settings, RandomDepth()), (frame(i) for i in range(6)))
    assert [u.map_id for u in updates] == [0, 1]
    assert 'points of the shared frames differ' in updates[1].map_start_reason
    assert not updates[1].registration.accepted


def test_out_of_memory_halves_the_window_and_the_map_continues() -> None:
    streaming = engine(8, 4)
    frames = [frame(i, red=Failure.OUT_OF_MEMORY if i == 11 else 0) for i in range(15)]
    updates = run(streaming, frames)
    assert streaming.window_size == 4
    assert streaming.counts['out_of_memory'] == 1
    assert [u.batch.ids for u in updates] == [tuple(range(8)), (7, 9, 10, 11), (11, 12, 13, 14)]
    assert {u.map_id for u in updates} == {0}
    assert_true(updates)


def test_out_of_memory_with_two_frames_is_an_error() -> None:
    streaming = engine(2, 1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(streaming, (frame(i, red=Failure.OUT_OF_MEMORY) for i in range(2)))


def test_without_a_scale_source_the_scale_is_not_metric() -> None:
    (update,) = run(engine(), (frame(i) for i in range(4)))
    assert (update.metric.valid, update.metric.source) == (False, 'none')


def test_an_untrained_real_network_runs_and_is_reported_as_untrained() -> None:
    network = load_network(ModelSettings(checkpoint='untrained', device='cpu'))
    settings = Settings.from_flat({'window_size': 2, 'window_stride': 1, 'min_parallax': 0.0})
    updates = run(StreamingEngine(settings, network), (frame(i) for i in range(3)))
    assert [u.model_trained for u in updates] == [False, False]
    assert updates[0].depth(0).shape == updates[0].batch.image_size
    assert np.isfinite(updates[0].world_from_camera).all()
    assert sorted(updates[0].seconds) == ['inference', 'preprocess', 'reconstruct', 'register']


def test_a_bad_device_or_checkpoint_is_a_clear_error(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="device is 'abacus', expected"):
        choose_device('abacus')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='torch sees 0 CUDA devices'):
            choose_device('cuda:0')
    with pytest.raises(CheckpointError, match='does not exist'):
        load_network(ModelSettings(checkpoint=f'{tmp_path}/missing.safetensors'))


def test_the_default_precision_on_the_cpu_is_float32() -> None:
    cpu = torch.device('cpu')
    assert choose_precision('auto', cpu) == torch.float32
    assert choose_precision('bfloat16', cpu) == torch.bfloat16
