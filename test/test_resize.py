# SPDX-License-Identifier: Apache-2.0
"""Images resized by torch are identical to those resized by Pillow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from fake_network import FakeNetwork
from torch.overrides import TorchFunctionMode

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import PreprocessedImage, stack_images
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.frames.resize import (
    choose_resize,
    filter_weights,
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


def noise_image(size: tuple[int, int]) -> np.ndarray:
    """Return noise, the upper half black and white, at whose edges the cubic overshoots."""
    random = np.random.default_rng(size[0])
    image = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
    image[: size[1] // 2] = np.where(image[: size[1] // 2] > 127, 255, 0)
    return image


@pytest.mark.parametrize('device', DEVICES, ids=str)
@pytest.mark.parametrize(('source', 'target'), SIZES, ids=str)
def test_torch_resizes_like_pillow_to_the_bit(
    device: torch.device, source: tuple[int, int], target: tuple[int, int]
) -> None:
    image, (width, height) = noise_image(source), target
    resized = resize_on(device, image, height, width)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, resize_by_pillow(image, height, width))


@pytest.mark.parametrize(('source', 'target'), SIZES, ids=str)
def test_fast_resizing_differs_in_a_hundredth_of_the_values_by_a_grey_level(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    image, (width, height) = noise_image(source), target
    image.setflags(write=False)
    resized = choose_resize('cpu', fast=True)(image, height, width)
    assert resized.dtype == np.uint8
    difference = np.abs(resized.astype(int) - resize_by_pillow(image, height, width))
    assert difference.max() <= 2
    assert np.mean(difference > 0) <= 0.01
    assert np.mean(difference > 1) <= 1e-4


class RecordingNetwork(FakeNetwork):
    """Records the images to encode ahead."""

    images: Mapping[int, PreprocessedImage]

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        self.images = images


@pytest.mark.parametrize('fast', [False, True])
def test_the_engine_resizes_according_to_the_setting(fast: bool) -> None:
    settings = Settings.from_flat({'fast_resize': fast, 'min_parallax': 0.0})
    network = RecordingNetwork(image_width=84)
    engine = StreamingEngine(settings, network)
    image = noise_image((320, 240))
    engine.add(Frame(image, 0, 'camera'))
    engine.encode_ahead()
    (preprocessed,) = network.images.values()
    chosen, other = (resize_by_torch, resize_by_pillow)[:: 1 if fast else -1]
    expected = fit_image(image, 84, 'crop', chosen).pixels
    np.testing.assert_array_equal(preprocessed.pixels, expected)
    assert (preprocessed.pixels != fit_image(image, 84, 'crop', other).pixels).any()


def test_wide_images_of_any_size_are_fitted_as_by_pillow() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        height = int(random.integers(20, 300))
        image = noise_image((int(height * random.uniform(1, 3)), height))
        width = 14 * int(random.integers(4, 20))
        fitted = fit_image(image, width, 'crop', partial(resize_on, CPU)).pixels
        np.testing.assert_array_equal(fitted, fit_image(image, width, 'crop').pixels)


@pytest.mark.parametrize('device', DEVICES, ids=str)
@pytest.mark.parametrize('fit', ['crop', 'pad', 'square'])
def test_every_fit_is_the_same_on_every_device(device: torch.device, fit: str) -> None:
    image = noise_image((120, 161))
    image.setflags(write=False)  # like the images of messages
    fitted = fit_image(image, 84, fit, partial(resize_on, device))
    expected = fit_image(image, 84, fit)
    np.testing.assert_array_equal(fitted.pixels, expected.pixels)
    np.testing.assert_array_equal(fitted.source_from_network, expected.source_from_network)
    stacked = stack_images([fitted.pixels], device)
    assert stacked.device.type == device.type
    torch.testing.assert_close(stacked.cpu(), stack_images([expected.pixels]))


def test_filter_weights_are_computed_once_for_each_size() -> None:
    filter_weights.cache_clear()
    for _ in range(3):
        resize_tensor(torch.zeros(30, 40, 3, dtype=torch.uint8), 14, 28)
    assert filter_weights.cache_info().misses == 2
    for length in range(1, 40):
        resize_tensor(torch.zeros(1, 40, 3, dtype=torch.uint8), 1, length)
    assert filter_weights.cache_info().currsize == 16


class FullDevice(TorchFunctionMode):
    """Simulates a CUDA device without free memory: allocations on the host are not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []  # that were to be copied to

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {}), 'pin_memory': False} if function is torch.empty else kwargs
        if function is torch.Tensor.to:
            self.devices.append(str(args[1]))
            raise torch.cuda.OutOfMemoryError('the device is out of memory')
        return function(*args, **(kwargs or {}))


def test_images_are_resized_on_the_device_of_the_network_or_if_it_is_full_on_the_cpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose_resize('cpu', fast=False) is resize_by_pillow
    resize = choose_resize('cuda:1', fast=True)
    image = noise_image((40, 30))
    with caplog.at_level(logging.WARNING), FullDevice() as full:
        resized = resize(image, 14, 28)
    assert full.devices == ['cuda:1'] and 'an image is resized on the CPU' in caplog.text
    np.testing.assert_array_equal(resized, resize_by_pillow(image, 14, 28))
