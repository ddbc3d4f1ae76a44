# SPDX-License-Identifier: Apache-2.0
"""
Resizing of 8-bit images as Pillow does it, by Pillow on the CPU and by torch on another device.

The published weights were trained on Pillow's antialiased bicubic; other resamplers differ by up
to 30 grey levels. It is two passes, width first, each of which ends in 8 bits, in integers of 22
bits after the point. The same integers give the same image on every device, to the bit. What torch
itself does with 8-bit images on a CPU is the same, but for weights of 16 bits.

Pillow 13 begins with the height where images are tall (twice as high as wide) or shrink much more
in height than in width; earlier versions, on whose images the weights were trained, never do, nor
does the way by torch.

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

_BITS = 22  # after the point, of a weight
_REACH = 2.0  # of the cubic, in pixels of the smaller image
_KEPT = 16  # pairs of lengths whose weights are kept; a camera and a resolution make two

logger = logging.getLogger(__name__)


def choose_resize(device: str, fast: bool) -> Resize:
    """
    Choose what resizes images for a network on this device, as torch writes it.

    :param fast: on the CPU, rather fast than equal to Pillow in every value.
    """
    there = torch.device(device)
    if there.type != 'cpu':
        return functools.partial(resize_on, there)
    return resize_by_torch if fast else resize_by_pillow


def resize_by_pillow(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def resize_by_torch(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3) on the CPU, its weights in 16 bits, nearly as Pillow does it."""
    planes = upload([image], torch.device('cpu')).permute(0, 3, 1, 2)
    size = height, width
    made = functional.interpolate(planes, size, mode='bicubic', antialias=True)
    return np.ascontiguousarray(made[0].permute(1, 2, 0).numpy())


def resize_on(device: torch.device, image: Pixels, height: int, width: int) -> Pixels:
    """Resize an image (H, W, 3) on a device, or by Pillow if its memory does not suffice."""
    try:
        found: Pixels = resize_tensor(upload([image], device)[0], height, width).cpu().numpy()
        return found
    except torch.cuda.OutOfMemoryError:
        logger.warning('the device is out of memory: an image is resized on the CPU')
    return resize_by_pillow(image, height, width)


def upload(images: Sequence[Pixels], device: torch.device) -> Tensor:
    """Bring S images (H, W, 3) of one size to a device: (S, H, W, 3), uint8."""
    stacked = torch.empty(
        (len(images), *images[0].shape), dtype=torch.uint8, pin_memory=device.type == 'cuda'
    )
    np.stack(images, out=stacked.numpy())
    return stacked.to(device, non_blocking=True)


def resize_tensor(image: Tensor, height: int, width: int) -> Tensor:
    """
    Resize an image on its device.

    :param image: (H, W, C), uint8.
    :returns: (height, width, C), uint8, what Pillow makes of it, width first.
    """
    for axis, length in ((1, width), (0, height)):
        if image.shape[axis] != length:
            image = _resize_axis(image, axis, length)
    return image


def _resize_axis(image: Tensor, axis: int, length: int) -> Tensor:
    places, weights = _weights(image.shape[axis], length, image.device)
    size = list(image.shape)
    size[axis] = length
    total = torch.full(size, 1 << (_BITS - 1), dtype=torch.int32, device=image.device)
    for place, weight in zip(places, weights, strict=True):
        total += image.index_select(axis, place) * weight.view((-1, 1) if axis else (-1, 1, 1))
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=_KEPT)
def _weights(source: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """
    Say what each new pixel of a line is made of.

    :param source: pixels of the old line.
    :param length: pixels of the new one.
    :returns: places in the old line (T, length), int64, and their weights in units of
        2^-22, int32, for T terms of each.
    """
    scale = source / length
    stretch = max(scale, 1.0)
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum(np.floor(centre - _REACH * stretch + 0.5), 0).astype(np.int64)
    beyond = np.minimum(np.floor(centre + _REACH * stretch + 0.5), source).astype(np.int64)
    places = first + np.arange((beyond - first).max())[:, None]
    weights = np.where(places < beyond, _cubic((places - centre + 0.5) / stretch), 0.0)
    fixed = weights / weights.sum(0) * (1 << _BITS)
    rounded = np.trunc(fixed + np.copysign(0.5, fixed)).astype(np.int32)
    inside = np.minimum(places, source - 1)
    return torch.from_numpy(inside).to(device), torch.from_numpy(rounded).to(device)


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys's cubic with a = -0.5, of the distance in pixels."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < _REACH, far, 0.0))
