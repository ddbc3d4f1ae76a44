# SPDX-License-Identifier: Apache-2.0
"""
What tracks determine: points by triangulation, parallax, and degenerate configurations.

Parallax and degeneracies are computed from the tracks alone, without the poses, which are in
doubt.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch

from vggt_ros.frames.batch import Mask
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation

_MAX_PAIRS = 200  # of frames, for parallax
_OUTLIER = 3  # times the median error; such a ray is not used to fit a rotation
_MIN_THICKNESS = 0.02  # rad; points whose rays deviate less from a line may be collinear
_PARALLEL = 1e-6  # ratio of eigenvalues: rays within about 0.1 degree have no intersection


def count_degeneracy(used: Mask, min_tracks: int, min_per_frame: int) -> str:
    """
    Check that there are enough tracks and that they connect all frames.

    :param used: (S, K), observations.
    :returns: what is missing, '' if nothing.
    """
    used = used & (used.sum(0) >= 2)
    tracks = int(used.any(0).sum())
    if tracks < min_tracks:
        return f'{tracks} tracks have two observations or more, {min_tracks} are needed'
    per_frame = used.sum(1)
    fewest = int(per_frame.argmin())
    if per_frame[fewest] < min_per_frame:
        return (
            f'frame {fewest} shares {per_frame[fewest]} tracks with others, '
            f'{min_per_frame} are needed'
        )
    unconnected = _unconnected_frames(used, min_per_frame)
    if unconnected:
        return (
            f'frames {unconnected} share fewer than {min_per_frame} tracks with those that are '
            'connected to the first'
        )
    return ''


def _unconnected_frames(used: Mask, min_shared: int) -> list[int]:
    """List the frames that tracks do not connect with the first."""
    connected = np.zeros(len(used), np.bool_)
    connected[0], grown = True, True
    while grown:
        tracks = used[connected].any(0)
        now = connected | ((used & tracks).sum(1) >= min_shared)
        grown, connected = bool((now != connected).any()), now
    unconnected: list[int] = np.flatnonzero(~connected).tolist()
    return unconnected


def collinear_degeneracy(pixels: Array, intrinsics: Array, used: Mask) -> str:
    """
    Check that the points are not collinear: a camera can rotate about their line unnoticed.

    :param pixels: (S, K, 2).
    :returns: the reason if they may be, '' otherwise.
    """
    thickness = []
    for matrix, points, seen in zip(intrinsics, pixels, used):
        rays = (points[seen] - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
        thickness.append(np.sqrt(max(np.linalg.eigvalsh(np.cov(rays.T))[0], 0)))
    median = float(np.median(thickness))
    if median < _MIN_THICKNESS:
        return (
            f'the points are nearly collinear: they deviate from a line by '
            f'{np.degrees(median):.2f} degrees, {np.degrees(_MIN_THICKNESS):.2f} are needed'
        )
    return ''


def measure_parallax(pixels: Array, intrinsics: Array, used: Mask, min_shared: int) -> float:
    """
    Measure the image motion that no rotation of the camera explains.

    For each pair of frames the best rotation is fitted; what remains is parallax. Without
    translation only the noise of the tracks remains.

    :param pixels: (S, K, 2).
    :param min_shared: tracks that a pair of frames needs.
    :returns: pixels, the 90 % quantile over pairs of frames of the median over tracks; NaN if no
        pair has enough tracks.
    """
    focal = np.sqrt(intrinsics[:, 0, 0] * intrinsics[:, 1, 1])
    rays = np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1)
    rays = rays @ np.linalg.inv(intrinsics).transpose(0, 2, 1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    shared = used.astype(np.int64) @ used.T.astype(np.int64)
    pairs = [(i, j) for i, j in combinations(range(len(used)), 2) if shared[i, j] >= min_shared]
    if not pairs:
        return float('nan')
    parallax = []
    for chosen in np.unique(np.linspace(0, len(pairs) - 1, _MAX_PAIRS).round().astype(int)):
        i, j = pairs[chosen]
        both = used[i] & used[j]
        parallax.append(focal[j] * _residual_angle(rays[i, both], rays[j, both]))
    return float(np.quantile(parallax, 0.9))


def _residual_angle(rays: Array, others: Array) -> float:
    """Rotate rays (K, 3) onto others robustly; returns the median remaining angle, rad."""
    inliers = np.ones(len(rays), np.bool_)
    for _ in range(3):
        sums = torch.from_numpy(others[inliers].T @ rays[inliers])
        angles = np.linalg.norm(others - rays @ nearest_rotation(sums).numpy().T, axis=-1)
        inliers = angles <= _OUTLIER * np.median(angles)
    return float(np.median(angles))


def triangulate(world_from_camera: Array, intrinsics: Array, pixels: Array, used: Mask) -> Array:
    """
    Compute the point with the smallest sum of squared distances to the rays of each track.

    :param world_from_camera: (S, 4, 4), rigid.
    :param intrinsics: (S, 3, 3), pixels, without skew.
    :param pixels: (S, K, 2).
    :param used: (S, K), the observations to use.
    :returns: (K, 3), in the world frame; NaN where rays are too few or parallel, or intersect
        behind most of their cameras.
    """
    focal, centre = intrinsics[:, None, [0, 1], [0, 1]], intrinsics[:, None, :2, 2]
    rays = np.concatenate([(pixels - centre) / focal, np.ones((*pixels.shape[:2], 1))], -1)
    rays = rays @ world_from_camera[:, :3, :3].transpose(0, 2, 1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    rays = np.where(used[..., None], rays, 0)
    origins = world_from_camera[:, None, :3, 3]
    # The part of x - origin across a ray is (I - r r') (x - origin); summed over a track's rays.
    normal = used.sum(0)[:, None, None] * np.eye(3) - np.einsum('ski,skj->kij', rays, rays)
    along = (rays * origins).sum(-1, keepdims=True) * rays
    target = (np.where(used[..., None], origins, 0) - along).sum(0)
    eigenvalues = np.linalg.eigvalsh(normal)
    intersect = (used.sum(0) >= 2) & (eigenvalues[:, 0] > _PARALLEL * eigenvalues[:, 2])
    points = np.full((pixels.shape[1], 3), np.nan)
    points[intersect] = np.linalg.solve(normal[intersect], target[intersect, :, None])[..., 0]
    in_front = ((points - origins) * rays).sum(-1) > 0
    points[(in_front & used).sum(0) <= used.sum(0) / 2] = np.nan
    return points
