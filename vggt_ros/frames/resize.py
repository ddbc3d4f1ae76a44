# SPDX-License-Identifier: Apache-2.0
"""
Bicubic resizing of 8-bit images identical to Pillow's, by Pillow on the CPU and by torch on CUDA.

The published weights were trained on Pillow's antialiased bicubic; other resamplers differ by up
to 30 grey levels. Pillow makes two passes, width first, each rounded to 8 bits, in fixed-point
arithmetic with 22 fractional bits. The same integers give the same image on every device, to the
bit. torch's own resizing of 8-bit images on a CPU differs only in its weights, which have 16 bits.

Pillow 13 starts with the height where images are tall (twice as high as wide) or shrink much more
in height than in width; earlier versions, on whose images the weights were trained, never do, nor
does the torch implementation.

Source: Keys, Cubic convolution interpolation (1981), with a = -0.5; Pillow's manual.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Pixels = npt.NDArray[np.uint8]
Resize = Callable[[Pixels, int, int], Pixels]  # image (H, W, 3), height, width

_BITS = 22  # fractional bits of a weight
_SUPPORT = 2.0  # of the cubic kernel, in pixels of the smaller image
_CACHED = 16  # pairs of lengths whose weights are cached; a camera and a resolution make two

logger = logging.getLogger(__name__)


def choose_resize(device: str, fast: bool) -> Resize:
    """
    Choose the resampler for a network on this device, as torch writes it.

    :param fast: on the CPU, prefer speed to equality with Pillow in every value.
    """
    target = torch.device(device)
    if target.type != 'cpu':
        return functools.partial(resize_on, target)
    return resize_by_torch if fast else resize_by_pillow


def resize_by_pillow(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def resize_by_torch(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3) on the CPU with 16-bit weights, almost identical to Pillow."""
    planes = upload([image], torch.device('cpu')).permute(0, 3, 1, 2)
    size = height, width
    resized = functional.interpolate(planes, size, mode='bicubic', antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def resize_on(device: torch.device, image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3) on a device, or by Pillow if its memory does not suffice."""
    try:
        resized: Pixels = resize_tensor(upload([image], device)[0], height, width).cpu().numpy()
        return resized
    except torch.cuda.OutOfMemoryError:
        logger.warning('the device is out of memory: an image is resized on the CPU')
    return resize_by_pillow(image, height, width)


def upload(images: Sequence[Pixels], device: torch.device) -> Tensor:
    """Copy S images (H, W, 3) of one size to a device: (S, H, W, 3), uint8."""
    stacked = torch.empty(
        (len(images), *images[0].shape), dtype=torch.uint8, pin_memory=device.type == 'cuda'
    )
    np.stack(images, out=stacked.numpy())
    return stacked.to(device, non_blocking=True)


def resize_tensor(image: Tensor, height: int, width: int) -> Tensor:
    """
    Resize an image on its device.

    :param image: (H, W, C), uint8.
    :returns: (height, width, C), uint8, equal to that of Pillow, width first.
    """
    for axis, length in ((1, width), (0, height)):
        if image.shape[axis] != length:
            image = _resize_axis(image, axis, length)
    return image


def _resize_axis(image: Tensor, axis: int, length: int) -> Tensor:
    taps, weights = filter_weights(image.shape[axis], length, image.device)
    size = list(image.shape)
    size[axis] = length
    total = torch.full(size, 1 << (_BITS - 1), dtype=torch.int32, device=image.device)
    for tap, weight in zip(taps, weights, strict=True):
        total += image.index_select(axis, tap) * weight.view((-1, 1) if axis else (-1, 1, 1))
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=_CACHED)
def filter_weights(source: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """
    Compute the filter taps of each output pixel of a line.

    :param source: pixels of the input line.
    :param length: pixels of the output line.
    :returns: indices into the input line (T, length), int64, and their weights in units of
        2^-22, int32, for T taps each.
    """
    scale = source / length
    widening = max(scale, 1.0)  # of the kernel, against aliasing
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum(np.floor(centre - _SUPPORT * widening + 0.5), 0).astype(np.int64)
    end = np.minimum(np.floor(centre + _SUPPORT * widening + 0.5), source).astype(np.int64)
    taps = first + np.arange((end - first).max())[:, None]
    weights = np.where(taps < end, _cubic((taps - centre + 0.5) / widening), 0.0)
    fixed = weights / weights.sum(0) * (1 << _BITS)
    rounded = np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)
    inside = np.minimum(taps, source - 1)
    return torch.from_numpy(inside).to(device), torch.from_numpy(rounded).to(device)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys's cubic with a = -0.5, of the distance in pixels."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < _SUPPORT, far, 0.0))
