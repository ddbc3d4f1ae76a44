# SPDX-License-Identifier: Apache-2.0
"""
What the network should have said about a batch of scenes, in the form that the losses compare.

The network may choose frame and unit of each scene; the losses fix both: the frame is the first
camera, the unit is the mean distance of the scene's valid points from it (VGGT, section 3.4).
Predictions are never normalised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vggt_ros.geometry.camera import encode_pose, invert_rigid, transform_points

_SCALE_RANGE = (1e-6, 1e6)
_COUNT_FLOOR = 1e-3  # a scene without valid points keeps a finite scale


@dataclass(frozen=True, slots=True)
class Truth:
    """B scenes of S frames; all in one frame and unit per scene."""

    camera_from_world: Tensor  # (B, S, 3, 4)
    intrinsics: Tensor  # (B, S, 3, 3) pixels
    depth: Tensor  # (B, S, H, W) along the optical axis
    points: Tensor  # (B, S, H, W, 3) world
    valid: Tensor  # (B, S, H, W) bool: where depth and points are known
    tracks: Tensor | None = None  # (B, S, K, 2) x, y, pixels; frame 0 holds the queries
    visible: Tensor | None = None  # (B, S, K) bool

    def pose_encodings(self) -> Tensor:
        """Return (B, S, 9), as the camera head should have them, with w >= 0."""
        height, width = self.depth.shape[-2:]
        return encode_pose(self.camera_from_world, self.intrinsics, height, width)


def normalise_scale(truth: Truth) -> tuple[Truth, Tensor]:
    """
    Express each scene in the frame of its first camera and in the unit of its size.

    :returns: the truth in those terms, and the old unit's length in the new one's inverse:
        `scale` (B,), by which depths, points and translations were divided.
    """
    world_from_first = invert_rigid(truth.camera_from_world[:, :1])
    cameras = _to_4x4(truth.camera_from_world) @ world_from_first
    first_from_world = truth.camera_from_world[:, 0]
    points = transform_points(first_from_world, truth.points.flatten(1, 3)).view_as(truth.points)
    distance = torch.where(truth.valid, points.norm(dim=-1), 0.0).sum(dim=(1, 2, 3))
    scale = distance / (truth.valid.sum(dim=(1, 2, 3)) + _COUNT_FLOOR)
    scale = scale.clamp(*_SCALE_RANGE)
    cameras = cameras[..., :3, :].clone()
    cameras[..., 3] /= scale[:, None, None]
    divisor = scale[:, None, None, None]
    normalised = replace(
        truth,
        camera_from_world=cameras,
        depth=truth.depth / divisor,
        points=points / divisor[..., None],
    )
    return normalised, scale


def _to_4x4(transform: Tensor) -> Tensor:
    last = transform.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*transform.shape[:-2], 1, 4)
    return torch.cat((transform, last), dim=-2)
