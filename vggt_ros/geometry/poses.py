# SPDX-License-Identifier: Apache-2.0
"""Poses as position and quaternion (7 numbers), their interpolation, and 4×4 matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import matrix_from_quaternion

Array = npt.NDArray[np.float64]


def interpolate_poses(
    stamps: Array, poses: Array, query_stamps: Array, max_gap: float, max_extrapolation: float
) -> Array:
    """
    Interpolate measured poses.

    Quaternions are interpolated linearly and normalised, which equals a constant angular velocity
    over the short gaps of motion capture or odometry.

    :param stamps: (N,), s, increasing.
    :param poses: (N, 7): position, then quaternion x, y, z, w.
    :param query_stamps: (M,), s.
    :param max_gap: s between neighbours to interpolate over.
    :param max_extrapolation: s before the first and after the last pose for which that pose is
        used.
    :returns: (M, 4, 4); NaN where the gap or the extrapolation would be larger.
    """
    if len(stamps) == 0:
        return np.full((len(query_stamps), 4, 4), np.nan)
    if len(stamps) == 1:  # as if it were measured twice
        stamps, poses = stamps.repeat(2), poses.repeat(2, axis=0)
    after = np.searchsorted(stamps, query_stamps).clip(1, len(stamps) - 1)
    before = after - 1
    gap = stamps[after] - stamps[before]
    fraction = (query_stamps - stamps[before]) / np.maximum(gap, 1e-9)
    extrapolation = np.maximum(stamps[0] - query_stamps, query_stamps - stamps[-1])
    valid = (gap <= max_gap) & (extrapolation <= max_extrapolation)
    fraction = fraction.clip(0, 1)[:, None]
    position = (1 - fraction) * poses[before, :3] + fraction * poses[after, :3]
    q0, q1 = poses[before, 3:], poses[after, 3:]
    q1 = np.where((q0 * q1).sum(1, keepdims=True) < 0, -q1, q1)
    quaternion = (1 - fraction) * q0 + fraction * q1
    result = matrices_from_poses(np.concatenate((position, quaternion), axis=1))
    result[~valid] = np.nan
    return result


def pose_from_message(position: Any, orientation: Any) -> list[float]:
    """Convert a point or vector and a quaternion of geometry_msgs to 7 numbers."""
    return [
        *(float(getattr(position, axis)) for axis in 'xyz'),
        *(float(getattr(orientation, axis)) for axis in 'xyzw'),
    ]


def matrices_from_poses(poses: Array) -> Array:
    """Convert (N, 7), position and quaternion x, y, z, w of any norm, to (N, 4, 4)."""
    matrices = np.tile(np.eye(4), (len(poses), 1, 1))
    matrices[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(poses[:, 3:])).numpy()
    matrices[:, :3, 3] = poses[:, :3]
    return matrices
