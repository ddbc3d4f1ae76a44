# SPDX-License-Identifier: Apache-2.0
"""Input, criteria and result of a bundle adjustment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vggt_ros.frames.batch import Mask
from vggt_ros.geometry.poses import Array


@dataclass(frozen=True, slots=True)
class Tracks:
    """K points tracked through S frames."""

    pixels: Array  # (S, K, 2), x and y in pixels of the network's images, centres at integers
    observed: Mask  # (S, K)
    confidence: Array  # (S, K), in [0, 1]: probability that the pixel is right

    def __post_init__(self) -> None:
        shapes = self.pixels.shape, self.observed.shape, self.confidence.shape
        if len(shapes[0]) != 3 or shapes != ((*shapes[1], 2), shapes[1], shapes[1]):
            raise ValueError(f'tracks are {shapes}; expected (S, K, 2), (S, K) and (S, K)')
        if not np.isfinite(self.pixels[self.observed]).all():
            raise ValueError('an observed pixel is not finite; expected observed=False for it')


@dataclass(frozen=True, slots=True)
class Criteria:
    """What tracks and result must fulfil for the result to be accepted."""

    min_tracks: int = 20  # with two observations or more
    min_per_frame: int = 10
    min_confidence: float = 0.5  # of an observation
    min_parallax: float = 2.0  # pixels; also three times the remaining error
    max_error: float = 3.0  # pixels: rms, and median reprojection error of held-out observations
    min_inliers: float = 0.5  # share of the observations
    refine_focal: bool = True  # if the tracks determine it


@dataclass(frozen=True, slots=True)
class Refinement:
    """Refined cameras and points; the given ones if the refinement was rejected."""

    world_from_camera: Array  # (S, 4, 4), rigid
    intrinsics: Array  # (S, 3, 3), pixels, the same for all frames of a camera
    points: Array  # (K, 3), NaN where a track has none
    inliers: Mask  # (S, K), observations; if rejected, those that were tried
    rejection_reason: str = ''  # '' if accepted
    # Root mean square of the inliers' reprojection errors in x and in y, pixels; before: with the
    # given cameras and the points that fit them best. NaN if unknown.
    rms_before: float = float('nan')
    rms_after: float = float('nan')
    # Median reprojection error of held-out observations, pixels.
    held_out_before: float = float('nan')
    held_out_after: float = float('nan')
    # Relative decrease of the mean of these errors, each limited to the outlier threshold.
    improvement: float = float('nan')
    held_out: int = 0  # observations; 0: too few, inliers are used instead
    parallax: float = float('nan')  # pixels, see `measure_parallax`
    focal_refined: bool = False

    @property
    def accepted(self) -> bool:
        """Whether cameras and points are refined."""
        return not self.rejection_reason

    @property
    def observations(self) -> int:
        """Number of inliers."""
        return int(self.inliers.sum())

    @property
    def tracks(self) -> int:
        """Number of tracks with an inlier."""
        return int(self.inliers.any(0).sum())

    def __str__(self) -> str:
        state = 'refined' if self.accepted else f'not refined, {self.rejection_reason}'
        figures = [f'{self.tracks} tracks, {self.observations} observations']
        if np.isfinite(self.rms_after):
            figures += [
                f'rms {self.rms_before:.2f} to {self.rms_after:.2f} px',
                f'held-out error {self.held_out_before:.2f} to {self.held_out_after:.2f} px',
            ]
        if np.isfinite(self.parallax):
            figures.append(f'parallax {self.parallax:.1f} px')
        return f'{state}: {", ".join(figures)}'
