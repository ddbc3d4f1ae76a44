# SPDX-License-Identifier: Apache-2.0
"""
Counter-based random numbers: each depends on a seed and a counter alone.

Every row of a batch has its own seed and stream, independent of the other rows and of the device:
a window is the same alone, in a batch, and in a run that was interrupted. Counters are hashed with
integer arithmetic (the 32-bit mixer `lowbias32` of C. Wellons, 2018), exact on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_STREAM = 0x9E3779B9


class RandomStreams:
    """Independent random streams, one for each of B seeds."""

    def __init__(self, seeds: Tensor) -> None:
        """
        Start the streams.

        :param seeds: (B,) int64, not negative.
        """
        low, high = _mix(seeds & _MASK), seeds >> 32
        self._key = _mix(low ^ (high * _STREAM & _MASK))[:, None]
        self._counter = 0

    @property
    def device(self) -> torch.device:
        """The device of the numbers."""
        return self._key.device

    def bits(self, *shape: int) -> Tensor:
        """Return (B, *shape) int64, uniform over 32 bits."""
        count = math.prod(shape)
        counter = torch.arange(self._counter, self._counter + count, device=self.device)
        self._counter += count
        # Mixed twice: once leaves neighbouring counters of neighbouring keys correlated.
        mixed = _mix(_mix(counter * _STREAM & _MASK) ^ self._key)
        return mixed.reshape(len(self._key), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (B, *shape) float32 in [low, high)."""
        return low + (high - low) * ((self.bits(*shape) >> 8).float() * 2.0**-24)

    def integers(self, count: int, *shape: int) -> Tensor:
        """Return (B, *shape) int64 below `count`."""
        return self.bits(*shape) * count >> 32

    def categorical(self, weights: Sequence[float], *shape: int) -> Tensor:
        """Return (B, *shape) int64: indices into `weights`, with those probabilities."""
        bounds = torch.tensor(weights, device=self.device).cumsum(0)
        return torch.bucketize(
            self.uniform(*shape, high=float(bounds[-1])), bounds[:-1], right=True
        )

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, standard normal."""
        radius = (-2 * (1 - self.uniform(*shape)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(*shape)).cos()

    def permutation(self, count: int) -> Tensor:
        """Return (B, count) int64, one permutation per row."""
        return self.bits(count).argsort(dim=1)


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64; products wrap to their low 32 bits."""
    for shift, factor in _STEPS:
        x = (x ^ (x >> shift)) * factor & _MASK
    return x ^ (x >> 16)
