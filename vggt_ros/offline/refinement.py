# SPDX-License-Identifier: Apache-2.0
"""What goes into a bundle adjustment, what is asked of it, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.offline.colmap_problem import Mask


@dataclass(frozen=True, slots=True)
class Tracks:
    """Where K points are seen in S frames."""

    pixels: Array  # (S, K, 2), x and y in pixels of the network's images, centres at integers
    observed: Mask  # (S, K)
    confidence: Array  # (S, K), in [0, 1]: how likely the place is right

    def __post_init__(self) -> None:
        found = self.pixels.shape, self.observed.shape, self.confidence.shape
        if len(found[0]) != 3 or found != ((*found[1], 2), found[1], found[1]):
            raise ValueError(f'tracks are {found}; expected (S, K, 2), (S, K) and (S, K)')
        if not np.isfinite(self.pixels[self.observed]).all():
            raise ValueError('an observed pixel is not finite; expected observed=False for it')


@dataclass(frozen=True, slots=True)
class Criteria:
    """What is asked of tracks before they move a camera."""

    min_tracks: int = 20  # seen in two frames or more
    min_per_frame: int = 10
    min_confidence: float = 0.5  # of an observation
    min_parallax: float = 2.0  # pixels; also three times the error that is left
    max_error: float = 3.0  # pixels: rms, and median length of what is foretold
    min_agreeing: float = 0.5  # share of the observations that are no outliers
    refine_focal: bool = True  # if the tracks tell it


@dataclass(frozen=True, slots=True)
class Refinement:
    """Cameras and points after refinement; those from before where it was refused."""

    world_from_camera: Array  # (S, 4, 4), rigid
    intrinsics: Array  # (S, 3, 3), pixels, the same for all frames of a camera
    points: Array  # (K, 3), NaN where the track has none
    kept: Mask  # (S, K), the observations that agree; where refused, those that were tried
    why_not: str = ''  # a sentence; '' if accepted
    # Root mean square of the errors in x and in y of the kept observations, pixels; before: with
    # the cameras as they were and the points that fit them best. NaN if not known.
    rms_before: float = float('nan')
    rms_after: float = float('nan')
    # Median length of the error, pixels, of `judges` observations that moved nothing.
    foretold_before: float = float('nan')
    foretold_after: float = float('nan')
    # Share of these errors that is gone, where each counts up to the limit of outliers.
    gain: float = float('nan')
    judges: int = 0  # 0: there were too few, the kept ones judged
    parallax: float = float('nan')  # pixels, see `measure_parallax`
    focal_refined: bool = False

    @property
    def accepted(self) -> bool:
        """Whether anything has changed."""
        return not self.why_not

    @property
    def observations(self) -> int:
        """How many are kept."""
        return int(self.kept.sum())

    @property
    def tracks(self) -> int:
        """How many have a kept observation."""
        return int(self.kept.any(0).sum())

    def __str__(self) -> str:
        figures = (
            f'{self.tracks} tracks, {self.observations} observations, rms {self.rms_before:.2f} '
            f'to {self.rms_after:.2f} px, foretold {self.foretold_before:.2f} to '
            f'{self.foretold_after:.2f} px, parallax {self.parallax:.1f} px'
        )
        return (
            f'refined: {figures}' if self.accepted else f'not refined, {self.why_not} ({figures})'
        )
