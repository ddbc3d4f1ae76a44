# SPDX-License-Identifier: Apache-2.0
"""
Random camera motion of robots and hand-held cameras, a batch of windows at a time.

Total translation and rotation are drawn per window, whatever its number of frames: long and short
windows have the same baseline on average.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.random_streams import RandomStreams
from vggt_ros.lab.synthetic.rooms import CLEARANCE
from vggt_ros.lab.synthetic.trajectories import level_camera_poses

# Kinds of motion and their probabilities.
MOTIONS = {
    'forward': 0.22,
    'lateral': 0.2,
    'any': 0.15,
    'arc': 0.2,
    'handheld': 0.12,
    'rotation': 0.07,
    'stationary': 0.04,
}
_SHUFFLED = 0.25  # share of the windows with frames in random order


@dataclasses.dataclass(frozen=True)
class _MotionParameters:
    """The motion of each window, independent of the room; all (B,)."""

    distance: Tensor  # m
    course: Tensor  # rad, direction of travel from the viewing direction
    curvature: Tensor  # rad, change of course over the window
    rotation: Tensor  # rad, change of yaw over the window
    jitter: Tensor  # strength of the noise between frames, about 1


def random_motion(
    random: RandomStreams, half_room: Tensor, frames: int, kind: int | None = None
) -> Tensor:
    """
    Move one camera through each room.

    :param half_room: (B, 3) m, half the extent of each room.
    :param kind: index into `MOTIONS`; None: drawn per window.
    :returns: world_from_camera (B, S, 4, 4), at least `CLEARANCE` away from the walls.
    """
    kinds = random.categorical(list(MOTIONS.values()))
    if kind is not None:
        kinds = torch.full_like(kinds, kind)
    motion = _motion_parameters(random, kinds)
    progress = (0.4 + random.uniform(frames)).cumsum(1)
    progress = (progress - progress[:, :1]) / (progress[:, -1:] - progress[:, :1]).clamp(min=1e-6)
    low = torch.stack(
        [-half_room[:, 0], -half_room[:, 1], torch.zeros_like(half_room[:, 2])], dim=-1
    )
    high = torch.stack([half_room[:, 0], half_room[:, 1], 2 * half_room[:, 2]], dim=-1)
    low, high = low + CLEARANCE, high - CLEARANCE
    start, heading = _start_pose(random, low, high)
    course = heading + motion.course
    angle = motion.curvature[:, None] * progress
    distance, jitter = motion.distance[:, None], motion.jitter[:, None]
    along = distance * progress * torch.sinc(angle / math.pi)
    across = distance * progress * (angle / 2).sin() * torch.sinc(angle / 2 / math.pi)
    cos, sin = course.cos()[:, None], course.sin()[:, None]
    height = 0.2 * (random.uniform(1) - 0.5) * progress * (distance > 0)
    track = torch.stack([cos * along - sin * across, sin * along + cos * across, height], dim=-1)
    track = (
        track
        + 0.02
        * jitter[..., None]
        * random.normal(frames, 3)
        * (motion.distance > 0)[:, None, None]
    )
    position = _fit_into_room(track, start, low, high)
    yaw = heading[:, None] + motion.rotation[:, None] * (progress - 0.5)
    yaw = yaw + 0.02 * jitter * random.normal(frames)
    pitch = -0.1 + 0.14 * random.normal(1) + 0.015 * jitter * random.normal(frames)
    pitch = pitch + 0.1 * random.normal(1) * progress * (distance > 0)
    roll = 0.05 * random.normal(1) + 0.015 * jitter * random.normal(frames)
    poses = level_camera_poses(
        position.flatten(0, 1), yaw.flatten(), pitch.clamp(-0.8, 0.8).flatten()
    )
    poses = _apply_roll(poses.unflatten(0, yaw.shape), roll)
    order = random.permutation(frames)
    in_order = torch.arange(frames, device=random.device).expand_as(order)
    order = torch.where(random.uniform(1) < _SHUFFLED, order, in_order)
    return poses.gather(1, order[..., None, None].expand_as(poses))


def _motion_parameters(random: RandomStreams, kinds: Tensor) -> _MotionParameters:
    """Draw the motion of each window by its kind (B,)."""
    kind_is = {name: kinds == index for index, name in enumerate(MOTIONS)}
    side = torch.where(random.uniform() < 0.5, -1.0, 1.0)
    distance = random.uniform(low=0.1, high=1.5)
    distance = torch.where(kind_is['handheld'], 0.3 * distance, distance)
    distance = torch.where(kind_is['rotation'] | kind_is['stationary'], 0.0, distance)
    course = (2 * random.uniform() - 1) * math.pi
    course = torch.where(kind_is['forward'] | kind_is['arc'], 0.25 * random.normal(), course)
    course = torch.where(kind_is['lateral'], side * math.pi / 2 + 0.2 * random.normal(), course)
    curvature = torch.where(kind_is['arc'], side * random.uniform(low=0.2, high=1.0), 0.0)
    rotation = 0.28 * random.normal() + curvature
    rotation = torch.where(kind_is['rotation'], side * random.uniform(low=0.1, high=0.9), rotation)
    rotation = torch.where(kind_is['stationary'], 0.0, rotation).clamp(-0.9, 0.9)
    jitter = 0.5 + random.uniform()
    jitter = torch.where(kind_is['handheld'], 2.5 * jitter, jitter)
    jitter = torch.where(kind_is['stationary'], 0.1 * jitter, jitter)
    return _MotionParameters(distance, course, curvature, rotation, jitter)


def _start_pose(random: RandomStreams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the start (B, 3) and the yaw (B,) of a view towards another point of the room."""
    start = low + (high - low) * random.uniform(3)
    height = random.uniform(low=0.4, high=1.6).minimum(high[:, 2])
    start = torch.cat([start[:, :2], height[:, None]], dim=-1)
    target = low + (high - low) * random.uniform(3)
    x, y = (target - start)[:, :2].unbind(-1)
    return start, torch.atan2(y, x)


def _fit_into_room(track: Tensor, start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale and translate tracks (B, S, 3) from `start` (B, 3) until they lie inside the room."""
    first, last = track.amin(1), track.amax(1)
    extent = (last - first).clamp(min=1e-6)
    scale = ((high - low) / extent).amin(-1).clamp(max=1.0)[:, None]
    origin = torch.maximum(torch.minimum(start, high - scale * last), low - scale * first)
    return origin[:, None] + scale[..., None] * track


def _apply_roll(poses: Tensor, angle: Tensor) -> Tensor:
    """Rotate cameras (B, S, 4, 4) about their optical axes by (B, S) rad."""
    roll = torch.eye(4, device=poses.device).repeat(*angle.shape, 1, 1)
    roll[..., 0, 0], roll[..., 0, 1] = angle.cos(), -angle.sin()
    roll[..., 1, 0], roll[..., 1, 1] = angle.sin(), angle.cos()
    return poses @ roll
