# SPDX-License-Identifier: Apache-2.0
"""What a real camera does to a clean picture: exposure, colour, blur and noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vggt_ros.lab.synthetic.draws import Draws


def expose(draws: Draws, images: Tensor) -> Tensor:
    """
    Take pictures.

    :param images: (B, S, 3, H, W) in [0, 1], as rendered.
    :returns: the same in [0, 1], as a camera of moderate quality would have them.
    """
    frames = images.shape[1]
    gain = 2 ** (
        draws.uniform(1, 1, 1, 1, low=-0.7, high=0.5) + 0.1 * draws.normal(frames, 1, 1, 1)
    )
    balance = 1 + 0.06 * draws.normal(1, 3, 1, 1)
    gamma = draws.uniform(1, 1, 1, 1, low=0.75, high=1.3)
    taken = (images * gain * balance).clamp(1e-4, 1) ** gamma
    taken = _blur(taken, draws.uniform(1, low=0.0, high=0.25) * draws.uniform(frames))
    strength = 0.03 * draws.uniform(1, 1, 1, 1) ** 2
    return (taken + strength * _pixel_noise(draws, images.shape)).clamp(0, 1)


def _blur(images: Tensor, weight: Tensor) -> Tensor:
    """Mix each pixel with its neighbours, (B, S) of its weight going to each side of it."""
    side = weight[..., None, None, None].to(images)
    for axis in (-1, -2):
        pad = (1, 1, 0, 0) if axis == -1 else (0, 0, 1, 1)
        padded = functional.pad(images.flatten(0, 1), pad, mode='replicate').unflatten(
            0, images.shape[:2]
        )
        size = images.shape[axis]
        before, after = padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)
        images = torch.lerp(images, (before + after) / 2, 2 * side)
    return images


def _pixel_noise(draws: Draws, shape: torch.Size) -> Tensor:
    """Return nearly normal noise, from one draw of 32 bits for each pixel."""
    bits = draws.bits(*shape[1:2], 1, *shape[3:])
    # Each channel sums three of the four bytes: any two channels share two of them, and are
    # correlated by 2/3, as after a camera has interpolated its colour mosaic.
    fields = [(bits >> shift & 255).float() for shift in (0, 8, 16, 24)]
    sums = [fields[i] + fields[i - 1] + fields[i - 2] for i in range(3)]
    return (torch.cat(sums, dim=2) - 382.5) / 128.0  # mean and standard deviation of a sum
