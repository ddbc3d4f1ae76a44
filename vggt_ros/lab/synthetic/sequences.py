# SPDX-License-Identifier: Apache-2.0
"""
Long ways through box-shaped rooms, each hard in another manner: what a map is measured on.

The world is that of `scene`: the origin on the floor in the middle of the room, z up, metres.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.path import camera_poses

_HEIGHT = 1.2  # m, of the camera above the floor
_PITCH = -0.08  # rad, a little downwards
_STEP = 0.05  # m from frame to frame where the robot drives


@dataclass(frozen=True)
class Sequence:
    """A way of S frames through a room."""

    half_room: tuple[float, float, float]  # m, half the room's extent along x, y, z
    world_from_camera: Tensor  # (S, 4, 4) float64, optical frames


def corridor(frames: int) -> Sequence:
    """Drive straight on: camera centres lie on a line and leave the roll about it open."""
    travelled = _STEP * _count(frames)
    x = travelled - travelled[-1] / 2
    poses = _level(x, torch.zeros_like(x), torch.zeros_like(x))
    return Sequence((float(travelled[-1]) / 2 + 3, 1.3, 1.4), poses)


def loop(frames: int) -> Sequence:
    """Drive a circle and end where it began, looking ahead and a little outwards."""
    angle = 2 * math.pi * _count(frames) / frames
    radius = frames * _STEP / (2 * math.pi)
    side = radius + 2
    poses = _level(radius * angle.cos(), radius * angle.sin(), angle + math.pi / 2 - 0.3)
    return Sequence((side, side - 0.5, 1.4), poses)


def stop_and_go(frames: int) -> Sequence:
    """Drive a gentle bend, 50 frames at a time, and stand for as many."""
    moving = ((_count(frames) // 50) % 2 == 0).double()
    travelled = _STEP * moving.cumsum(0)
    yaw = 0.02 * travelled
    x, y = (_STEP * moving * yaw.cos()).cumsum(0), (_STEP * moving * yaw.sin()).cumsum(0)
    half = float(x[-1]) / 2
    return Sequence((half + 3, float(y[-1]) / 2 + 2, 1.4), _level(x - half, y - y[-1] / 2, yaw))


def rotation(frames: int) -> Sequence:
    """Turn once on the spot: there is no parallax at all."""
    angle = 2 * math.pi * _count(frames) / frames
    return Sequence((4.0, 3.0, 1.4), _level(0 * angle, 0 * angle, angle))


def handheld(frames: int) -> Sequence:
    """Walk slowly with a camera in the hand: each frame jumps farther than it progresses."""
    random = torch.Generator().manual_seed(0)
    jump = torch.randn(3, frames, generator=random, dtype=torch.float64)
    travelled = 0.01 * _count(frames)
    x = travelled - travelled[-1] / 2
    yaw, pitch, bounce = 0.03 * jump[0], _PITCH + 0.03 * jump[1], 0.02 * jump[2]
    poses = _level(x, 0.3 * (0.8 * travelled).sin(), yaw, pitch, bounce)
    return Sequence((float(travelled[-1]) / 2 + 3, 2.5, 1.4), poses)


SEQUENCES: dict[str, Callable[[int], Sequence]] = {
    'corridor': corridor,
    'loop': loop,
    'stop_and_go': stop_and_go,
    'rotation': rotation,
    'handheld': handheld,
}


def _count(frames: int) -> Tensor:
    return torch.arange(frames, dtype=torch.float64)


def _level(
    x: Tensor, y: Tensor, yaw: Tensor, pitch: Tensor | None = None, bounce: Tensor | None = None
) -> Tensor:
    """Set cameras up at the usual height; all (S,)."""
    height = _HEIGHT + (torch.zeros_like(x) if bounce is None else bounce)
    pitch = torch.full_like(x, _PITCH) if pitch is None else pitch
    return camera_poses(torch.stack([x, y, height], dim=-1), yaw, pitch)
