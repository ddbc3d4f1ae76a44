# SPDX-License-Identifier: Apache-2.0
"""
Errors of an estimated trajectory against the ground truth: ATE, RPE and orientation.

Monocular geometry has an arbitrary frame and scale, so the estimate is first aligned with the
ground truth by one similarity over all camera centres (Umeyama, PAMI 13(4), 1991). What remains is
the absolute trajectory error. Orientations are aligned separately: the centres of a straight
trajectory do not determine the roll about it. Associating poses by stamp is the caller's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation, rotation_angle
from vggt_ros.geometry.sim3 import Sim3


@dataclass(frozen=True, slots=True)
class TrajectoryErrors:
    """Errors of a trajectory of S cameras after alignment."""

    truth_from_estimate: Sim3
    length: float  # of the true trajectory, in its unit
    position_rms: float  # absolute trajectory error, in the truth's unit
    rotation_median: float  # rad, between aligned and true orientations
    rotation_mean: float  # rad

    @property
    def position_percent(self) -> float:
        """Return the absolute trajectory error in percent of the trajectory's length."""
        return 100 * self.position_rms / self.length


def fit_sim3(target: Array, source: Array) -> Sim3:
    """
    Fit the least-squares similarity between two point sets.

    :param target: (N, 3), at least three points that do not all coincide.
    :param source: (N, 3), in the same order.
    :returns: `target_from_source`.
    :raises ValueError: for fewer than three points, or if all points of a set coincide.
    """
    if len(target) < 3 or target.shape != source.shape:
        raise ValueError(f'found {target.shape} and {source.shape} points, expected N >= 3 alike')
    target_mean, source_mean = target.mean(0), source.mean(0)
    target_spread, source_spread = target - target_mean, source - source_mean
    u, singular, vt = np.linalg.svd(target_spread.T @ source_spread)
    if not (singular[0] > 0 and np.isfinite(singular).all()):
        raise ValueError('the scale is undetermined: all points coincide, or are not finite')
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((singular * sign).sum() / np.square(source_spread).sum())
    return Sim3(scale, rotation, target_mean - scale * rotation @ source_mean)


def compare_trajectories(truth: Array, estimate: Array) -> TrajectoryErrors:
    """
    Align an estimated trajectory with the true one and compute its errors.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame and scale.
    :raises ValueError: if the alignment is undetermined, see `fit_sim3`.
    """
    truth_from_estimate = fit_sim3(truth[:, :3, 3], estimate[:, :3, 3])
    aligned = truth_from_estimate.transform_poses(estimate)
    distance = np.linalg.norm(aligned[:, :3, 3] - truth[:, :3, 3], axis=1)
    angle = orientation_errors(truth, estimate)
    return TrajectoryErrors(
        truth_from_estimate,
        length=float(np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()),
        position_rms=float(np.sqrt(np.square(distance).mean())),
        rotation_median=float(np.median(angle)),
        rotation_mean=float(np.mean(angle)),
    )


def relative_pose_errors(truth: Array, estimate: Array, step: int = 1) -> tuple[Array, Array]:
    """
    Compute the relative pose error (RPE).

    Sturm et al., A Benchmark for the Evaluation of RGB-D SLAM Systems, IROS 2012, equation 3.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame but in the truth's unit.
    :param step: frames between the two poses of a pair.
    :returns: translation errors (S - step,) and rotation errors (S - step,) in rad.
    """
    true_motion, motion = (np.linalg.inv(p[:-step]) @ p[step:] for p in (truth, estimate))
    error = np.linalg.inv(true_motion) @ motion
    angle: Array = rotation_angle(torch.from_numpy(error[:, :3, :3])).numpy()
    return np.linalg.norm(error[:, :3, 3], axis=1), angle


def orientation_errors(truth: Array, estimate: Array) -> Array:
    """
    Compute the rotation error of each camera after alignment by one rotation.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame and scale.
    :returns: (S,) rad.
    """
    found, expected = (torch.from_numpy(poses[:, :3, :3]).double() for poses in (estimate, truth))
    truth_from_estimate = nearest_rotation((expected @ found.transpose(1, 2)).sum(0))
    angle: Array = rotation_angle((truth_from_estimate @ found).transpose(1, 2) @ expected).numpy()
    return angle
