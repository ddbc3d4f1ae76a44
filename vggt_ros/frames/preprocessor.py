# SPDX-License-Identifier: Apache-2.0
"""Windows become batches: images of the size that the network reads, and the way back.

Resizing is Pillow's, see `resize.py`. Colours are only divided by 255: the network normalises them
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.rectifier import PinholeImage
from vggt_ros.frames.resize import Pixels, Resize, resize_by_pillow, upload
from vggt_ros.frames.sliding_window import Window
from vggt_ros.settings import PATCH_SIZE

_WHITE, _BLACK = 255, 0
_CPU = torch.device('cpu')

Affine = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PreprocessedImage:
    """One image at the network's size."""

    pixels: Pixels  # (H, W, 3), RGB
    source_from_network: Affine  # (3, 3): homogeneous pixel of `pixels` to pixel of the source
    calibrated: Affine | None = None  # (3, 3) camera matrix of the source, if it is known
    seen: Mask | None = None  # (H, W): the lens saw it; None: all of it
    place: npt.NDArray[np.float32] | None = None  # see `PinholeImage`

    def to_source(self, points: Affine) -> Affine:
        """Turn pixels (..., 2) of `pixels`, as (x, y), into pixels of the source."""
        back = self.source_from_network
        found: Affine = points @ back[:2, :2].T + back[:2, 2]
        return found

    def from_source(self, points: Affine) -> Affine:
        """Turn pixels (..., 2) of the source, as (x, y), into pixels of `pixels`."""
        there = np.linalg.inv(self.source_from_network)
        found: Affine = points @ there[:2, :2].T + there[:2, 2]
        return found

    def intrinsics(self) -> Affine | None:
        """Give the calibrated camera matrix (3, 3) of `pixels`, if there is one."""
        if self.calibrated is None:
            return None
        found: Affine = np.linalg.inv(self.source_from_network) @ self.calibrated
        return found


@dataclass(frozen=True, slots=True)
class Queries:
    """Points to follow through a window."""

    points: npt.NDArray[np.float32]  # (K, 2) as (x, y), pixels of the network's images
    frames: npt.NDArray[np.int64]  # (K,) places of the frames that the points are in
    ids: npt.NDArray[np.int64]  # (K,) numbers of the tracks, see `PointTracker`


@dataclass(frozen=True, slots=True)
class Batch:
    """One window, ready for the network."""

    images: Tensor  # (S, 3, H, W), RGB in [0, 1], on the CPU; H and W multiples of 14
    fitted: tuple[PreprocessedImage, ...]  # S images, as they were before the conversion to float
    frames: tuple[Frame, ...]  # S frames
    ids: tuple[int, ...]  # S frame numbers
    window_id: int
    dense: tuple[int, ...] | None = None  # places of the frames whose depth is wanted; None: all
    queries: Queries | None = None  # points to follow; None: no tracks are wanted

    @property
    def depth_indices(self) -> tuple[int, ...]:
        """Places of the D frames whose depth is wanted."""
        return tuple(range(len(self.ids))) if self.dense is None else self.dense

    def select(self, chosen: Sequence[int]) -> Batch:
        """Keep the frames at these places, in this order; depth of all is wanted, no tracks."""
        return Batch(
            images=self.images[list(chosen)],
            fitted=tuple(self.fitted[i] for i in chosen),
            frames=tuple(self.frames[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            window_id=self.window_id,
        )


def preprocess(
    window: Window,
    width: int,
    fit: str,
    as_pinhole: Callable[[Frame], PinholeImage],
    fitted: dict[int, PreprocessedImage],
    resize: Resize = resize_by_pillow,
) -> Batch:
    """Make a batch of a window; for the other parameters see `fit_frames`."""
    fit_frames(dict(zip(window.ids, window.frames)), width, fit, as_pinhole, fitted, resize)
    images = unify_sizes([fitted[number] for number in window.ids])
    return Batch(
        images=stack_images([image.pixels for image in images]),
        fitted=tuple(images),
        frames=window.frames,
        ids=window.ids,
        window_id=window.window_id,
    )


def fit_frames(
    frames: Mapping[int, Frame],
    width: int,
    fit: str,
    as_pinhole: Callable[[Frame], PinholeImage],
    fitted: dict[int, PreprocessedImage],
    resize: Resize = resize_by_pillow,
) -> None:
    """
    Fit frames to the network, each by itself.

    :param frames: by number.
    :param width: of the network's image, pixels, a multiple of 14.
    :param fit: 'crop', 'pad' or 'square', see `fit_image`.
    :param as_pinhole: brings an image to a camera without distortion.
    :param fitted: images prepared before, by frame number; updated to those of these frames, so
        that a frame is resized once however many windows it is part of.
    :param resize: see `choose_resize`.
    """

    def prepare(frame: Frame) -> PreprocessedImage:
        source = as_pinhole(frame)
        image = fit_image(source.pixels, width, fit, resize)
        seen = None if source.seen is None else _seen(source.seen, image)
        return replace(image, calibrated=source.intrinsics, seen=seen, place=source.place)

    kept = {number: fitted.get(number) or prepare(frame) for number, frame in frames.items()}
    fitted.clear()
    fitted.update(kept)


def _seen(source: Mask, image: PreprocessedImage) -> Mask:
    """Say which pixels (H, W) of a fitted image its source shows."""
    rows, columns = np.indices(image.pixels.shape[:2])
    shown = source.astype(np.float32)
    back = image.source_from_network
    return sample_source(shown, source.shape, back, rows, columns) > 0  # NaN compares false


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


def unify_sizes(images: Sequence[PreprocessedImage]) -> list[PreprocessedImage]:
    """Give images of different sizes the largest height and width, by white bars around them."""
    height = max(image.pixels.shape[0] for image in images)
    width = max(image.pixels.shape[1] for image in images)
    return [_surround(image, height, width) for image in images]


def stack_images(images: Sequence[Pixels], device: torch.device = _CPU) -> Tensor:
    """Turn S images (H, W, 3) into one tensor (S, 3, H, W) in [0, 1], on a device."""
    # colours are sorted as bytes: as floats that takes three times as long
    stacked = upload(images, device).permute(0, 3, 1, 2).contiguous()
    return stacked.to(torch.float32).div_(255)


def sample_source(
    values: npt.NDArray[np.float32],
    source_size: tuple[int, ...],
    source_from_network: Affine,
    rows: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
    place: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """
    Look measurements up at pixels of the network's image, the nearest of each.

    Depth is never averaged: between an edge and what is behind it there is nothing.

    :param values: (h, w), of the same view as the source image, perhaps at another resolution.
    :param source_size: H, W of the source image.
    :param source_from_network: (3, 3), see `PreprocessedImage`.
    :param rows: of the network's image, any shape; `columns` likewise.
    :param place: see `PinholeImage`, where `values` belong to the image before rectification.
    :returns: of that shape; NaN beyond the source's edge.
    """
    per_row, per_column = np.array(values.shape) / source_size[:2]
    y = source_from_network[1, 1] * rows + source_from_network[1, 2]
    x = source_from_network[0, 0] * columns + source_from_network[0, 2]
    if place is not None:
        last_row, last_column = place.shape[1] - 1, place.shape[2] - 1
        at = y.round().astype(np.intp).clip(0, last_row), x.round().astype(np.intp)
        y, x = place[:, at[0], at[1].clip(0, last_column)]
    y, x = (y + 0.5) * per_row, (x + 0.5) * per_column
    inside = (y >= 0) & (y <= values.shape[0]) & (x >= 0) & (x <= values.shape[1])
    found = values[
        y.astype(np.intp).clip(0, values.shape[0] - 1),
        x.astype(np.intp).clip(0, values.shape[1] - 1),
    ]
    return np.where(inside, found, np.float32(np.nan))


def _crop(image: Pixels, width: int, resize: Resize) -> PreprocessedImage:
    source_height, source_width = image.shape[:2]
    height = _whole_patches(source_height * (width / source_width))
    resized = resize(image, height, width)
    top = max((height - width) // 2, 0)
    kept = resized[top : top + width]
    back = _scale_pixels(source_width / width, source_height / height) @ _shift_pixels(0, top)
    return PreprocessedImage(kept, back)


def _pad(image: Pixels, side: int, resize: Resize) -> PreprocessedImage:
    source_height, source_width = image.shape[:2]
    if source_width >= source_height:
        width, height = side, _whole_patches(source_height * (side / source_width))
    else:
        width, height = _whole_patches(source_width * (side / source_height)), side
    resized = resize(image, height, width)
    back = _scale_pixels(source_width / width, source_height / height)
    return _surround(PreprocessedImage(resized, back), side, side)


def _square(image: Pixels, side: int, resize: Resize) -> PreprocessedImage:
    height, width = image.shape[:2]
    longer = max(height, width)
    top, left = (longer - height) // 2, (longer - width) // 2
    canvas = np.full((longer, longer, 3), _BLACK, np.uint8)
    canvas[top : top + height, left : left + width] = image
    back = _shift_pixels(-left, -top) @ _scale_pixels(longer / side, longer / side)
    return PreprocessedImage(resize(canvas, side, side), back)


def _surround(image: PreprocessedImage, height: int, width: int) -> PreprocessedImage:
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
    back = image.source_from_network @ _shift_pixels(-left, -top)
    return replace(image, pixels=canvas, source_from_network=back, seen=seen)


def _whole_patches(length: float) -> int:
    """Round to a multiple of the patch size, half to even as the training code does."""
    return max(round(length / PATCH_SIZE), 1) * PATCH_SIZE


def _scale_pixels(x: float, y: float) -> Affine:
    """Scale pixel coordinates about the image's corner, which lies half a pixel outside (0, 0)."""
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def _shift_pixels(x: float, y: float) -> Affine:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])
