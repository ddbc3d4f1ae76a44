# SPDX-License-Identifier: Apache-2.0
"""
Camera trajectories through rooms: a smooth one for the demo, long ones to evaluate a map on.

The world frame is that of `scene`: origin on the floor in the middle of the room, z up, metres.
Cameras have optical axes: x right, y down, z forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.scene import LANE

INWARD = math.radians(50)  # yaw of the camera from the direction of travel to the room's middle
_HEIGHT = 1.2  # m, of the camera above the floor
_PITCH = -0.08  # rad, slightly downwards
_STEP = 0.05  # m between frames while the robot drives


def level_camera_poses(position: Tensor, yaw: Tensor, pitch: Tensor) -> Tensor:
    """
    Return the poses of cameras without roll.

    :param position: (S, 3) m.
    :param yaw: (S,) rad, of the viewing direction about z from x.
    :param pitch: (S,) rad, positive looks up.
    :returns: world_from_camera (S, 4, 4).
    """
    zero = torch.zeros_like(yaw)
    forward = torch.stack([yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), pitch.sin()], -1)
    right = torch.stack([yaw.sin(), -yaw.cos(), zero], -1)
    down = torch.linalg.cross(forward, right)
    poses = torch.eye(4, dtype=position.dtype, device=position.device).repeat(len(position), 1, 1)
    poses[:, :3, :3] = torch.stack([right, down, forward], dim=-1)
    poses[:, :3, 3] = position
    return poses


def smooth_trajectory(frames: int, seed: int, step: float = 0.05) -> Tensor:
    """
    Drive an arc inside the free lane of `SyntheticScene.room`.

    Radius, height and yaw oscillate slowly; the camera looks forward and inward.

    :param step: m between frames.
    :returns: world_from_camera (S, 4, 4) float32.
    """
    random = torch.Generator().manual_seed(seed)
    start, *phase = (2 * math.pi * torch.rand(5, generator=random, dtype=torch.float64)).tolist()
    middle, sway = (LANE[0] + LANE[1]) / 2, (LANE[1] - LANE[0]) / 4
    travelled = step * torch.arange(frames, dtype=torch.float64)
    angle = start + travelled / middle
    radius = middle + sway * torch.sin(0.9 * travelled + phase[0])
    height = 1.25 + 0.08 * torch.sin(1.3 * travelled + phase[1])
    position = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)
    yaw = angle + math.pi / 2 + INWARD + 0.15 * torch.sin(1.1 * travelled + phase[2])
    pitch = -0.12 + 0.04 * torch.sin(1.7 * travelled + phase[3])
    return level_camera_poses(position, yaw, pitch).float()


# --- long sequences


@dataclass(frozen=True)
class SyntheticSequence:
    """A trajectory of S frames and the room that it fits into."""

    half_room: tuple[float, float, float]  # m, half the room's extent along x, y, z
    world_from_camera: Tensor  # (S, 4, 4) float64


def _corridor(frames: int) -> SyntheticSequence:
    """Drive straight: collinear camera centres leave the roll about their line undetermined."""
    travelled = _STEP * _indices(frames)
    x = travelled - travelled[-1] / 2
    poses = _robot_poses(x, torch.zeros_like(x), torch.zeros_like(x))
    return SyntheticSequence((float(travelled[-1]) / 2 + 3, 1.3, 1.4), poses)


def _loop(frames: int) -> SyntheticSequence:
    """Drive a full circle, looking ahead and slightly outwards."""
    angle = 2 * math.pi * _indices(frames) / frames
    radius = frames * _STEP / (2 * math.pi)
    side = radius + 2
    poses = _robot_poses(radius * angle.cos(), radius * angle.sin(), angle + math.pi / 2 - 0.3)
    return SyntheticSequence((side, side - 0.5, 1.4), poses)


def _stop_and_go(frames: int) -> SyntheticSequence:
    """Drive a gentle bend for 50 frames, stop for 50, and so on."""
    moving = ((_indices(frames) // 50) % 2 == 0).double()
    travelled = _STEP * moving.cumsum(0)
    yaw = 0.02 * travelled
    x, y = (_STEP * moving * yaw.cos()).cumsum(0), (_STEP * moving * yaw.sin()).cumsum(0)
    half = float(x[-1]) / 2
    poses = _robot_poses(x - half, y - y[-1] / 2, yaw)
    return SyntheticSequence((half + 3, float(y[-1]) / 2 + 2, 1.4), poses)


def _rotation(frames: int) -> SyntheticSequence:
    """Rotate once on the spot: no parallax at all."""
    angle = 2 * math.pi * _indices(frames) / frames
    return SyntheticSequence((4.0, 3.0, 1.4), _robot_poses(0 * angle, 0 * angle, angle))


def _handheld(frames: int) -> SyntheticSequence:
    """Walk slowly with a hand-held camera: the jitter exceeds the progress between frames."""
    random = torch.Generator().manual_seed(0)
    jitter = torch.randn(3, frames, generator=random, dtype=torch.float64)
    travelled = 0.01 * _indices(frames)
    x = travelled - travelled[-1] / 2
    yaw, pitch, bounce = 0.03 * jitter[0], _PITCH + 0.03 * jitter[1], 0.02 * jitter[2]
    poses = _robot_poses(x, 0.3 * (0.8 * travelled).sin(), yaw, pitch, bounce)
    return SyntheticSequence((float(travelled[-1]) / 2 + 3, 2.5, 1.4), poses)


SEQUENCES: dict[str, Callable[[int], SyntheticSequence]] = {
    'corridor': _corridor,
    'loop': _loop,
    'stop_and_go': _stop_and_go,
    'rotation': _rotation,
    'handheld': _handheld,
}


def _indices(frames: int) -> Tensor:
    return torch.arange(frames, dtype=torch.float64)


def _robot_poses(
    x: Tensor, y: Tensor, yaw: Tensor, pitch: Tensor | None = None, bounce: Tensor | None = None
) -> Tensor:
    """Return poses (S, 4, 4) at the robot's camera height; all arguments (S,)."""
    height = _HEIGHT + (torch.zeros_like(x) if bounce is None else bounce)
    pitch = torch.full_like(x, _PITCH) if pitch is None else pitch
    return level_camera_poses(torch.stack([x, y, height], dim=-1), yaw, pitch)
