# SPDX-License-Identifier: Apache-2.0
"""What the network says about one batch of windows, still on its device and undecoded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# What mapping needs. Without the point head: unprojected depth is more accurate (VGGT, table 3).
HEADS = ('camera', 'depth')


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output of the heads that were run; the others' fields are None.

    The window frame is the first frame's camera (x right, y down, z forward), in a unit that the
    network chooses for each window.
    """

    # Per refinement step, the last is the best: (B, S, 9), camera from window: translation [0:3]
    # in the window's unit, quaternion xyzw [3:7] not normalised, vertical and horizontal field of
    # view [7:9] in radians, >= 0.
    pose_encodings: list[Tensor] | None = None
    depth: Tensor | None = None  # (B, S, H, W) along the optical axis, window's unit, > 0
    depth_confidence: Tensor | None = None  # (B, S, H, W) no unit, >= 1
    points: Tensor | None = None  # (B, S, H, W, 3) window frame and unit
    points_confidence: Tensor | None = None  # (B, S, H, W) no unit, >= 1
    # (B, S, K, 2) as (x, y), pixels of each network image; of all S frames, whatever depth is of
    tracks: Tensor | None = None
    visibility: Tensor | None = None  # (B, S, K) probability, in [0, 1]
    track_confidence: Tensor | None = None  # (B, S, K) probability, in [0, 1]
    # Per iteration (B, S, K, 2), pixels; the last is `tracks`.
    track_iterations: list[Tensor] | None = None
    # (B, S, C) mean patch token of each frame by itself: what it looks like, to find it again.
    descriptors: Tensor | None = None

    def cpu(self) -> Prediction:
        """Copy every tensor to the host; on a GPU this waits for the network."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                moved[entry.name] = [tensor.cpu() for tensor in value]
            elif value is not None:
                moved[entry.name] = value.cpu()
        return Prediction(**moved)
