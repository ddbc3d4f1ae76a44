# SPDX-License-Identifier: Apache-2.0
"""
Voxel-grid downsampling of the points of many windows, to a cloud of limited size.

A voxel has one point, the mean of its points weighted by confidence. If there are more voxels than
allowed, their side is doubled, repeatedly if necessary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MAX_PENDING = 1_000_000  # points that are collected before merging: sorting costs n log n
_MAX_CELL = 1 << 20  # voxels on each side of the origin that a key distinguishes


@dataclass(frozen=True, slots=True)
class VoxelCloud:
    """N points, one per voxel."""

    xyz: npt.NDArray[np.float32]  # (N, 3), world
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), the highest of the voxel
    frame: npt.NDArray[np.int32]  # (N,), index of the first frame that saw the voxel
    keys: npt.NDArray[np.int64]  # (N,), increasing, see `voxel_keys`
    voxel: float  # side, world units


def voxel_keys(xyz: npt.NDArray[np.floating], voxel: float) -> npt.NDArray[np.int64]:
    """
    Compute the keys of the voxels that contain points.

    :param xyz: (N, 3).
    :param voxel: side.
    :returns: (N,); -1 for points more than 2^20 voxels from the origin.
    """
    cells = np.floor(xyz / voxel)
    inside = (np.abs(cells) < _MAX_CELL).all(axis=1)
    x, y, z = (np.where(inside[:, None], cells, 0).astype(np.int64) + _MAX_CELL).T
    return np.where(inside, (x << 42) | (y << 21) | z, -1)


class VoxelGrid:
    """The voxels so far."""

    def __init__(self, voxel: float, max_points: int) -> None:
        """
        Begin without points.

        :param voxel: side, world units.
        """
        if voxel <= 0 or max_points < 1:
            raise ValueError(f'voxel is {voxel} and max_points {max_points}; expected more than 0')
        self._voxel, self._max_points = voxel, max_points
        self._pending: list[npt.NDArray[np.float64]] = []
        self._pending_count = 0
        # Columns: weight, weighted x y z, weighted r g b, highest confidence, first frame.
        self._sums: npt.NDArray[np.float64] = np.empty((0, 9))
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def add(
        self,
        xyz: npt.NDArray[np.floating],
        rgb: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
        frame: npt.NDArray[np.integer],
    ) -> None:
        """Add points: (N, 3), (N, 3), (N,), (N,)."""
        weight = np.maximum(confidence.astype(np.float64), 1e-6)[:, None]
        columns = [weight, weight * xyz, weight * rgb, confidence[:, None], frame[:, None]]
        self._pending.append(np.hstack(columns))
        self._pending_count += len(xyz)
        if self._pending_count >= _MAX_PENDING:
            self._merge_pending()

    def cloud(self) -> VoxelCloud:
        """Return the downsampled cloud."""
        self._merge_pending()
        means = self._sums[:, 1:7] / self._sums[:, :1]
        return VoxelCloud(
            xyz=means[:, :3].astype(np.float32),
            rgb=means[:, 3:].round().clip(0, 255).astype(np.uint8),
            confidence=self._sums[:, 7].astype(np.float32),
            frame=self._sums[:, 8].astype(np.int32),
            keys=self._keys,
            voxel=self._voxel,
        )

    def _merge_pending(self) -> None:
        self._reduce(np.concatenate([self._sums, *self._pending]))
        self._pending.clear()
        self._pending_count = 0
        while len(self._keys) > self._max_points:
            self._voxel *= 2
            self._reduce(self._sums)

    def _reduce(self, rows: npt.NDArray[np.float64]) -> None:
        """Sum the rows of each voxel."""
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
