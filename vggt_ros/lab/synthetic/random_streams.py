# SPDX-License-Identifier: Apache-2.0
"""
Random numbers that depend on nothing but a seed and a place in the sequence.

A row of numbers belongs to one seed, whatever else is in the batch, on whichever device: a window
is the same alone, in a batch, and in a run that was interrupted. Made by hashing counters with
integers (the 32-bit mixer `lowbias32` of C. Wellons, 2018), which every device does exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_STREAM = 0x9E3779B9


class Draws:
    """Independent sequences of draws, one for each of B seeds."""

    def __init__(self, seeds: Tensor) -> None:
        """
        Begin the sequences.

        :param seeds: (B,) int64, not negative.
        """
        low, high = _mix(seeds & _MASK), seeds >> 32
        self._key = _mix(low ^ (high * _STREAM & _MASK))[:, None]
        self._next = 0

    @property
    def device(self) -> torch.device:
        """Where the numbers are drawn."""
        return self._key.device

    def bits(self, *shape: int) -> Tensor:
        """Return (B, *shape) int64, uniform over 32 bits."""
        count = math.prod(shape)
        counter = torch.arange(self._next, self._next + count, device=self.device)
        self._next += count
        # Twice, as one round leaves neighbouring counters of neighbouring keys related.
        mixed = _mix(_mix(counter * _STREAM & _MASK) ^ self._key)
        return mixed.reshape(len(self._key), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (B, *shape) float32 in [low, high)."""
        return low + (high - low) * ((self.bits(*shape) >> 8).float() * 2.0**-24)

    def integers(self, count: int, *shape: int) -> Tensor:
        """Return (B, *shape) int64 below `count`."""
        return self.bits(*shape) * count >> 32

    def chosen(self, weights: Sequence[float], *shape: int) -> Tensor:
        """Return (B, *shape) int64: places in `weights`, as often as these say."""
        bounds = torch.tensor(weights, device=self.device).cumsum(0)
        return torch.bucketize(
            self.uniform(*shape, high=float(bounds[-1])), bounds[:-1], right=True
        )

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) float32, standard normal."""
        radius = (-2 * (1 - self.uniform(*shape)).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(*shape)).cos()

    def order(self, count: int) -> Tensor:
        """Return (B, count) int64, a permutation each."""
        return self.bits(count).argsort(dim=1)


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64; products wrap, only their low half is kept."""
    for shift, factor in _STEPS:
        x = (x ^ (x >> shift)) * factor & _MASK
    return x ^ (x >> 16)
