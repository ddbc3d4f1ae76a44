# SPDX-License-Identifier: Apache-2.0
"""Images are preprocessed as in training, and pixels map back to the source exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vggt_ros.frames.batch import stack_images
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import Preprocessor, fit_image, pad_to_common_size
from vggt_ros.frames.sliding_window import Window
from vggt_ros.io.images import read_image
from vggt_ros.settings import CameraSettings, ModelSettings

GOLDEN = Path(__file__).parents[2] / 'shared' / 'vggt' / 'golden_public' / 'preprocess'


def gradient(height: int, width: int) -> np.ndarray:
    """Return an image whose red grows with x and green with y, by 0.5 grey levels a pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width) // 2
    image[..., 1] = (np.arange(height) // 2)[:, None]
    return image


@pytest.mark.parametrize('fit', ['crop', 'pad', 'square'])
@pytest.mark.parametrize(('height', 'width'), [(240, 320), (400, 300), (120, 500), (300, 300)])
def test_source_from_network_maps_pixels_to_those_of_the_same_colour(
    fit: str, height: int, width: int
) -> None:
    fitted = fit_image(gradient(height, width), 140, fit)
    assert all(side % 14 == 0 for side in fitted.pixels.shape[:2])
    v, u = np.mgrid[0 : fitted.pixels.shape[0], 0 : fitted.pixels.shape[1]]
    pixels = np.stack([u, v, np.ones_like(u)], -1) @ fitted.source_from_network.T
    x, y = pixels[..., 0], pixels[..., 1]
    inside = (x > 8) & (x < width - 9) & (y > 8) & (y < height - 9)
    assert inside.sum() > 1000
    # resampling preserves the linear gradient, so the colour encodes the position, up to rounding
    assert np.abs(fitted.pixels[inside, 0] - (x[inside] - 0.5) / 2).max() < 1.1
    assert np.abs(fitted.pixels[inside, 1] - (y[inside] - 0.5) / 2).max() < 1.1


def test_images_of_different_sizes_are_padded_with_white() -> None:
    wide, tall = (
        fit_image(gradient(100, 300), 84, 'crop'),
        fit_image(gradient(300, 100), 84, 'crop'),
    )
    padded = pad_to_common_size([wide, tall])
    assert [image.pixels.shape for image in padded] == [(84, 84, 3)] * 2
    assert (padded[0].pixels[0] == 255).all()
    top = (84 - wide.pixels.shape[0]) // 2
    source_pixel = wide.source_from_network @ np.array([5.0, 3, 1])
    np.testing.assert_allclose(padded[0].source_from_network @ [5, 3 + top, 1], source_pixel)


def test_a_frame_is_preprocessed_once_for_consecutive_windows() -> None:
    frames = [Frame(gradient(60, 80), stamp, 'camera') for stamp in range(4)]
    preprocessor = Preprocessor(ModelSettings(), CameraSettings(), 56)
    first = preprocessor.process(window_of(frames, (0, 1, 2)))
    second = preprocessor.process(window_of(frames, (1, 2, 3)))
    assert second.images[0].pixels is first.images[1].pixels
    # images of frames that left the window are not kept
    again = preprocessor.process(window_of(frames, (0, 1, 2)))
    assert again.images[0].pixels is not first.images[0].pixels
    assert second.image_size == (42, 56)
    assert second.stack().shape == (3, 3, 42, 56)
    assert second.stack().dtype == torch.float32
    assert second.select([0, 2]).ids == (1, 3)
    assert torch.equal(second.select([0, 2]).stack(), second.stack()[::2])


def window_of(frames: list[Frame], ids: tuple[int, ...]) -> Window:
    return Window(0, tuple(frames[i] for i in ids), ids, 0, '')


def test_an_unknown_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="'fill', expected"):
        fit_image(gradient(60, 80), 56, 'fill')


def test_a_file_that_is_not_an_image_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / 'note.png'
    path.write_text('not an image')
    with pytest.raises(ValueError, match='cannot be read as an image'):
        read_image(path)


@pytest.mark.skipif(not GOLDEN.exists(), reason='the golden images are not beside the repository')
def test_preprocessing_equals_the_reference() -> None:
    golden = np.load(GOLDEN / 'outputs_uint8.npz')
    for name, entry in json.loads((GOLDEN / 'meta.json').read_text())['entries'].items():
        fit = entry.get('mode', 'square')
        width = entry.get('target_size', 518)
        images = [fit_image(read_image(GOLDEN / file), width, fit) for file in entry['files']]
        ours = stack_images([image.pixels for image in pad_to_common_size(images)])
        assert list(ours.shape) == entry['shape'], name
        difference = (ours * 255 - torch.from_numpy(golden[name]).float()).abs()
        assert (difference <= 1).float().mean() >= 0.999, name
        assert (difference < 1e-3).float().mean() >= 0.999, name
