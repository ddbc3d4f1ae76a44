# SPDX-License-Identifier: Apache-2.0
"""Torch resizes to what Pillow resizes to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from fake_network import FakeNetwork

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames import resize as resizing
from vggt_ros.frames.batch import PreprocessedImage, stack_images
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.frames.resize import (
    choose_resize,
    resize_by_pillow,
    resize_by_torch,
    resize_on,
    resize_tensor,
)
from vggt_ros.settings import Settings

CPU = torch.device('cpu')
DEVICES = [CPU, *([torch.device('cuda')] if torch.cuda.is_available() else [])]
# source and target, width x height
SIZES = [
    ((1920, 1080), (518, 294)),
    ((640, 480), (84, 56)),
    ((640, 480), (518, 392)),
    ((641, 479), (517, 393)),
    ((97, 61), (223, 139)),
    ((84, 56), (84, 28)),
    ((84, 56), (42, 56)),
    ((33, 21), (33, 21)),
    ((5, 3), (70, 14)),
    ((1, 1), (14, 14)),
    ((300, 2), (14, 14)),
]


def picture(size: tuple[int, int]) -> np.ndarray:
    """Noise, and edges from black to white, at which the cubic overshoots."""
    random = np.random.default_rng(size[0])
    made = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    made[: size[1] // 2] = np.where(made[: size[1] // 2] > 127, 255, 0)
    return made


@pytest.mark.parametrize('device', DEVICES, ids=str)
@pytest.mark.parametrize(('source', 'target'), SIZES, ids=str)
def test_every_value_is_pillows(
    device: torch.device, source: tuple[int, int], target: tuple[int, int]
) -> None:
    image, (width, height) = picture(source), target
    found = resize_on(device, image, height, width)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, resize_by_pillow(image, height, width))


@pytest.mark.parametrize(('source', 'target'), SIZES, ids=str)
def test_fast_resizing_differs_by_a_level_in_a_hundredth(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    image, (width, height) = picture(source), target
    image.setflags(write=False)
    found = choose_resize('cpu', fast=True)(image, height, width)
    assert found.dtype == np.uint8
    apart = np.abs(found.astype(int) - resize_by_pillow(image, height, width))
    assert apart.max() <= 2
    assert np.mean(apart > 0) <= 0.01
    assert np.mean(apart > 1) <= 1e-4


class RecordingNetwork(FakeNetwork):
    """Keeps the images that it should encode ahead."""

    encoded: Mapping[int, PreprocessedImage]

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        self.encoded = images


@pytest.mark.parametrize('fast', [False, True])
def test_the_engine_resizes_as_the_setting_says(fast: bool) -> None:
    settings = Settings.from_flat({'fast_resize': fast, 'min_parallax': 0.0})
    network = RecordingNetwork(image_width=84)
    engine = StreamingEngine(settings, network)
    image = picture((320, 240))
    engine.add(Frame(image, 0, 'camera'))
    engine.encode_ahead()
    (fitted,) = network.encoded.values()
    resize_by = resize_by_torch if fast else resize_by_pillow
    np.testing.assert_array_equal(fitted.pixels, fit_image(image, 84, 'crop', resize_by).pixels)
    other = fit_image(image, 84, 'crop', resize_by_pillow if fast else resize_by_torch)
    assert (fitted.pixels != other.pixels).any()


def test_any_wide_image_is_fitted_as_by_pillow() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        height = int(random.integers(20, 300))
        image = picture((int(height * random.uniform(1, 3)), height))
        width = 14 * int(random.integers(4, 20))
        found = fit_image(image, width, 'crop', partial(resize_on, CPU)).pixels
        np.testing.assert_array_equal(found, fit_image(image, width, 'crop').pixels)


@pytest.mark.parametrize('device', DEVICES, ids=str)
@pytest.mark.parametrize('fit', ['crop', 'pad', 'square'])
def test_images_are_fitted_alike(device: torch.device, fit: str) -> None:
    image = picture((120, 161))
    image.setflags(write=False)  # as those of messages are
    found = fit_image(image, 84, fit, partial(resize_on, device))
    expected = fit_image(image, 84, fit)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.source_from_network, expected.source_from_network)
    there = stack_images([found.pixels], device)
    assert there.device.type == device.type
    torch.testing.assert_close(there.cpu(), stack_images([expected.pixels]))


def test_weights_are_made_once_for_each_size() -> None:
    resizing._weights.cache_clear()
    for _ in range(3):
        resize_tensor(torch.zeros(30, 40, 3, dtype=torch.uint8), 14, 28)
    assert resizing._weights.cache_info().misses == 2
    for length in range(1, 40):
        resize_tensor(torch.zeros(1, 40, 3, dtype=torch.uint8), 1, length)
    assert resizing._weights.cache_info().currsize == 16


def test_a_network_elsewhere_has_its_images_resized_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_resize('cpu', fast=False) is resize_by_pillow
    chosen, where = choose_resize('cuda:1', fast=True), []

    def full(_images: object, device: torch.device) -> None:
        where.append(str(device))
        raise torch.cuda.OutOfMemoryError('the device has no memory left')

    monkeypatch.setattr(resizing, 'upload', full)
    image = picture((40, 30))
    with caplog.at_level(logging.WARNING):
        found = chosen(image, 14, 28)
    assert where == ['cuda:1'] and 'an image is resized on the CPU' in caplog.text
    np.testing.assert_array_equal(found, resize_by_pillow(image, 14, 28))
