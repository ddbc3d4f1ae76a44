# SPDX-License-Identifier: Apache-2.0
"""
Why tracks cannot tell where cameras are: too few of them, or a geometry that leaves it open.

All is read from the tracks themselves, since the cameras are what is in doubt.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation
from vggt_ros.offline.colmap_problem import Mask

_PAIRS = 200  # of frames that parallax is looked for in
_TRIMMED = 3  # times the median error beyond which a pair of pixels does not turn along
_THINNEST = 0.02  # rad; what is seen within a strip of this deviation may be on one line


def count_degeneracy(used: Mask, min_tracks: int, min_per_frame: int) -> str:
    """
    Say whether there are too few tracks or frames are not connected by them.

    :param used: (S, K), observations.
    :returns: a sentence, '' if there are enough.
    """
    used = used & (used.sum(0) >= 2)
    tracks = int(used.any(0).sum())
    if tracks < min_tracks:
        return f'{tracks} tracks are seen in two frames or more, {min_tracks} are needed'
    per_frame = used.sum(1)
    poorest = int(per_frame.argmin())
    if per_frame[poorest] < min_per_frame:
        return (
            f'frame {poorest} sees {per_frame[poorest]} tracks that others see too, '
            f'{min_per_frame} are needed'
        )
    apart = _unconnected(used, min_per_frame)
    if apart:
        return (
            f'frames {apart} share fewer than {min_per_frame} tracks with those that are '
            'connected to the first'
        )
    return ''


def _unconnected(used: Mask, shared: int) -> list[int]:
    """List the frames that cannot be reached from the first by tracks."""
    reached = np.zeros(len(used), np.bool_)
    reached[0], grown = True, True
    while grown:
        known = used[reached].any(0)
        now = reached | ((used & known).sum(1) >= shared)
        grown, reached = bool((now != reached).any()), now
    apart: list[int] = np.flatnonzero(~reached).tolist()
    return apart


def collinear_degeneracy(pixels: Array, intrinsics: Array, used: Mask) -> str:
    """
    Say whether all points may lie on one line, about which a camera can turn unseen.

    :param pixels: (S, K, 2).
    :returns: a sentence, '' if they do not.
    """
    thickness = []
    for matrix, places, seen in zip(intrinsics, pixels, used):
        rays = (places[seen] - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
        thickness.append(np.sqrt(max(np.linalg.eigvalsh(np.cov(rays.T))[0], 0)))
    middle = float(np.median(thickness))
    if middle < _THINNEST:
        return (
            f'the points are seen as if on one line: across it they deviate by '
            f'{np.degrees(middle):.2f} degrees, {np.degrees(_THINNEST):.2f} are needed'
        )
    return ''


def measure_parallax(pixels: Array, intrinsics: Array, used: Mask, shared: int) -> float:
    """
    Measure what of the motion in the images is no rotation of the camera.

    For each pair of frames the best rotation is found; what is left is how far the points move by
    their distance. Cameras in one place leave nothing but the noise of the tracks.

    :param pixels: (S, K, 2).
    :param shared: tracks that a pair of frames needs.
    :returns: pixels, the 90 % quantile over pairs of frames of the median over tracks; NaN if no
        pair has enough tracks.
    """
    focal = np.sqrt(intrinsics[:, 0, 0] * intrinsics[:, 1, 1])
    rays = np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1)
    rays = rays @ np.linalg.inv(intrinsics).transpose(0, 2, 1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    common = used.astype(np.int64) @ used.T.astype(np.int64)
    pairs = [(i, j) for i, j in combinations(range(len(used)), 2) if common[i, j] >= shared]
    if not pairs:
        return float('nan')
    left = []
    for place in np.unique(np.linspace(0, len(pairs) - 1, _PAIRS).round().astype(int)):
        i, j = pairs[place]
        both = used[i] & used[j]
        left.append(focal[j] * _beyond_rotation(rays[i, both], rays[j, both]))
    return float(np.quantile(left, 0.9))


def _beyond_rotation(one: Array, other: Array) -> float:
    """Turn rays (K, 3) onto others; the median angle that is left, rad."""
    turning = np.ones(len(one), np.bool_)
    for _ in range(3):
        sums = torch.from_numpy(other[turning].T @ one[turning])
        left = np.linalg.norm(other - one @ nearest_rotation(sums).numpy().T, axis=-1)
        turning = left <= _TRIMMED * np.median(left)
    return float(np.median(left))
