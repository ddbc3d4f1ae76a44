# SPDX-License-Identifier: Apache-2.0
"""
Where training windows come from: any `Source`, asked for windows by their place in a sequence.

A source holds no state, so a run that goes on from a checkpoint sees what an uninterrupted one
would have seen, and several processes share a sequence by taking different places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vggt_ros.geometry.camera import invert_rigid, transform_points, unproject
from vggt_ros.lab.synthetic.windows import render_windows, window_seeds
from vggt_ros.lab.training.truth import Truth, normalise_scale


@dataclass(frozen=True)
class Sample:
    """B windows as the network takes them, and what it should say about them."""

    images: Tensor  # (B, S, 3, H, W) in [0, 1]
    truth: Truth  # normalised


class Source(Protocol):
    """An endless sequence of windows."""

    def windows(self, first: int, count: int, frames: int) -> Sample:
        """
        Return some windows.

        :param first: place of the first one in the sequence.
        :param frames: of each window; the same place with other frames is another window.
        """
        ...


@dataclass(frozen=True)
class SyntheticSource:
    """Ray-cast rooms, see `vggt_ros.lab.synthetic`."""

    split: str  # 'train', 'validation' or 'test'
    seed: int
    height: int  # pixels, multiples of the patch size
    width: int
    queries: int = 0  # points to track
    device: torch.device | str = 'cpu'

    def windows(self, first: int, count: int, frames: int) -> Sample:
        """Render windows; see `Source`."""
        seeds = window_seeds(self.split, self.seed, first, count).to(self.device)
        made = render_windows(seeds, frames, self.height, self.width, self.queries)
        return make_sample(
            made.images,
            made.world_from_camera,
            made.intrinsics,
            made.depth,
            made.tracks,
            made.visible,
        )


def make_sample(
    images: Tensor,
    world_from_camera: Tensor,
    intrinsics: Tensor,
    depth: Tensor,
    tracks: Tensor,
    visible: Tensor,
) -> Sample:
    """
    Make a sample of what is known about B windows.

    :param images: (B, S, 3, H, W) in [0, 1].
    :param world_from_camera: (B, S, 4, 4).
    :param intrinsics: (B, S, 3, 3), pixels.
    :param depth: (B, S, H, W), 0 where unknown; its unit is that of the poses.
    :param tracks: (B, S, K, 2), and `visible` (B, S, K); see `Truth`.
    """
    points = transform_points(
        world_from_camera.flatten(0, 1),
        unproject(depth, intrinsics).flatten(0, 1).flatten(1, 2),
    ).view(*depth.shape, 3)
    truth, _ = normalise_scale(
        Truth(
            camera_from_world=invert_rigid(world_from_camera)[..., :3, :],
            intrinsics=intrinsics,
            depth=depth,
            points=points,
            valid=depth > 0,
            tracks=tracks,
            visible=visible,
        )
    )
    return Sample(images, truth)
