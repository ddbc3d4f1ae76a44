# SPDX-License-Identifier: Apache-2.0
"""
Synthetic windows with exact ground truth: images, poses, intrinsics, depth and tracks.

A window depends on its seed and the requested sizes alone. `window_seeds` keeps training,
validation and test windows apart. Images look as from a camera of moderate quality: exposure,
white balance, gamma, blur and noise vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.lab.synthetic.random_motion import random_motion
from vggt_ros.lab.synthetic.random_streams import RandomStreams
from vggt_ros.lab.synthetic.render import cast_rays, render
from vggt_ros.lab.synthetic.rooms import random_rooms, remove_obstacles
from vggt_ros.lab.synthetic.scene import SyntheticScene

SPLITS = ('train', 'validation', 'test')
_FIELD_OF_VIEW = (40.0, 100.0)  # horizontal, degrees
# Height of a pixel over its width: real images are resized to whole patches, a little unevenly.
_PIXEL_ASPECT = (0.88, 1.14)
_OCCLUDED = 0.995  # a ray that ends earlier, relative to the point's distance, is occluded


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
    Return the seeds of consecutive windows of an endless sequence.

    :param split: one of `SPLITS`, which share no window.
    :param seed: of the sequence, 0 to 2^20 - 1.
    :param first: index of the first window, below 2^40.
    :param count: number of windows.
    :returns: (count,) int64.
    :raises ValueError: if a number is out of range.
    """
    if split not in SPLITS or not 0 <= seed < 2**20 or not 0 <= first <= 2**40 - count:
        raise ValueError(
            f'split {split!r}, seed {seed}, first {first}; expected one of {SPLITS}, '
            f'0 <= seed < 2^20 and 0 <= first < 2^40'
        )
    indices = torch.arange(first, first + count)
    return (SPLITS.index(split) << 60) | (seed << 40) | indices


def render_windows(
    seeds: Tensor, frames: int, height: int, width: int, queries: int = 0
) -> SyntheticWindows:
    """
    Render one window for each seed, on the device of the seeds.

    :param seeds: (B,) int64.
    :param queries: points to track in each window, visible in its first frame.
    """
    random = RandomStreams(seeds)
    rooms = random_rooms(random)
    poses = random_motion(random, rooms.half_size[:, 0], frames)
    rooms = remove_obstacles(rooms, poses[..., :3, 3])
    intrinsics = _intrinsics(random, height, width)
    views = rooms.repeat_for_views(frames)
    intrinsics = intrinsics[:, None].expand(-1, frames, 3, 3)
    images, depth = render(views, poses.flatten(0, 1), intrinsics.flatten(0, 1), height, width)
    clean = images.permute(0, 3, 1, 2).unflatten(0, (-1, frames)).float() / 255
    pixels = torch.stack(
        [random.uniform(queries, high=side - 1) for side in (width, height)], dim=-1
    )
    tracks, visible = _track(rooms, views, poses, intrinsics, pixels, (height, width))
    return SyntheticWindows(
        images=_simulate_sensor(random, clean),
        world_from_camera=poses,
        intrinsics=intrinsics,
        depth=depth.unflatten(0, (-1, frames)),
        tracks=tracks,
        visible=visible,
    )


def _intrinsics(random: RandomStreams, height: int, width: int) -> Tensor:
    """Draw intrinsics (B, 3, 3) with VGGT's principal point, the image centre."""
    low, high = (math.radians(angle) for angle in _FIELD_OF_VIEW)
    focal = width / 2 / torch.tan(random.uniform(low=low, high=high) / 2)
    matrix = torch.zeros(len(focal), 3, 3, device=random.device)
    matrix[:, 0, 0] = focal
    matrix[:, 1, 1] = focal * random.uniform(low=_PIXEL_ASPECT[0], high=_PIXEL_ASPECT[1])
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
    Project surface points of the first frame into all frames.

    :param pixels: (B, K, 2) of the points in the first frame.
    :returns: pixels (B, S, K, 2) and visibility (B, S, K).
    """
    batch, frames = poses.shape[:2]
    if pixels.shape[1] == 0:
        return poses.new_zeros(batch, frames, 0, 2), poses.new_zeros(batch, frames, 0).bool()
    first, matrix = poses[:, 0], intrinsics[:, 0]
    x = (pixels[..., 0] - matrix[:, None, 0, 2]) / matrix[:, None, 0, 0]
    y = (pixels[..., 1] - matrix[:, None, 1, 2]) / matrix[:, None, 1, 1]
    rays = first[:, :3, :3] @ torch.stack([x, y, torch.ones_like(x)], dim=1)
    distance, _ = cast_rays(rooms, first[:, :3, 3], rays)
    points = (first[:, :3, 3, None] + distance[:, None] * rays).transpose(1, 2)
    tracks, in_camera = project(
        points[:, None].expand(-1, frames, -1, -1), invert_rigid(poses)[..., :3, :], intrinsics
    )
    origins = poses.flatten(0, 1)[:, :3, 3]
    to_points = (points[:, None] - poses[:, :, None, :3, 3]).flatten(0, 1)
    reached, _ = cast_rays(views, origins, to_points.transpose(1, 2).contiguous())
    limit = tracks.new_tensor([size[1] - 1, size[0] - 1])
    inside = ((tracks >= 0) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
    tracks = torch.where((in_camera[..., 2:] > 0), tracks, 0.0)
    return tracks, inside & (reached.unflatten(0, (batch, frames)) > _OCCLUDED)


# --- the sensor


def _simulate_sensor(random: RandomStreams, images: Tensor) -> Tensor:
    """
    Apply exposure, white balance, gamma, blur and noise.

    :param images: (B, S, 3, H, W) in [0, 1], as rendered.
    :returns: the same shape, in [0, 1].
    """
    frames = images.shape[1]
    gain = 2 ** (
        random.uniform(1, 1, 1, 1, low=-0.7, high=0.5) + 0.1 * random.normal(frames, 1, 1, 1)
    )
    balance = 1 + 0.06 * random.normal(1, 3, 1, 1)
    gamma = random.uniform(1, 1, 1, 1, low=0.75, high=1.3)
    exposed = (images * gain * balance).clamp(1e-4, 1) ** gamma
    exposed = _blur(exposed, random.uniform(1, low=0.0, high=0.25) * random.uniform(frames))
    strength = 0.03 * random.uniform(1, 1, 1, 1) ** 2
    return (exposed + strength * _pixel_noise(random, images.shape)).clamp(0, 1)


def _blur(images: Tensor, weight: Tensor) -> Tensor:
    """Blur with the kernel (w, 1 - 2w, w) along both axes, w (B, S)."""
    side = weight[..., None, None, None].to(images)
    for axis in (-1, -2):
        pad = (1, 1, 0, 0) if axis == -1 else (0, 0, 1, 1)
        padded = functional.pad(images.flatten(0, 1), pad, mode='replicate').unflatten(
            0, images.shape[:2]
        )
        size = images.shape[axis]
        before, after = padded.narrow(axis, 0, size), padded.narrow(axis, 2, size)
        images = torch.lerp(images, (before + after) / 2, 2 * side)
    return images


def _pixel_noise(random: RandomStreams, shape: torch.Size) -> Tensor:
    """Return nearly normal noise from one 32-bit number for each pixel."""
    bits = random.bits(*shape[1:2], 1, *shape[3:])
    # Each channel sums three of the four bytes: any two channels share two of them and have a
    # correlation of 2/3, as after the interpolation of a colour mosaic.
    fields = [(bits >> shift & 255).float() for shift in (0, 8, 16, 24)]
    sums = [fields[i] + fields[i - 1] + fields[i - 2] for i in range(3)]
    return (torch.cat(sums, dim=2) - 382.5) / 128.0  # mean and standard deviation of a sum
