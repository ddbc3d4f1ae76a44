# SPDX-License-Identifier: Apache-2.0
"""
Training data: windows with ground truth, and the `Dataset`s that they come from.

A dataset has no state: windows are requested by their index. A run resumed from a checkpoint sees
the windows that an uninterrupted one would have seen, and several processes share a dataset by
requesting different indices.

The network may choose frame and scale of each scene; the losses fix both: the frame is that of the
first camera, the unit the mean distance of the scene's valid points from it (VGGT, section 3.4).
Predictions are never normalised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vggt_ros.geometry.camera import encode_pose, invert_rigid, transform_points, unproject
from vggt_ros.lab.synthetic.windows import render_windows, window_seeds

_SCALE_RANGE = (1e-6, 1e6)
_COUNT_FLOOR = 1e-3  # keeps the scale of a scene without valid points finite


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """B scenes of S frames; all in one frame and unit per scene."""

    camera_from_world: Tensor  # (B, S, 3, 4)
    intrinsics: Tensor  # (B, S, 3, 3) pixels
    depth: Tensor  # (B, S, H, W) along the optical axis
    points: Tensor  # (B, S, H, W, 3) world
    valid: Tensor  # (B, S, H, W) bool, of depth and points
    tracks: Tensor | None = None  # (B, S, K, 2) x, y, pixels; the queries are those of frame 0
    visible: Tensor | None = None  # (B, S, K) bool

    def pose_encodings(self) -> Tensor:
        """Return (B, S, 9), the target of the camera head, with w >= 0."""
        height, width = self.depth.shape[-2:]
        return encode_pose(self.camera_from_world, self.intrinsics, height, width)


@dataclass(frozen=True)
class TrainingBatch:
    """B windows: the network's input and its targets."""

    images: Tensor  # (B, S, 3, H, W) in [0, 1]
    truth: GroundTruth  # normalised


class Dataset(Protocol):
    """An endless sequence of windows."""

    def batch(self, first: int, count: int, frames: int) -> TrainingBatch:
        """
        Return consecutive windows.

        :param first: index of the first window.
        :param count: number of windows.
        :param frames: of each window; an index means another window for each number of frames.
        """
        ...


@dataclass(frozen=True)
class SyntheticDataset:
    """Ray-cast rooms, see `vggt_ros.lab.synthetic`."""

    split: str  # 'train', 'validation' or 'test'
    seed: int
    height: int  # pixels, multiples of the patch size
    width: int
    queries: int = 0  # points to track
    device: torch.device | str = 'cpu'

    def batch(self, first: int, count: int, frames: int) -> TrainingBatch:
        """Render windows; see `Dataset`."""
        seeds = window_seeds(self.split, self.seed, first, count).to(self.device)
        windows = render_windows(seeds, frames, self.height, self.width, self.queries)
        return make_training_batch(
            windows.images,
            windows.world_from_camera,
            windows.intrinsics,
            windows.depth,
            windows.tracks,
            windows.visible,
        )


def make_training_batch(
    images: Tensor,
    world_from_camera: Tensor,
    intrinsics: Tensor,
    depth: Tensor,
    tracks: Tensor,
    visible: Tensor,
) -> TrainingBatch:
    """
    Normalise B windows.

    :param images: (B, S, 3, H, W) in [0, 1].
    :param world_from_camera: (B, S, 4, 4).
    :param intrinsics: (B, S, 3, 3), pixels.
    :param depth: (B, S, H, W), 0 where unknown, in the unit of the poses.
    :param tracks: (B, S, K, 2), and `visible` (B, S, K); see `GroundTruth`.
    """
    points = transform_points(
        world_from_camera.flatten(0, 1),
        unproject(depth, intrinsics).flatten(0, 1).flatten(1, 2),
    ).view(*depth.shape, 3)
    truth, _ = normalise_scale(
        GroundTruth(
            camera_from_world=invert_rigid(world_from_camera)[..., :3, :],
            intrinsics=intrinsics,
            depth=depth,
            points=points,
            valid=depth > 0,
            tracks=tracks,
            visible=visible,
        )
    )
    return TrainingBatch(images, truth)


def normalise_scale(truth: GroundTruth) -> tuple[GroundTruth, Tensor]:
    """
    Transform each scene to the frame of its first camera and the unit of its size.

    :returns: the normalised truth, and the scale (B,) by which depths, points and translations
        were divided.
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
