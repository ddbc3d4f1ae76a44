# SPDX-License-Identifier: Apache-2.0
"""
Random rooms and corridors, a batch at a time, for training and evaluation.

Unlike the demo's furnished room (`SyntheticScene.room`), no lane is kept free: solids stand on the
floor, float in the air or lie against walls, and those that a camera would touch are removed.
Rooms differ in size, clutter, texture (from rich to nearly flat), colour and light.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.random_streams import RandomStreams
from vggt_ros.lab.synthetic.scene import KINDS, SIDES, SyntheticScene
from vggt_ros.lab.synthetic.texture import texture_bank

CLEARANCE = 0.25  # m, smallest distance of a camera from walls and solids
_CORRIDORS = 0.25  # share of the rooms
_WALL_OBJECTS = 4  # the last solids: paintings, doors, shelves
_SOLIDS = len(KINDS) - 1
_OUT_OF_SIGHT = -50.0  # m, height of a solid that is removed


def random_rooms(random: RandomStreams, half_room: Tensor | None = None) -> SyntheticScene:
    """
    Make one room for each seed, its centre at the origin of x and y, its floor at z = 0.

    :param half_room: (B, 3) m, half the extent of the rooms; None: drawn as well.
    """
    half_room = _half_rooms(random) if half_room is None else half_room
    centre, half_size, yaw = _furniture(random, half_room)
    middle = torch.zeros_like(half_room[:, 2])
    room_centre = torch.stack([middle, middle, half_room[:, 2]], dim=-1)
    return SyntheticScene(
        centre=torch.cat([room_centre[:, None], centre], dim=1),
        half_size=torch.cat([half_room[:, None], half_size], dim=1),
        yaw=torch.cat([torch.zeros_like(yaw[:, :1]), yaw], dim=1),
        **_surfaces(random),
        light=_lamps(random, half_room),
        bank=texture_bank(random.device),
    )


def remove_obstacles(scene: SyntheticScene, positions: Tensor) -> SyntheticScene:
    """
    Remove the solids that cameras would touch.

    :param positions: (B, S, 3) m, of the cameras in each room.
    """
    offset = positions[:, :, None] - scene.centre[:, None]
    cos, sin = scene.yaw.cos()[:, None], scene.yaw.sin()[:, None]
    x, y, z = offset.unbind(-1)
    local = torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1).abs()
    touched = (local < scene.half_size[:, None] + CLEARANCE).all(-1).any(1)
    touched[:, 0] = False  # the room itself
    centre = scene.centre.clone()
    centre[..., 2] = torch.where(touched, _OUT_OF_SIGHT, centre[..., 2])
    return dataclasses.replace(scene, centre=centre)


def _half_rooms(random: RandomStreams) -> Tensor:
    """Draw half the extent of rooms, (B, 3) m."""
    corridor = random.uniform() < _CORRIDORS
    width = torch.where(
        corridor, random.uniform(low=0.8, high=1.3), random.uniform(low=1.6, high=4)
    )
    length = torch.where(
        corridor, random.uniform(low=4, high=8), random.uniform(low=1.6, high=4.5)
    )
    return torch.stack([length, width, random.uniform(low=1.15, high=1.7)], dim=-1)


def _furniture(random: RandomStreams, half_room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre (B, M, 3), half size (B, M, 3) and yaw (B, M) of the solids in a room."""
    count = _SOLIDS - _WALL_OBJECTS
    half_height = half_room[:, None, 2]
    size = 0.12 * 5 ** random.uniform(count, 3)  # 0.12 to 0.6 m, log-uniform
    is_sphere = torch.tensor([kind == 'sphere' for kind in KINDS[1 : 1 + count]])
    is_cylinder = torch.tensor([kind == 'cylinder' for kind in KINDS[1 : 1 + count]])
    is_round = (is_sphere | is_cylinder).to(random.device)
    size[..., 1] = torch.where(is_round, size[..., 0], size[..., 1])
    tall = (size[..., 2] * (1 + 1.5 * random.uniform(count))).minimum(0.9 * half_height)
    size[..., 2] = torch.where(is_sphere.to(random.device), size[..., 0], tall)
    floor = half_room[:, None, :2] - 0.15
    position = (2 * random.uniform(count, 2) - 1) * floor
    hanging = random.uniform(count) < 0.3
    height = size[..., 2] + hanging * random.uniform(count) * 2 * (half_height - size[..., 2])
    centre = torch.cat([position, height[..., None]], dim=-1)
    absent = random.uniform(count) < random.uniform(1, low=0.1, high=0.6)
    centre[..., 2] = torch.where(absent, _OUT_OF_SIGHT, centre[..., 2])
    yaw = random.uniform(count, high=2 * math.pi)
    wall_centre, wall_size = _wall_objects(random, half_room)
    return (
        torch.cat([centre, wall_centre], dim=1),
        torch.cat([size, wall_size], dim=1),
        torch.cat([yaw, torch.zeros_like(yaw[:, :_WALL_OBJECTS])], dim=1),
    )


def _wall_objects(random: RandomStreams, half_room: Tensor) -> tuple[Tensor, Tensor]:
    """Return centre and half size (B, 4, 3) of a box, flat or deep, against each wall."""
    size = random.uniform(_WALL_OBJECTS, 3, low=0.2, high=0.9)
    depth = 0.02 + 0.3 * random.uniform(_WALL_OBJECTS) ** 3
    wall = torch.arange(_WALL_OBJECTS, device=random.device)
    axis, sign = wall // 2, (1 - 2 * (wall % 2)).float()
    size.scatter_(2, axis.expand(len(size), -1)[..., None], depth[..., None])
    size[..., 2] = size[..., 2].minimum(half_room[:, None, 2])
    centre = (2 * random.uniform(_WALL_OBJECTS, 3) - 1) * (half_room[:, None] - size).clamp(min=0)
    at_wall = sign * (half_room[:, axis] - depth)
    centre.scatter_(2, axis.expand(len(size), -1)[..., None], at_wall[..., None])
    centre[..., 2] += half_room[:, None, 2]
    return centre, size


def _surfaces(random: RandomStreams) -> dict[str, Tensor]:
    """Draw texture, tile size, colours and detail of each side of each solid."""
    count = len(KINDS)
    texture = random.integers(texture_bank().count, count, SIDES)
    tile_size = 0.5 * 8 ** random.uniform(count, SIDES)  # 0.5 to 4 m
    bright = 0.25 + 0.75 * random.uniform(count, SIDES, 3)
    grey = bright.mean(-1, keepdim=True)
    bright = torch.lerp(grey.expand_as(bright), bright, random.uniform(count, SIDES, 1))
    other = random.uniform(count, SIDES, 3)
    # Contrast varies between rooms, and within a room around its own level.
    contrast = (
        random.uniform(1, 1, low=0.15, high=1.2) * random.uniform(count, SIDES) ** 0.5
    ).clamp(0.03, 1)
    dark = torch.lerp(bright, bright * other, contrast[..., None])
    detail = 0.6 * contrast * random.uniform(count, SIDES)
    parts = {
        'texture': texture,
        'tile_size': tile_size,
        'offset': random.uniform(count, SIDES, 2),
        'colours': torch.stack([bright, dark], dim=-2),
        'detail': detail,
    }
    for part in parts.values():
        part[:, 1:] = part[:, 1:, :1]  # furniture looks the same on all sides
    return parts


def _lamps(random: RandomStreams, half_room: Tensor) -> Tensor:
    """Return the positions of two lamps below the ceiling, (B, 2, 3) m."""
    lamps = (2 * random.uniform(2, 3) - 1) * 0.8 * half_room[:, None]
    lamps[..., 2] = 2 * half_room[:, None, 2] * random.uniform(2, low=0.75, high=0.97)
    return lamps
