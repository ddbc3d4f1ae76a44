# SPDX-License-Identifier: Apache-2.0
"""
How a robot's or a hand-held camera moves through a room, many windows at a time.

Total travel and turn are drawn for the whole window, whatever its number of frames: long and
short windows then show a scene from equally far apart.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.draws import Draws
from vggt_ros.lab.synthetic.path import camera_poses
from vggt_ros.lab.synthetic.rooms import CLEARANCE

# Kind of motion and how often it occurs.
MOTIONS = {
    'forward': 0.22,
    'lateral': 0.2,
    'any': 0.15,
    'arc': 0.2,
    'handheld': 0.12,
    'rotation': 0.07,
    'still': 0.04,
}
_SHUFFLED = 0.25  # share of the windows whose frames come in any order


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a window's path looks like before it is put into a room; all (B,)."""

    travel: Tensor  # m
    course: Tensor  # rad, direction of travel from the direction of view
    bend: Tensor  # rad, change of course over the window
    turn: Tensor  # rad, change of view over the window
    shake: Tensor  # strength of what happens from frame to frame, about 1


def move(draws: Draws, room: Tensor, frames: int, kind: int | None = None) -> Tensor:
    """
    Drive through rooms.

    :param room: (B, 3) m, half the extent of each room.
    :param kind: place in `MOTIONS`; None: each window its own.
    :returns: world_from_camera (B, S, 4, 4), at least `CLEARANCE` away from the walls.
    """
    kinds = draws.chosen(list(MOTIONS.values()))
    if kind is not None:
        kinds = torch.full_like(kinds, kind)
    shape = _shape(draws, kinds)
    progress = (0.4 + draws.uniform(frames)).cumsum(1)
    progress = (progress - progress[:, :1]) / (progress[:, -1:] - progress[:, :1]).clamp(min=1e-6)
    room_low = torch.stack([-room[:, 0], -room[:, 1], torch.zeros_like(room[:, 2])], dim=-1)
    room_high = torch.stack([room[:, 0], room[:, 1], 2 * room[:, 2]], dim=-1)
    room_low, room_high = room_low + CLEARANCE, room_high - CLEARANCE
    start, heading = _stand(draws, room_low, room_high)
    course = heading + shape.course
    angle = shape.bend[:, None] * progress
    along = shape.travel[:, None] * progress * torch.sinc(angle / math.pi)
    across = shape.travel[:, None] * progress * (angle / 2).sin() * torch.sinc(angle / 2 / math.pi)
    cos, sin = course.cos()[:, None], course.sin()[:, None]
    shake = shape.shake[:, None]
    height = 0.2 * (draws.uniform(1) - 0.5) * progress * (shape.travel[:, None] > 0)
    path = torch.stack([cos * along - sin * across, sin * along + cos * across, height], dim=-1)
    path = (
        path
        + 0.02 * shake[..., None] * draws.normal(frames, 3) * (shape.travel > 0)[:, None, None]
    )
    position = _fit(path, start, room_low, room_high)
    yaw = heading[:, None] + shape.turn[:, None] * (progress - 0.5)
    yaw = yaw + 0.02 * shake * draws.normal(frames)
    pitch = -0.1 + 0.14 * draws.normal(1) + 0.015 * shake * draws.normal(frames)
    pitch = pitch + 0.1 * draws.normal(1) * progress * (shape.travel[:, None] > 0)
    roll = 0.05 * draws.normal(1) + 0.015 * shake * draws.normal(frames)
    poses = camera_poses(position.flatten(0, 1), yaw.flatten(), pitch.clamp(-0.8, 0.8).flatten())
    poses = _roll(poses.unflatten(0, yaw.shape), roll)
    order = draws.order(frames)
    in_order = torch.arange(frames, device=draws.device).expand_as(order)
    order = torch.where(draws.uniform(1) < _SHUFFLED, order, in_order)
    return poses.gather(1, order[..., None, None].expand_as(poses))


def _shape(draws: Draws, kinds: Tensor) -> _Shape:
    """Draw the motion of each window by its kind."""
    kind_is = {name: kinds == index for index, name in enumerate(MOTIONS)}
    side = torch.where(draws.uniform() < 0.5, -1.0, 1.0)
    travel = draws.uniform(low=0.1, high=1.5)
    travel = torch.where(kind_is['handheld'], 0.3 * travel, travel)
    travel = torch.where(kind_is['rotation'] | kind_is['still'], 0.0, travel)
    course = (2 * draws.uniform() - 1) * math.pi
    course = torch.where(kind_is['forward'] | kind_is['arc'], 0.25 * draws.normal(), course)
    course = torch.where(kind_is['lateral'], side * math.pi / 2 + 0.2 * draws.normal(), course)
    bend = torch.where(kind_is['arc'], side * draws.uniform(low=0.2, high=1.0), 0.0)
    turn = 0.28 * draws.normal() + bend
    turn = torch.where(kind_is['rotation'], side * draws.uniform(low=0.1, high=0.9), turn)
    turn = torch.where(kind_is['still'], 0.0, turn).clamp(-0.9, 0.9)
    shake = 0.5 + draws.uniform()
    shake = torch.where(kind_is['handheld'], 2.5 * shake, shake)
    shake = torch.where(kind_is['still'], 0.1 * shake, shake)
    return _Shape(travel, course, bend, turn, shake)


def _stand(draws: Draws, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Choose where a path begins (B, 3) and the direction of view (B,), into the room."""
    start = low + (high - low) * draws.uniform(3)
    height = draws.uniform(low=0.4, high=1.6).minimum(high[:, 2])
    start = torch.cat([start[:, :2], height[:, None]], dim=-1)
    target = low + (high - low) * draws.uniform(3)
    x, y = (target - start)[:, :2].unbind(-1)
    return start, torch.atan2(y, x)


def _fit(path: Tensor, start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Shrink and shift paths (B, S, 3) from `start` (B, 3) until they lie inside the room."""
    first, last = path.amin(1), path.amax(1)
    extent = (last - first).clamp(min=1e-6)
    shrink = ((high - low) / extent).amin(-1).clamp(max=1.0)[:, None]
    place = torch.maximum(torch.minimum(start, high - shrink * last), low - shrink * first)
    return place[:, None] + shrink[..., None] * path


def _roll(poses: Tensor, angle: Tensor) -> Tensor:
    """Turn cameras (B, S, 4, 4) about their optical axes by (B, S) rad."""
    turn = torch.eye(4, device=poses.device).repeat(*angle.shape, 1, 1)
    turn[..., 0, 0], turn[..., 0, 1] = angle.cos(), -angle.sin()
    turn[..., 1, 0], turn[..., 1, 1] = angle.sin(), angle.cos()
    return poses @ turn
