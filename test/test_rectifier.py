# SPDX-License-Identifier: Apache-2.0
"""Rectified images against an independent implementation of the camera models."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.frames.rectifier import PinholeImage, Rectifier, distort

WIDTH, HEIGHT = 320, 240
K = np.array([[160.0, 0, 168.0], [0, 158.0, 115.0], [0, 0, 1]])
FISHEYE = np.array([[95.0, 0, 163.0], [0, 95.0, 118.0], [0, 0, 1]])
MODELS = {
    'plumb_bob': (K, [-0.25, 0.08, 0.001, -0.002, -0.01]),
    'rational_polynomial': (K, [0.3, 0.05, 0.001, 0.0005, 0.01, 0.6, 0.1, 0.02]),
    'equidistant': (FISHEYE, [0.02, -0.005, 0.001, 0.0]),
}


def project_with_distortion(
    model: str, matrix: np.ndarray, d: np.ndarray, rays: np.ndarray
) -> np.ndarray:
    """Project rays (N, 3) by the equations of REP-104's models and the fisheye paper."""
    x, y = rays[:, 0] / rays[:, 2], rays[:, 1] / rays[:, 2]
    r2 = x * x + y * y
    if model == 'equidistant':
        r = np.sqrt(r2)
        theta = np.arctan(r)
        t2 = theta * theta
        distorted = theta * (1 + t2 * (d[0] + t2 * (d[1] + t2 * (d[2] + t2 * d[3]))))
        factor = np.where(r > 1e-9, distorted / np.maximum(r, 1e-9), 1.0)
        x, y = x * factor, y * factor
    else:
        k1, k2, p1, p2, k3, k4, k5, k6 = np.concatenate([d, np.zeros(8 - len(d))])
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        x, y = (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        )
    return np.stack([matrix[0, 0] * x + matrix[0, 2], matrix[1, 1] * y + matrix[1, 2]], -1)


def calibration(model: str) -> Calibration:
    matrix, d = MODELS[model]
    return Calibration(WIDTH, HEIGHT, model, matrix, np.array(d))


def render_spots(model: str, rays: np.ndarray) -> np.ndarray:
    """Render the distorted image of bright spots in the directions of rays (N, 3)."""
    matrix, d = MODELS[model]
    centres = project_with_distortion(model, matrix, np.array(d), rays)
    rows, columns = np.indices((HEIGHT, WIDTH))
    brightness = np.zeros((HEIGHT, WIDTH))
    for u, v in centres:
        brightness += np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 1.5**2))
    return np.repeat((250 * brightness.clip(0, 1))[..., None], 3, -1).astype(np.uint8)


def centroid_near(image: np.ndarray, u: float, v: float) -> tuple[float, float]:
    """Compute the centroid of the brightness within ten pixels of (u, v)."""
    rows, columns = np.indices(image.shape[:2])
    weight = np.where((abs(columns - u) < 10) & (abs(rows - v) < 10), image[..., 0], 0.0)
    return (
        float((columns * weight).sum() / weight.sum()),
        float((rows * weight).sum() / weight.sum()),
    )


def rectify(model: str, degrees: float, image: np.ndarray) -> PinholeImage:
    frame = Frame(image, 0, 'camera', calibration(model))
    return Rectifier(math.radians(degrees)).rectify(frame)


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('degrees', [0, 70])
def test_the_rectified_image_is_that_of_its_pinhole_camera(model: str, degrees: float) -> None:
    angles = [(0, 0), (20, 0), (-22, 8), (5, -15), (25, 14), (-25, -14)]
    rays = np.array([[math.tan(math.radians(a)), math.tan(math.radians(b)), 1] for a, b in angles])
    rectified = rectify(model, degrees, render_spots(model, rays))
    assert rectified.pixels.shape == (HEIGHT, WIDTH, 3)
    assert rectified.intrinsics is not None
    np.testing.assert_array_equal(rectified.intrinsics[:2, 2], [WIDTH / 2, HEIGHT / 2])
    assert rectified.intrinsics[0, 0] == rectified.intrinsics[1, 1]
    if degrees:
        view = 2 * math.degrees(math.atan(WIDTH / 2 / rectified.intrinsics[0, 0]))
        assert view == pytest.approx(degrees)
    for ray in rays:
        u, v, _ = rectified.intrinsics @ ray
        if not (12 < u < WIDTH - 12 and 12 < v < HEIGHT - 12):
            continue
        x, y = centroid_near(rectified.pixels, u, v)
        assert math.hypot(x - u, y - v) < 0.5, (ray, (u, v), (x, y))


@pytest.mark.parametrize('model', MODELS)
def test_distort_maps_rectified_pixels_into_the_original_image(model: str) -> None:
    rectified = rectify(model, 70, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert rectified.intrinsics is not None and rectified.pixel_map is not None
    pixels = np.array([[0.0, 0.0], [160.0, 120.0], [40.25, 200.5], [319.0, 7.0], [-8.0, 90.0]])
    distorted = distort(pixels, rectified.intrinsics, calibration(model))
    rays = np.concatenate([pixels, np.ones((5, 1))], -1) @ np.linalg.inv(rectified.intrinsics).T
    matrix, d = MODELS[model]
    np.testing.assert_allclose(
        distorted, project_with_distortion(model, matrix, np.array(d), rays), atol=1e-9
    )
    mapped = [rectified.pixel_map[::-1, int(y), int(x)] for x, y in pixels[[0, 1, 3]]]
    np.testing.assert_allclose(distorted[[0, 1, 3]], mapped, atol=1e-3)
    assert distort(np.zeros((0, 2)), rectified.intrinsics, calibration(model)).shape == (0, 2)


@pytest.mark.parametrize('model', ['plumb_bob', 'rational_polynomial'])
def test_the_default_field_of_view_leaves_no_empty_pixels(model: str) -> None:
    rectified = rectify(model, 0, np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    assert rectified.seen is None and (rectified.pixels == 200).all()


def test_pixels_outside_of_the_lens_are_masked() -> None:
    rectified = rectify('plumb_bob', 120, np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    assert rectified.seen is not None
    # Where the polynomial is not monotonic, it would repeat the centre of the image.
    assert not rectified.seen[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert rectified.seen[HEIGHT // 2].sum() > WIDTH / 2


def test_images_without_distortion_or_calibration_are_unchanged() -> None:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    plain = Calibration(WIDTH, HEIGHT, 'plumb_bob', K, np.zeros(5))
    rectified = Rectifier(0).rectify(Frame(image, 0, 'camera', plain))
    assert rectified.pixels is image and rectified.intrinsics is K
    assert Rectifier(1.0).rectify(Frame(image, 0, 'camera')).pixels is image


def test_maps_are_computed_once_for_each_calibration() -> None:
    rectifier = Rectifier(0)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    maps = [
        rectifier.rectify(Frame(image, 0, 'camera', calibration(model))).pixel_map
        for model in [*MODELS, *MODELS]
    ]
    assert len({id(each) for each in maps}) == len(MODELS)
    for first, second in zip(maps[: len(MODELS)], maps[len(MODELS) :]):
        assert first is second is not None
