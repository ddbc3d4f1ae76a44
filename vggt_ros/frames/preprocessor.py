# SPDX-License-Identifier: Apache-2.0
"""Windows become batches: images are rectified, then brought to the size the network reads.

`Preprocessor` keeps the images of the frames in the window, so that a frame is resized once
however many windows contain it. Resizing is Pillow's, see `resize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vggt_ros.frames.batch import Batch, Mask, PreprocessedImage, sample_source
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.rectifier import Rectifier, use_as_rectified
from vggt_ros.frames.resize import Pixels, Resize, choose_resize, resize_by_pillow
from vggt_ros.frames.sliding_window import Window
from vggt_ros.geometry.poses import Array
from vggt_ros.settings import PATCH_SIZE, CameraSettings, ModelSettings

_WHITE, _BLACK = 255, 0


class Preprocessor:
    """Rectifies and resizes frames; keeps the results for the next window."""

    def __init__(
        self, model: ModelSettings, camera: CameraSettings, width: int, device: str = 'cpu'
    ) -> None:
        """
        Choose the output size and the resampler.

        :param width: of the network's images, pixels, a multiple of the patch size.
        :param device: of the network, as torch writes it; images are resized there.
        """
        self._width = width
        self._fit = model.fit
        self._resize = choose_resize(device, model.fast_resize)
        self._rectify = (
            Rectifier(math.radians(camera.rectified_field_of_view)).rectify
            if camera.rectify
            else use_as_rectified
        )
        self._images: dict[int, PreprocessedImage] = {}

    def process(self, window: Window) -> Batch:
        """Make the batch of a window; images of different sizes are padded to a common one."""
        images = self.process_frames(dict(zip(window.ids, window.frames)))
        return Batch(
            images=tuple(pad_to_common_size(list(images.values()))),
            frames=window.frames,
            ids=window.ids,
            window_id=window.window_id,
        )

    def process_frames(self, frames: Mapping[int, Frame]) -> dict[int, PreprocessedImage]:
        """
        Preprocess frames one by one, and forget all others.

        :param frames: by id.
        :returns: by id, in the same order; each at a size of its own.
        """
        self._images = {
            frame_id: self._images.get(frame_id) or self._process_frame(frame)
            for frame_id, frame in frames.items()
        }
        return self._images

    def _process_frame(self, frame: Frame) -> PreprocessedImage:
        source = self._rectify(frame)
        image = fit_image(source.pixels, self._width, self._fit, self._resize)
        seen = None if source.seen is None else _resample_mask(source.seen, image)
        return replace(
            image, source_intrinsics=source.intrinsics, seen=seen, pixel_map=source.pixel_map
        )


def fit_image(
    image: Pixels, width: int, fit: str, resize: Resize = resize_by_pillow
) -> PreprocessedImage:
    """
    Bring one image to the network's size.

    :param image: (H, W, 3), RGB.
    :param width: target, pixels, a multiple of 14.
    :param fit: 'crop': to this width, height to the nearest multiple of 14, at most square, the
        surplus rows cut off evenly. 'pad': the longer side to this width, white bars to a square.
        'square': black bars to a square, then to this width.
    :raises ValueError: for an unknown `fit`.
    """
    if fit == 'crop':
        return _crop(image, width, resize)
    if fit == 'pad':
        return _pad(image, width, resize)
    if fit == 'square':
        return _square(image, width, resize)
    raise ValueError(f"fit is {fit!r}, expected 'crop', 'pad' or 'square'")


def pad_to_common_size(images: Sequence[PreprocessedImage]) -> list[PreprocessedImage]:
    """Pad images with white bars to the largest height and width among them."""
    height = max(image.pixels.shape[0] for image in images)
    width = max(image.pixels.shape[1] for image in images)
    return [_pad_image(image, height, width) for image in images]


def _crop(image: Pixels, width: int, resize: Resize) -> PreprocessedImage:
    source_height, source_width = image.shape[:2]
    height = _whole_patches(source_height * (width / source_width))
    resized = resize(image, height, width)
    top = max((height - width) // 2, 0)
    kept = resized[top : top + width]
    scale = _scale_pixels(source_width / width, source_height / height)
    return PreprocessedImage(kept, scale @ _translate_pixels(0, top))


def _pad(image: Pixels, side: int, resize: Resize) -> PreprocessedImage:
    source_height, source_width = image.shape[:2]
    if source_width >= source_height:
        width, height = side, _whole_patches(source_height * (side / source_width))
    else:
        width, height = _whole_patches(source_width * (side / source_height)), side
    resized = resize(image, height, width)
    scale = _scale_pixels(source_width / width, source_height / height)
    return _pad_image(PreprocessedImage(resized, scale), side, side)


def _square(image: Pixels, side: int, resize: Resize) -> PreprocessedImage:
    height, width = image.shape[:2]
    longer = max(height, width)
    top, left = (longer - height) // 2, (longer - width) // 2
    canvas = np.full((longer, longer, 3), _BLACK, np.uint8)
    canvas[top : top + height, left : left + width] = image
    scale = _scale_pixels(longer / side, longer / side)
    return PreprocessedImage(resize(canvas, side, side), _translate_pixels(-left, -top) @ scale)


def _pad_image(image: PreprocessedImage, height: int, width: int) -> PreprocessedImage:
    rows, columns = image.pixels.shape[:2]
    if (rows, columns) == (height, width):
        return image
    top, left = (height - rows) // 2, (width - columns) // 2
    inside = slice(top, top + rows), slice(left, left + columns)
    canvas = np.full((height, width, 3), _WHITE, np.uint8)
    canvas[inside] = image.pixels
    seen = image.seen
    if seen is not None:
        seen = np.zeros((height, width), np.bool_)
        seen[inside] = image.seen
    source_from_network = image.source_from_network @ _translate_pixels(-left, -top)
    return replace(image, pixels=canvas, source_from_network=source_from_network, seen=seen)


def _resample_mask(source: Mask, image: PreprocessedImage) -> Mask:
    """Compute which pixels (H, W) of a resized image its source shows."""
    rows, columns = np.indices(image.pixels.shape[:2])
    values = source.astype(np.float32)
    affine = image.source_from_network
    return sample_source(values, source.shape, affine, rows, columns) > 0  # NaN compares false


def _whole_patches(length: float) -> int:
    """Round to a multiple of the patch size, half to even as the training code does."""
    return max(round(length / PATCH_SIZE), 1) * PATCH_SIZE


def _scale_pixels(x: float, y: float) -> Array:
    """Scale pixel coordinates about the image's corner, half a pixel outside of (0, 0)."""
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def _translate_pixels(x: float, y: float) -> Array:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])
