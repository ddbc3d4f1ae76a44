# SPDX-License-Identifier: Apache-2.0
"""
How well the cameras of a map are known, from how well its windows agree.

A window and the one before put each shared camera twice into the map. These pairs scatter about
the joint that was fitted to them, and that scatter is all that is measured here. With n shared
cameras, pairs that scatter with the variance v along each axis, and errors that are independent:

- the joint, a mean over n pairs, has the variance v / n. Errors of joints add up along the map,
  those of rotation and of scale, of which the shared frames' scales tell the same way, with
  their lever from the shared cameras to the camera in question;
- a camera within its window has v / 2, since a pair holds two such errors. The first camera of
  the map has that, too: it defines the map's frame, so its error tilts all that follows;
- the network's confidence goes against its expected error (the minimum of the loss
  gamma * e * c - alpha * log(c) over c is at e = alpha / (gamma * c), VGGT section 3.4), so a
  camera whose frame has half of the confidence of the shared ones gets twice their deviation;
- where the scale is measured, its relative deviation moves a camera away from the map's origin.

Not contained: what all windows have in common, such as a network that bends every straight way.
The truth is then outside. Closed loops do not make it smaller, though they make the map better.
"""

from __future__ import annotations

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.mapping.registration import Registration

_FEWEST = 2  # shared cameras; one agrees with itself always


class PoseCovariance:
    """The covariance of the cameras of the map that is being made."""

    def __init__(self) -> None:
        # Of the newest window, as a body at the map's origin: shift, turn, logarithm of the scale.
        self._joints = np.zeros((7, 7))
        self._scatter: tuple[float, float] | None = None  # variances: unit^2, rad^2
        self._confidence = np.nan  # of the frames that these were measured by

    def start_map(self) -> None:
        """Begin with a window that nothing is known of but that it is the map."""
        self._joints = np.zeros((7, 7))
        self._scatter = None

    def join(self, registration: Registration, confidence: float) -> None:
        """
        Take the joint of the next window.

        :param confidence: mean over its shared frames.
        """
        if registration.shared < _FEWEST:
            self._joints += np.full((7, 7), np.nan)  # the way from here to the origin is unknown
            return
        shift, turn = registration.translation_variance, registration.rotation_variance
        if self._scatter is None:
            self._joints += np.diag([shift] * 3 + [turn] * 3 + [0.0]) / 2  # the first camera
        # The joint turns and stretches about the middle of the shared cameras.
        about = np.eye(7)
        about[:3, 3:6] = _cross(registration.middle)
        about[:3, 6] = -registration.middle
        # one frame with depth does not tell how scales scatter
        stretch = np.nan_to_num(registration.scale_variance)
        spread = np.diag([shift] * 3 + [turn] * 3 + [stretch])
        spread /= registration.shared
        self._joints += about @ spread @ about.T
        self._scatter, self._confidence = (shift, turn), confidence

    def covariance(self, centres: Array, confidence: Array, scale_spread: float) -> Array | None:
        """
        Say how well cameras of the newest window are known.

        :param centres: (S, 3), in map units.
        :param confidence: (S,), mean over each frame.
        :param scale_spread: relative deviation of the scale; NaN: unknown, left out.
        :returns: (S, 6, 6), of x, y, z and of the rotations about the fixed axes of the map, in
            map units and rad; None while no joint of the map has told.
        """
        if self._scatter is None or not np.isfinite(self._joints).all():
            return None
        shift, turn = self._scatter
        own = np.diag([shift] * 3 + [turn] * 3) / 2
        told = []
        for centre, trust in zip(centres, confidence, strict=True):
            at = np.eye(6, 7)
            at[:3, 3:6] = -_cross(centre)
            at[:3, 6] = centre
            one = at @ self._joints @ at.T + own * (self._confidence / trust) ** 2
            if np.isfinite(scale_spread):
                one[:3, :3] += scale_spread**2 * np.outer(centre, centre)
            told.append(one)
        return np.stack(told)


def _cross(vector: Array) -> Array:
    """Return the matrix (3, 3) that takes the cross product with a vector from the left."""
    x, y, z = vector
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
