# SPDX-License-Identifier: Apache-2.0
"""
Whole windows with exact truth: room, motion, pictures, depth, and points to track.

A window follows from its seed and the sizes asked for alone. `window_seeds` keeps training,
validation and test windows apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.lab.synthetic.draws import Draws
from vggt_ros.lab.synthetic.motion import move
from vggt_ros.lab.synthetic.render import cast, render
from vggt_ros.lab.synthetic.rooms import clear_path, furnish
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.lab.synthetic.sensor import expose

SPLITS = ('train', 'validation', 'test')
FIELD_OF_VIEW = (40.0, 100.0)  # horizontal, degrees
# Height of a pixel over its width: real images are resized to whole patches, a little unevenly.
PIXEL_ASPECT = (0.88, 1.14)
_OCCLUDED = 0.995  # a ray that ends earlier, relative to the point's distance, is blocked


@dataclass(frozen=True)
class SyntheticWindows:
    """B windows of S frames; lengths in metres, world frame z up."""

    images: Tensor  # (B, S, 3, H, W) in [0, 1]
    world_from_camera: Tensor  # (B, S, 4, 4)
    intrinsics: Tensor  # (B, S, 3, 3) pixels
    depth: Tensor  # (B, S, H, W) along the optical axis
    tracks: Tensor  # (B, S, K, 2) x, y, pixels; may lie outside of the image
    visible: Tensor  # (B, S, K) bool


def window_seeds(split: str, seed: int, first: int, count: int) -> Tensor:
    """
    Return the seeds of some windows of an endless sequence.

    :param split: one of `SPLITS`, which share no window.
    :param seed: of the sequence, 0 to 2^20 - 1.
    :param first: place of the first window, `count` further ones follow; below 2^40.
    :returns: (count,) int64.
    :raises ValueError: if a number is out of range.
    """
    if split not in SPLITS or not 0 <= seed < 2**20 or not 0 <= first <= 2**40 - count:
        raise ValueError(
            f'split {split!r}, seed {seed}, first {first}; expected one of {SPLITS}, '
            f'0 <= seed < 2^20 and 0 <= first < 2^40'
        )
    places = torch.arange(first, first + count)
    return (SPLITS.index(split) << 60) | (seed << 40) | places


def render_windows(
    seeds: Tensor, frames: int, height: int, width: int, queries: int = 0
) -> SyntheticWindows:
    """
    Make one window for each seed, on the device of the seeds.

    :param seeds: (B,) int64.
    :param queries: points to track in each window, seen in its first frame.
    """
    draws = Draws(seeds)
    rooms = furnish(draws)
    poses = move(draws, rooms.half_size[:, 0], frames)
    rooms = clear_path(rooms, poses[..., :3, 3])
    intrinsics = _intrinsics(draws, height, width)
    views = rooms.for_views(frames)
    intrinsics = intrinsics[:, None].expand(-1, frames, 3, 3)
    images, depth = render(views, poses.flatten(0, 1), intrinsics.flatten(0, 1), height, width)
    clean = images.permute(0, 3, 1, 2).unflatten(0, (-1, frames)).float() / 255
    pixels = torch.stack(
        [draws.uniform(queries, high=side - 1) for side in (width, height)], dim=-1
    )
    tracks, visible = _track(rooms, views, poses, intrinsics, pixels, (height, width))
    return SyntheticWindows(
        images=expose(draws, clean),
        world_from_camera=poses,
        intrinsics=intrinsics,
        depth=depth.unflatten(0, (-1, frames)),
        tracks=tracks,
        visible=visible,
    )


def _intrinsics(draws: Draws, height: int, width: int) -> Tensor:
    """Return (B, 3, 3) of cameras with the principal point of VGGT's, in the middle."""
    low, high = (math.radians(angle) for angle in FIELD_OF_VIEW)
    focal = width / 2 / torch.tan(draws.uniform(low=low, high=high) / 2)
    matrix = torch.zeros(len(focal), 3, 3, device=draws.device)
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * draws.uniform(low=PIXEL_ASPECT[0], high=PIXEL_ASPECT[1])
    matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = width / 2, height / 2, 1
    return matrix


def _track(
    rooms: SyntheticScene,
    views: SyntheticScene,
    poses: Tensor,
    intrinsics: Tensor,
    pixels: Tensor,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """
    Follow surface points through all frames.

    :param pixels: (B, K, 2) where they are in the first frame.
    :returns: pixels (B, S, K, 2), and whether each is seen there (B, S, K).
    """
    batch, frames = poses.shape[:2]
    if pixels.shape[1] == 0:
        return poses.new_zeros(batch, frames, 0, 2), poses.new_zeros(batch, frames, 0).bool()
    first, matrix = poses[:, 0], intrinsics[:, 0]
    x = (pixels[..., 0] - matrix[:, None, 0, 2]) / matrix[:, None, 0, 0]
    y = (pixels[..., 1] - matrix[:, None, 1, 2]) / matrix[:, None, 1, 1]
    rays = first[:, :3, :3] @ torch.stack([x, y, torch.ones_like(x)], dim=1)
    distance, _ = cast(rooms, first[:, :3, 3], rays)
    points = (first[:, :3, 3, None] + distance[:, None] * rays).transpose(1, 2)
    tracks, in_camera = project(
        points[:, None].expand(-1, frames, -1, -1), invert_rigid(poses)[..., :3, :], intrinsics
    )
    origins = poses.flatten(0, 1)[:, :3, 3]
    toward = points[:, None] - poses[:, :, None, :3, 3]
    reached, _ = cast(views, origins, toward.flatten(0, 1).transpose(1, 2).contiguous())
    limit = tracks.new_tensor([size[1] - 1, size[0] - 1])
    inside = ((tracks >= 0) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
    tracks = torch.where((in_camera[..., 2:] > 0), tracks, 0.0)
    return tracks, inside & (reached.unflatten(0, (batch, frames)) > _OCCLUDED)
