# SPDX-License-Identifier: Apache-2.0
"""Calibrated cameras in the engine: rectification, unprojection, comparison with the network."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from fake_network import FakeNetwork, true_depth

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.lab.evaluation.truth_network import FIELD_OF_VIEW
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import DepthScale
from vggt_ros.model import Prediction
from vggt_ros.settings import Settings

HEIGHT, WIDTH = 96, 128
FOCAL = WIDTH / 2 / math.tan(FIELD_OF_VIEW / 2)
K = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])


def calibration(factor: float = 1.0, d: tuple[float, ...] = (), model: str = 'plumb_bob'):
    return Calibration(WIDTH, HEIGHT, model, np.diag([factor, factor, 1]) @ K, np.array(d))


def run(
    known: Calibration | None, network: FakeNetwork | None = None, **values: object
) -> tuple[StreamingEngine, list[MapUpdate]]:
    settings = Settings.from_flat(
        {'window_size': 4, 'window_stride': 2, 'min_parallax': 0.0, **values}
    )
    streaming = StreamingEngine(settings, network or FakeNetwork())
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = [streaming.add(Frame(image, i * 10**8, 'camera', known)) for i in range(12)]
    return streaming, [update for update in added if update is not None]


def test_focal_lengths_are_averaged_for_each_camera_separately() -> None:
    class LongSecondLens(FakeNetwork):
        """Predicts twice the focal length for the second camera."""

        def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
            prediction = super().__call__(batch, heads)
            assert prediction.pose_encodings is not None
            fields_of_view = prediction.pose_encodings[-1][0, :, 7:]
            second = [frame.camera == 1 for frame in batch.frames]
            fields_of_view[second] = 2 * ((fields_of_view[second] / 2).tan() / 2).atan()
            return prediction

    settings = Settings.from_flat({'window_size': 2, 'window_stride': 1, 'min_parallax': 0.0})
    streaming = StreamingEngine(settings, LongSecondLens())
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for i in range(4):
        frame_set = [Frame(image, i * 10**8 + k * 10**6, 'camera', camera=k) for k in (0, 1)]
        update = streaming.add(frame_set)
    assert update is not None
    focal = update.reconstruction.intrinsics[:, 0, 0]
    np.testing.assert_allclose(focal[1::2], 2 * focal[::2], rtol=1e-6)


class NoisyFocalLength(FakeNetwork):
    """Predicts the field of view of each window with an error of up to a tenth."""

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        prediction = super().__call__(batch, heads)
        assert prediction.pose_encodings is not None
        factor = 1 + 0.1 * np.random.default_rng(batch.window_id).uniform(-1, 1)
        prediction.pose_encodings[-1][..., 7:] *= factor
        return prediction


def spread(updates: list[MapUpdate]) -> float:
    focal = [update.reconstruction.intrinsics[0, 0, 0] for update in updates]
    return float(np.ptp(np.log(focal[2:])))


def test_the_predicted_focal_length_is_averaged() -> None:
    _, averaged = run(None, NoisyFocalLength())
    _, separate = run(None, NoisyFocalLength(), average_intrinsics=False)
    assert spread(averaged) < spread(separate) / 2
    for update in averaged:
        assert len({float(matrix[0, 0]) for matrix in update.reconstruction.intrinsics}) == 1


def test_disagreement_with_the_calibration_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streaming, updates = run(calibration(1.5))
    assert streaming.counts['focal_length_disagreements'] == len(updates)
    assert caplog.text.count('the predicted focal length is 0.67 times the calibrated one') == 1
    caplog.clear()
    streaming, _ = run(calibration(1.05))
    assert 'focal_length_disagreements' not in streaming.counts and not caplog.text


def test_depth_is_unprojected_with_the_calibration_if_requested() -> None:
    _, updates = run(calibration(1.1), use_known_intrinsics=True)
    scale = 56 / WIDTH  # network image over source image
    for update in updates:
        newest = len(update.batch.ids) - 1
        intrinsics = update.reconstruction.intrinsics
        np.testing.assert_allclose(intrinsics[:, 0, 0], 1.1 * FOCAL * scale)
        cloud = update.point_cloud(newest)
        camera_from_map = np.linalg.inv(update.world_from_camera[newest])
        in_camera = cloud.xyz @ camera_from_map[:3, :3].T + camera_from_map[:3, 3]
        pixels = in_camera @ intrinsics[newest].T
        _, u = np.nonzero(np.isfinite(update.depth(newest)))
        np.testing.assert_allclose(pixels[:, 0] / pixels[:, 2], u, atol=1e-2)
    _, uncalibrated = run(None, use_known_intrinsics=True)
    focal = uncalibrated[0].reconstruction.intrinsics[:, 0, 0]
    np.testing.assert_allclose(focal, FOCAL * scale, rtol=1e-5)


def test_images_that_are_already_rectified_use_the_camera_matrix_in_p() -> None:
    known = calibration(1.0, (-0.3, 0.1, 0.0, 0.0))
    projection = np.concatenate([np.diag([0.9, 0.9, 1]) @ K, np.zeros((3, 1))], axis=1)
    known = Calibration(WIDTH, HEIGHT, 'plumb_bob', known.K, known.D, projection)
    _, updates = run(known, rectify=False, use_known_intrinsics=True)
    focal = updates[0].reconstruction.intrinsics[:, 0, 0]
    np.testing.assert_allclose(focal, 0.9 * FOCAL * 56 / WIDTH)
    unrectified = fit_image(updates[0].batch.frames[0].image, 56, 'crop')
    np.testing.assert_array_equal(updates[0].batch.images[0].pixels, unrectified.pixels)


def test_pixels_outside_of_the_lens_have_no_depth() -> None:
    known = calibration(1.0, (-0.3, 0.1, 0.0, 0.0))
    _, updates = run(known, rectified_field_of_view=120.0, min_confidence=0.0)
    depth = updates[0].depth(0)
    assert np.isnan(depth[[0, 0, -1, -1], [0, -1, 0, -1]]).all()
    assert np.isfinite(depth[depth.shape[0] // 2, depth.shape[1] // 2])
    assert len(updates[0].point_cloud(0).xyz) == np.isfinite(depth).sum()


def test_sensor_depth_is_compared_before_rectification() -> None:
    """Depth of a sensor has the distortion of the raw images."""
    known = calibration(1.0, (-0.25, 0.08, 0.0, 0.0))
    settings = Settings.from_flat(
        {
            'window_size': 4,
            'window_stride': 2,
            'min_parallax': 0.0,
            'scale_source': 'depth',
            'rectified_field_of_view': math.degrees(FIELD_OF_VIEW),
        }
    )

    def distorted_depth(stamp_ns: int) -> np.ndarray:
        ideal = true_depth(stamp_ns, HEIGHT, WIDTH).astype(np.float32)
        rows, columns = np.indices((HEIGHT, WIDTH), np.float32)
        raw = np.stack([columns, rows], -1).reshape(-1, 1, 2)
        undistorted = cv2.undistortPoints(raw, known.K, known.D, P=known.K)
        x, y = undistorted.reshape(HEIGHT, WIDTH, 2).astype(np.float32).transpose(2, 0, 1)
        distorted = cv2.remap(ideal, x, y, cv2.INTER_NEAREST, borderValue=float('nan'))
        return np.asarray(distorted)

    streaming = StreamingEngine(settings, FakeNetwork(), DepthScale(distorted_depth, pytest.fail))
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    added = [streaming.add(Frame(image, i * 10**8, 'camera', known)) for i in range(8)]
    update = next(update for update in reversed(added) if update is not None)
    truth = true_depth(update.batch.frames[-1].stamp_ns, *update.batch.image_size)
    assert np.nanmedian(update.depth(len(update.batch.ids) - 1) / truth) == pytest.approx(
        1, abs=0.02
    )
