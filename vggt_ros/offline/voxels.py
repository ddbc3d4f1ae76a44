# SPDX-License-Identifier: Apache-2.0
"""
Points of many windows become one cloud of limited size: one point for each voxel that has any.

A voxel's point is the mean of its points, weighed by confidence. Where there are more voxels
than memory is meant for, their side is doubled, as often as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_PENDING = 1_000_000  # points that are gathered before they are sorted in: sorting costs n log n
_REACH = 1 << 20  # voxels on each side of the origin that a key can tell apart


@dataclass(frozen=True, slots=True)
class Cloud:
    """N points."""

    xyz: npt.NDArray[np.float32]  # (N, 3), map frame
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), the best of the voxel
    frame: npt.NDArray[np.int32]  # (N,), the first that saw it
    keys: npt.NDArray[np.int64]  # (N,), rising; of the voxels, see `voxel_keys`
    voxel: float  # side, in the map's unit


def voxel_keys(xyz: npt.NDArray[np.floating], voxel: float) -> npt.NDArray[np.int64]:
    """
    Number the voxels that points lie in.

    :param xyz: (N, 3).
    :returns: (N,); -1 for what lies beyond 2^20 voxels from the origin.
    """
    cells = np.floor(xyz / voxel)
    inside = (np.abs(cells) < _REACH).all(axis=1)
    x, y, z = (np.where(inside[:, None], cells, 0).astype(np.int64) + _REACH).T
    return np.where(inside, (x << 42) | (y << 21) | z, -1)


class VoxelCloud:
    """The cloud so far."""

    def __init__(self, voxel: float, most: int) -> None:
        """
        Begin without points.

        :param voxel: side, in the map's unit.
        :param most: points in the end.
        """
        if voxel <= 0 or most < 1:
            raise ValueError(f'voxel is {voxel} and most {most}; expected more than 0')
        self._voxel, self._most = voxel, most
        self._pending: list[npt.NDArray[np.float64]] = []
        self._waiting = 0
        # Columns: weight, weighted x y z, weighted r g b, best confidence, first frame.
        self._sums: npt.NDArray[np.float64] = np.empty((0, 9))
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def add(
        self,
        xyz: npt.NDArray[np.floating],
        rgb: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
        frame: npt.NDArray[np.integer],
    ) -> None:
        """Take points: (N, 3), (N, 3), (N,), (N,)."""
        weight = np.maximum(confidence.astype(np.float64), 1e-6)[:, None]
        columns = [weight, weight * xyz, weight * rgb, confidence[:, None], frame[:, None]]
        self._pending.append(np.hstack(columns))
        self._waiting += len(xyz)
        if self._waiting >= _PENDING:
            self._merge()

    def cloud(self) -> Cloud:
        """Give the cloud."""
        self._merge()
        means = self._sums[:, 1:7] / self._sums[:, :1]
        return Cloud(
            xyz=means[:, :3].astype(np.float32),
            rgb=means[:, 3:].round().clip(0, 255).astype(np.uint8),
            confidence=self._sums[:, 7].astype(np.float32),
            frame=self._sums[:, 8].astype(np.int32),
            keys=self._keys,
            voxel=self._voxel,
        )

    def _merge(self) -> None:
        self._join(np.concatenate([self._sums, *self._pending]))
        self._pending.clear()
        self._waiting = 0
        while len(self._keys) > self._most:
            self._voxel *= 2
            self._join(self._sums)

    def _join(self, rows: npt.NDArray[np.float64]) -> None:
        keys = voxel_keys(rows[:, 1:4] / rows[:, :1], self._voxel)
        rows, keys = rows[keys >= 0], keys[keys >= 0]
        order = np.argsort(keys, kind='stable')
        rows, keys = rows[order], keys[order]
        self._keys, first = np.unique(keys, return_index=True)
        if not len(first):
            self._sums = rows
            return
        self._sums = np.hstack(
            [
                np.add.reduceat(rows[:, :7], first),
                np.maximum.reduceat(rows[:, 7:8], first),
                np.minimum.reduceat(rows[:, 8:], first),
            ]
        )
