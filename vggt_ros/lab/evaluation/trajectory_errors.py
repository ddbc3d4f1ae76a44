# SPDX-License-Identifier: Apache-2.0
"""
How far an estimated camera path is from the true one.

Monocular geometry has a frame and a unit of its own, so the estimate is first fitted to the truth
by one similarity transform over all camera centres (Umeyama, PAMI 13(4), 1991). What remains is
the absolute trajectory error. Orientations are fitted by themselves: the centres of a straight
path do not tell the roll about it. Matching estimates with truths by stamp is the caller's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation, rotation_angle
from vggt_ros.geometry.sim3 import Sim3


@dataclass(frozen=True, slots=True)
class PathErrors:
    """Errors of a path of S cameras after the fit."""

    truth_from_estimate: Sim3
    length: float  # of the true path, in its unit
    position_rms: float  # absolute trajectory error, in the truth's unit
    rotation_median: float  # rad, between the fitted and the true orientations
    rotation_mean: float  # rad

    @property
    def position_percent(self) -> float:
        """Return the absolute trajectory error as a percentage of the path's length."""
        return 100 * self.position_rms / self.length


def fit_sim3(target: Array, source: Array) -> Sim3:
    """
    Find the similarity that carries one set of points nearest to another, in least squares.

    :param target: (N, 3), at least three, not all in one place.
    :param source: (N, 3), in the same order.
    :returns: `target_from_source`.
    :raises ValueError: for fewer than three points, or if either set is one point in space.
    """
    if len(target) < 3 or target.shape != source.shape:
        raise ValueError(f'found {target.shape} and {source.shape} points, expected N >= 3 alike')
    target_mean, source_mean = target.mean(0), source.mean(0)
    target_spread, source_spread = target - target_mean, source - source_mean
    u, singular, vt = np.linalg.svd(target_spread.T @ source_spread)
    if not (singular[0] > 0 and np.isfinite(singular).all()):
        raise ValueError('all points are in one place, or not finite: no scale can be found')
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((singular * sign).sum() / np.square(source_spread).sum())
    return Sim3(scale, rotation, target_mean - scale * rotation @ source_mean)


def compare_paths(truth: Array, estimate: Array) -> PathErrors:
    """
    Fit an estimated path to the true one and measure what remains.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame and unit.
    :raises ValueError: if there is no fit, see `fit_sim3`.
    """
    truth_from_estimate = fit_sim3(truth[:, :3, 3], estimate[:, :3, 3])
    placed = truth_from_estimate.transform_poses(estimate)
    distance = np.linalg.norm(placed[:, :3, 3] - truth[:, :3, 3], axis=1)
    angle = compare_orientations(truth, estimate)
    return PathErrors(
        truth_from_estimate,
        length=float(np.linalg.norm(np.diff(truth[:, :3, 3], axis=0), axis=1).sum()),
        position_rms=float(np.sqrt(np.square(distance).mean())),
        rotation_median=float(np.median(angle)),
        rotation_mean=float(np.mean(angle)),
    )


def relative_errors(truth: Array, estimate: Array, step: int = 1) -> tuple[Array, Array]:
    """
    Measure how far the motions between frames are from the true ones (relative pose error).

    Sturm et al., A Benchmark for the Evaluation of RGB-D SLAM Systems, IROS 2012, equation 3.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame but in the truth's unit.
    :param step: frames from the beginning of a motion to its end.
    :returns: length (S - step,) and angle (S - step,) rad of what the motion is off by.
    """
    moved, told = (np.linalg.inv(poses[:-step]) @ poses[step:] for poses in (truth, estimate))
    off = np.linalg.inv(moved) @ told
    angle: Array = rotation_angle(torch.from_numpy(off[:, :3, :3])).numpy()
    return np.linalg.norm(off[:, :3, 3], axis=1), angle


def compare_orientations(truth: Array, estimate: Array) -> Array:
    """
    Measure how far each camera is turned from the truth, after one rotation fitted to all.

    :param truth: (S, 4, 4) camera-to-world poses.
    :param estimate: (S, 4, 4), of the same frames, in any frame and unit.
    :returns: (S,) rad.
    """
    found, expected = (torch.from_numpy(poses[:, :3, :3]).double() for poses in (estimate, truth))
    truth_from_estimate = nearest_rotation((expected @ found.transpose(1, 2)).sum(0))
    angle: Array = rotation_angle((truth_from_estimate @ found).transpose(1, 2) @ expected).numpy()
    return angle
