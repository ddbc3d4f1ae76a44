# SPDX-License-Identifier: Apache-2.0
"""Points from tracks and known cameras: where the rays of a track come nearest to each other."""

from __future__ import annotations

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.offline.colmap_problem import Mask

_SHARPEST = 1e-6  # of the normal equations: rays within about 0.1 degree meet nowhere


def triangulate(world_from_camera: Array, intrinsics: Array, pixels: Array, used: Mask) -> Array:
    """
    Find the point with the smallest sum of squared distances to the rays of each track.

    :param world_from_camera: (S, 4, 4), rigid.
    :param intrinsics: (S, 3, 3), pixels, without skew.
    :param pixels: (S, K, 2).
    :param used: (S, K), the observations to take.
    :returns: (K, 3), in the world's frame; NaN where rays are too few or parallel, or meet behind
        most of their cameras.
    """
    focal, centre = intrinsics[:, None, [0, 1], [0, 1]], intrinsics[:, None, :2, 2]
    rays = np.concatenate([(pixels - centre) / focal, np.ones((*pixels.shape[:2], 1))], -1)
    rays = rays @ world_from_camera[:, :3, :3].transpose(0, 2, 1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    rays = np.where(used[..., None], rays, 0)
    origins = world_from_camera[:, None, :3, 3]
    # What of x - origin is across a ray: (I - r r') (x - origin); summed over the track's rays.
    normal = used.sum(0)[:, None, None] * np.eye(3) - np.einsum('ski,skj->kij', rays, rays)
    along = (rays * origins).sum(-1, keepdims=True) * rays
    target = (np.where(used[..., None], origins, 0) - along).sum(0)
    sizes = np.linalg.eigvalsh(normal)
    meets = (used.sum(0) >= 2) & (sizes[:, 0] > _SHARPEST * sizes[:, 2])
    points = np.full((pixels.shape[1], 3), np.nan)
    points[meets] = np.linalg.solve(normal[meets], target[meets, :, None])[..., 0]
    in_front = ((points - origins) * rays).sum(-1) > 0
    points[(in_front & used).sum(0) <= used.sum(0) / 2] = np.nan
    return points
