# SPDX-License-Identifier: Apache-2.0
"""
A smooth path of a wheeled robot's camera through a room, as exact camera poses.

The robot drives an arc inside the free lane of the room at constant step length, sways gently in
radius, height and yaw, and looks forward and inward over the furniture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.scene import LANE

INWARD = math.radians(50)  # yaw of the camera from the direction of driving to the middle


def smooth_path(frames: int, seed: int, step: float = 0.05) -> Tensor:
    """
    Drive along an arc.

    :param step: metres from one frame to the next.
    :returns: world_from_camera (S, 4, 4) float32; camera axes x right, y down, z forward.
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
    return camera_poses(position, yaw, pitch).float()


def camera_poses(position: Tensor, yaw: Tensor, pitch: Tensor) -> Tensor:
    """
    Set up level cameras in a world whose z axis points up.

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
