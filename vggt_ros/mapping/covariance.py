# SPDX-License-Identifier: Apache-2.0
"""
The covariance of the cameras of a map, estimated from how well its windows agree.

A window and its predecessor put each shared camera twice into the map. These pairs scatter about
the registration that was fitted to them, and that scatter is all that is measured here. With n
shared cameras, pairs that scatter with variance v along each axis, and independent errors:

- the registration, a mean over n pairs, has the variance v / n. Errors of registrations
  accumulate along the map; those of rotation and scale act with the lever arm from the shared
  cameras to the camera in question;
- a camera within its window has v / 2, since a pair contains two such errors. This includes the
  first camera of the map: it defines the map frame, so its error tilts everything after it;
- the network's confidence is inversely proportional to its expected error (the minimum of the
  loss gamma * e * c - alpha * log(c) over c is at e = alpha / (gamma * c), VGGT section 3.4), so
  a camera whose frame has half of the confidence of the shared ones gets twice their deviation;
- where the scale is measured, its relative deviation moves a camera away from the map's origin.

Not included: errors that all windows have in common, such as a network that bends every straight
trajectory. The truth is then outside. Closed loops do not shrink the covariance, though they
improve the map.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.mapping.registration import Registration

_MIN_SHARED = 2  # cameras; a single one always agrees with itself


def _zero() -> Array:
    return np.zeros((7, 7))


@dataclass(frozen=True, slots=True)
class PoseUncertainty:
    """How well the newest window of a map is known, as a rigid body with a scale."""

    # (7, 7) covariance of the window at the map's origin: translation, rotation, log of the scale.
    window: Array = field(default_factory=_zero)
    known: bool = True  # False: a registration could not be judged; so is all that follows
    # Variances of the cameras within a window: map units squared, rad^2; None: not measured yet.
    scatter: tuple[float, float] | None = None
    confidence: float = 0.0  # mean over the frames that `scatter` was measured from

    def __post_init__(self) -> None:
        if self.window.shape != (7, 7):
            raise ValueError(f'covariance of shape {self.window.shape}, expected (7, 7)')

    def after(self, registration: Registration, confidence: float) -> PoseUncertainty:
        """
        Propagate over the registration of the next window.

        :param confidence: mean over its shared frames.
        """
        if registration.shared < _MIN_SHARED:
            return replace(self, known=False)
        translation, rotation = registration.translation_variance, registration.rotation_variance
        window = self.window
        if self.scatter is None:
            first_camera = np.diag([translation] * 3 + [rotation] * 3 + [0.0]) / 2
            window = window + first_camera
        # The registration rotates and scales about the centroid of the shared cameras.
        lever = np.eye(7)
        lever[:3, 3:6] = _cross(registration.centroid)
        lever[:3, 6] = -registration.centroid
        # one frame with depth does not show how scales scatter
        scale = np.nan_to_num(registration.scale_variance)
        spread = np.diag([translation] * 3 + [rotation] * 3 + [scale])
        spread /= registration.shared
        return PoseUncertainty(
            window=window + lever @ spread @ lever.T,
            known=self.known,
            scatter=(translation, rotation),
            confidence=confidence,
        )

    def covariance(self, centres: Array, confidence: Array, scale_spread: float) -> Array | None:
        """
        Compute the covariance of cameras of the newest window.

        :param centres: (S, 3), in map units.
        :param confidence: (S,), mean over each frame.
        :param scale_spread: relative deviation of the scale; NaN: unknown, left out.
        :returns: (S, 6, 6), of x, y, z and of the rotations about the fixed axes of the map, in
            map units and rad; None before the first registration of the map.
        """
        if self.scatter is None or not self.known or not np.isfinite(self.window).all():
            return None
        translation, rotation = self.scatter
        own = np.diag([translation] * 3 + [rotation] * 3) / 2
        covariances = []
        for centre, camera_confidence in zip(centres, confidence, strict=True):
            lever = np.eye(6, 7)
            lever[:3, 3:6] = -_cross(centre)
            lever[:3, 6] = centre
            camera = lever @ self.window @ lever.T
            camera += own * (self.confidence / camera_confidence) ** 2
            if np.isfinite(scale_spread):
                camera[:3, :3] += scale_spread**2 * np.outer(centre, centre)
            covariances.append(camera)
        return np.stack(covariances)


def _cross(vector: Array) -> Array:
    """Return the matrix (3, 3) of the cross product with a vector from the left."""
    x, y, z = vector
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
