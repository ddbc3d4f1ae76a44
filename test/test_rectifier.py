# SPDX-License-Identifier: Apache-2.0
"""Rectified images against the camera models themselves, worked out here by their equations."""

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


def project(model: str, matrix: np.ndarray, d: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Project rays (N, 3) by the equations of REP-104's models and the fisheye paper."""
    x, y = rays[:, 0] / rays[:, 2], rays[:, 1] / rays[:, 2]
    r2 = x * x + y * y
    if model == 'equidistant':
        r = np.sqrt(r2)
        theta = np.arctan(r)
        t2 = theta * theta
        bent = theta * (1 + t2 * (d[0] + t2 * (d[1] + t2 * (d[2] + t2 * d[3]))))
        stretch = np.where(r > 1e-9, bent / np.maximum(r, 1e-9), 1.0)
        x, y = x * stretch, y * stretch
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


def spots(model: str, rays: np.ndarray) -> np.ndarray:
    """Draw the picture of bright spots in the directions of some rays."""
    matrix, d = MODELS[model]
    centres = project(model, matrix, np.array(d), rays)
    rows, columns = np.indices((HEIGHT, WIDTH))
    light = np.zeros((HEIGHT, WIDTH))
    for u, v in centres:
        light += np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 1.5**2))
    return np.repeat((250 * light.clip(0, 1))[..., None], 3, -1).astype(np.uint8)


def centre_near(image: np.ndarray, u: float, v: float) -> tuple[float, float]:
    """Find the centre of the light within ten pixels of a place."""
    rows, columns = np.indices(image.shape[:2])
    weight = np.where((abs(columns - u) < 10) & (abs(rows - v) < 10), image[..., 0], 0.0)
    return (
        float((columns * weight).sum() / weight.sum()),
        float((rows * weight).sum() / weight.sum()),
    )


def rectified(model: str, degrees: float, image: np.ndarray) -> PinholeImage:
    frame = Frame(image, 0, 'camera', calibration(model))
    return Rectifier(math.radians(degrees)).rectify(frame)


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('degrees', [0, 70])
def test_rays_of_the_rectified_image_are_those_of_the_lens(model: str, degrees: float) -> None:
    angles = [(0, 0), (20, 0), (-22, 8), (5, -15), (25, 14), (-25, -14)]
    rays = np.array([[math.tan(math.radians(a)), math.tan(math.radians(b)), 1] for a, b in angles])
    found = rectified(model, degrees, spots(model, rays))
    assert found.pixels.shape == (HEIGHT, WIDTH, 3)
    assert found.intrinsics is not None
    np.testing.assert_array_equal(found.intrinsics[:2, 2], [WIDTH / 2, HEIGHT / 2])
    assert found.intrinsics[0, 0] == found.intrinsics[1, 1]
    if degrees:
        view = 2 * math.degrees(math.atan(WIDTH / 2 / found.intrinsics[0, 0]))
        assert view == pytest.approx(degrees)
    for ray in rays:
        u, v, _ = found.intrinsics @ ray
        if not (12 < u < WIDTH - 12 and 12 < v < HEIGHT - 12):
            continue
        x, y = centre_near(found.pixels, u, v)
        assert math.hypot(x - u, y - v) < 0.5, (ray, (u, v), (x, y))


@pytest.mark.parametrize('model', MODELS)
def test_pixels_of_the_rectified_image_are_found_in_the_camera_s(model: str) -> None:
    found = rectified(model, 70, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert found.intrinsics is not None and found.pixel_map is not None
    pixels = np.array([[0.0, 0.0], [160.0, 120.0], [40.25, 200.5], [319.0, 7.0], [-8.0, 90.0]])
    back = distort(pixels, found.intrinsics, calibration(model))
    rays = np.concatenate([pixels, np.ones((5, 1))], -1) @ np.linalg.inv(found.intrinsics).T
    matrix, d = MODELS[model]
    np.testing.assert_allclose(back, project(model, matrix, np.array(d), rays), atol=1e-9)
    places = [found.pixel_map[::-1, int(y), int(x)] for x, y in pixels[[0, 1, 3]]]
    np.testing.assert_allclose(back[[0, 1, 3]], places, atol=1e-3)
    assert distort(np.zeros((0, 2)), found.intrinsics, calibration(model)).shape == (0, 2)


@pytest.mark.parametrize('model', ['plumb_bob', 'rational_polynomial'])
def test_nothing_is_empty_where_no_field_of_view_is_asked(model: str) -> None:
    found = rectified(model, 0, np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    assert found.seen is None and (found.pixels == 200).all()


def test_what_the_lens_does_not_see_is_known() -> None:
    found = rectified('plumb_bob', 120, np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    assert found.seen is not None
    # Where the polynomial turns back, it would show the middle of the picture once more.
    assert not found.seen[[0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert found.seen[HEIGHT // 2].sum() > WIDTH / 2


def test_images_without_distortion_or_calibration_are_not_touched() -> None:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    plain = Calibration(WIDTH, HEIGHT, 'plumb_bob', K, np.zeros(5))
    found = Rectifier(0).rectify(Frame(image, 0, 'camera', plain))
    assert found.pixels is image and found.intrinsics is K
    assert Rectifier(1.0).rectify(Frame(image, 0, 'camera')).pixels is image


def test_maps_are_made_once_for_each_calibration() -> None:
    rectifier = Rectifier(0)
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for model in [*MODELS, *MODELS]:
        rectifier.rectify(Frame(image, 0, 'camera', calibration(model)))
    assert len(rectifier._maps) == len(MODELS)
