# SPDX-License-Identifier: Apache-2.0
"""Similarity transforms, Sim(3): scale, rotation, translation, in float64.

`x -> scale * rotation @ x + translation`; composed with `@`, so that names chain:
`map_from_camera = map_from_window @ window_from_camera`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array


def _identity() -> Array:
    return np.eye(3)


def _origin() -> Array:
    return np.zeros(3)


@dataclass(frozen=True, slots=True)
class Sim3:
    """A similarity transform; the default is the identity."""

    scale: float = 1.0
    rotation: Array = field(default_factory=_identity)  # (3, 3), determinant +1
    translation: Array = field(default_factory=_origin)  # (3,), in the unit of the target frame

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f'the scale of a Sim3 is {self.scale}, expected more than 0')
        if self.rotation.shape != (3, 3) or self.translation.shape != (3,):
            raise ValueError(
                f'the rotation and translation of a Sim3 have shapes {self.rotation.shape} and '
                f'{self.translation.shape}, expected (3, 3) and (3,)'
            )

    def __matmul__(self, other: Sim3) -> Sim3:
        return Sim3(
            self.scale * other.scale,
            self.rotation @ other.rotation,
            self.scale * (self.rotation @ other.translation) + self.translation,
        )

    def inverse(self) -> Sim3:
        """Return the inverse transform."""
        rotation = self.rotation.T
        return Sim3(1 / self.scale, rotation, -(rotation @ self.translation) / self.scale)

    def apply(self, points: npt.NDArray[np.floating]) -> Array:
        """
        Transform points.

        :param points: (..., 3).
        :returns: (..., 3), float64.
        """
        result: Array = self.scale * (points @ self.rotation.T) + self.translation
        return result

    def transform_poses(self, poses: Array) -> Array:
        """
        Transform rigid poses: positions are scaled, rotations stay orthonormal.

        :param poses: (..., 4, 4), `window_from_camera`.
        :returns: (..., 4, 4), `map_from_camera`.
        """
        transformed = poses.copy()
        transformed[..., :3, :3] = self.rotation @ poses[..., :3, :3]
        transformed[..., :3, 3] = self.apply(poses[..., :3, 3])
        return transformed

    def matrix(self) -> Array:
        """Return the homogeneous matrix (4, 4)."""
        result = np.eye(4)
        result[:3, :3] = self.scale * self.rotation
        result[:3, 3] = self.translation
        return result
