# SPDX-License-Identifier: Apache-2.0
"""The output of the network for a batch of windows, on its device and with encoded poses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# What mapping needs. Without the point head: unprojected depth is more accurate (VGGT, table 3).
HEADS = ('camera', 'depth')


@dataclass(frozen=True, slots=True)
class Prediction:
    """Output of the heads that were run; the fields of the others are None.

    The window frame is the first frame's camera (x right, y down, z forward); its scale is
    arbitrary and differs between windows.
    """

    # Per iteration, the last is the best: (B, S, 9), camera from window: translation [0:3] in the
    # window's scale, quaternion xyzw [3:7] not normalised, vertical and horizontal field of view
    # [7:9] in radians, >= 0.
    pose_encodings: list[Tensor] | None = None
    depth: Tensor | None = None  # (B, S, H, W) along the optical axis, window's scale, > 0
    depth_confidence: Tensor | None = None  # (B, S, H, W) unitless, >= 1
    points: Tensor | None = None  # (B, S, H, W, 3) window frame and scale
    points_confidence: Tensor | None = None  # (B, S, H, W) unitless, >= 1
    # (B, S, K, 2) as (x, y), pixels of the network images; of all S frames, even if depth is not.
    tracks: Tensor | None = None
    visibility: Tensor | None = None  # (B, S, K) probability, in [0, 1]
    track_confidence: Tensor | None = None  # (B, S, K) probability, in [0, 1]
    # Per iteration (B, S, K, 2), pixels; the last is `tracks`.
    track_iterations: list[Tensor] | None = None
    # (B, S, C) mean patch token of each frame, encoded independently: for place recognition.
    descriptors: Tensor | None = None

    def cpu(self) -> Prediction:
        """Copy every tensor to the host; on a GPU this waits for the network to finish."""
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                moved[entry.name] = [tensor.cpu() for tensor in value]
            elif value is not None:
                moved[entry.name] = value.cpu()
        return Prediction(**moved)
