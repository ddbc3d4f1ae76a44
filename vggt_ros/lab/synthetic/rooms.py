# SPDX-License-Identifier: Apache-2.0
"""
Rooms and corridors of every kind, many at a time, for training and evaluation.

Unlike the demo's furnished room (`Scene.room`), nothing keeps a lane free here: solids stand on
the floor, hang in the air or lie against walls, and those in a camera's way are taken out.
Rooms differ in size, clutter, texture (from rich to nearly flat), colour and light.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.draws import Draws
from vggt_ros.lab.synthetic.scene import KINDS, SIDES, SyntheticScene
from vggt_ros.lab.synthetic.texture import texture_bank

CLEARANCE = 0.25  # m that cameras keep from walls and solids
_CORRIDORS = 0.25  # share of the rooms
_ON_WALLS = 4  # the last solids: pictures, doors, shelves
_SOLIDS = len(KINDS) - 1


def furnish(draws: Draws, half: Tensor | None = None) -> SyntheticScene:
    """
    Make one room for each seed, its centre at the origin of x and y, its floor at z = 0.

    :param half: (B, 3) m, half the extent of the rooms; None: drawn as well.
    """
    half = _room_size(draws) if half is None else half
    centre, half_size, yaw = _furniture(draws, half)
    room_centre = torch.stack([torch.zeros_like(half[:, 2])] * 2 + [half[:, 2]], dim=-1)
    return SyntheticScene(
        centre=torch.cat([room_centre[:, None], centre], dim=1),
        half_size=torch.cat([half[:, None], half_size], dim=1),
        yaw=torch.cat([torch.zeros_like(yaw[:, :1]), yaw], dim=1),
        **_surfaces(draws),
        light=_lamps(draws, half),
        bank=texture_bank(draws.device),
    )


def clear_path(scene: SyntheticScene, positions: Tensor) -> SyntheticScene:
    """
    Take out the solids that cameras would touch.

    :param positions: (B, S, 3) m, of the cameras of each room.
    """
    offset = positions[:, :, None] - scene.centre[:, None]
    cos, sin = scene.yaw.cos()[:, None], scene.yaw.sin()[:, None]
    x, y, z = offset.unbind(-1)
    local = torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1).abs()
    touched = (local < scene.half_size[:, None] + CLEARANCE).all(-1).any(1)
    touched[:, 0] = False  # the room itself
    below = scene.centre.clone()
    below[..., 2] = torch.where(touched, -50.0, below[..., 2])
    return dataclasses.replace(scene, centre=below)


def _room_size(draws: Draws) -> Tensor:
    """Return (B, 3), half the extent in m."""
    corridor = draws.uniform() < _CORRIDORS
    width = torch.where(corridor, draws.uniform(low=0.8, high=1.3), draws.uniform(low=1.6, high=4))
    length = torch.where(corridor, draws.uniform(low=4, high=8), draws.uniform(low=1.6, high=4.5))
    return torch.stack([length, width, draws.uniform(low=1.15, high=1.7)], dim=-1)


def _furniture(draws: Draws, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre (B, M, 3), half size (B, M, 3) and yaw (B, M) of the solids in a room."""
    standing = _SOLIDS - _ON_WALLS
    size = 0.12 * 5 ** draws.uniform(standing, 3)  # 0.12 to 0.6 m, small ones as often as large
    ball = torch.tensor([kind == 'sphere' for kind in KINDS[1 : 1 + standing]])
    upright = torch.tensor([kind == 'cylinder' for kind in KINDS[1 : 1 + standing]])
    round_ = (ball | upright).to(draws.device)
    size[..., 1] = torch.where(round_, size[..., 0], size[..., 1])
    tall = (size[..., 2] * (1 + 1.5 * draws.uniform(standing))).minimum(0.9 * room[:, None, 2])
    size[..., 2] = torch.where(ball.to(draws.device), size[..., 0], tall)
    floor = room[:, None, :2] - 0.15
    place = (2 * draws.uniform(standing, 2) - 1) * floor
    hanging = draws.uniform(standing) < 0.3
    height = size[..., 2] + hanging * draws.uniform(standing) * 2 * (
        room[:, None, 2] - size[..., 2]
    )
    centre = torch.cat([place, height[..., None]], dim=-1)
    absent = draws.uniform(standing) < draws.uniform(1, low=0.1, high=0.6)
    centre[..., 2] = torch.where(absent, -50.0, centre[..., 2])
    yaw = draws.uniform(standing, high=2 * math.pi)
    flat_centre, flat_size = _on_walls(draws, room)
    return (
        torch.cat([centre, flat_centre], dim=1),
        torch.cat([size, flat_size], dim=1),
        torch.cat([yaw, torch.zeros_like(yaw[:, :_ON_WALLS])], dim=1),
    )


def _on_walls(draws: Draws, room: Tensor) -> tuple[Tensor, Tensor]:
    """Put a flat box, or a deep one, against each wall."""
    size = draws.uniform(_ON_WALLS, 3, low=0.2, high=0.9)
    deep = 0.02 + 0.3 * draws.uniform(_ON_WALLS) ** 3
    wall = torch.arange(_ON_WALLS, device=draws.device)
    axis, sign = wall // 2, (1 - 2 * (wall % 2)).float()
    size.scatter_(2, axis.expand(len(size), -1)[..., None], deep[..., None])
    size[..., 2] = size[..., 2].minimum(room[:, None, 2])
    along = (2 * draws.uniform(_ON_WALLS, 3) - 1) * (room[:, None] - size).clamp(min=0)
    against = sign * (room[:, axis] - deep)
    along.scatter_(2, axis.expand(len(size), -1)[..., None], against[..., None])
    along[..., 2] += room[:, None, 2]
    return along, size


def _surfaces(draws: Draws) -> dict[str, Tensor]:
    """Choose texture, size of its tile, colours and detail of each side of each solid."""
    count = len(KINDS)
    texture = draws.integers(texture_bank().count, count, SIDES)
    tile_size = 0.5 * 8 ** draws.uniform(count, SIDES)  # 0.5 to 4 m
    bright = 0.25 + 0.75 * draws.uniform(count, SIDES, 3)
    grey = bright.mean(-1, keepdim=True)
    bright = torch.lerp(grey.expand_as(bright), bright, draws.uniform(count, SIDES, 1))
    other = draws.uniform(count, SIDES, 3)
    # A room is rich in texture or poor as a whole, its surfaces vary around that.
    contrast = (
        draws.uniform(1, 1, low=0.15, high=1.2) * draws.uniform(count, SIDES) ** 0.5
    ).clamp(0.03, 1)
    dark = torch.lerp(bright, bright * other, contrast[..., None])
    detail = 0.6 * contrast * draws.uniform(count, SIDES)
    parts = {
        'texture': texture,
        'tile_size': tile_size,
        'offset': draws.uniform(count, SIDES, 2),
        'colours': torch.stack([bright, dark], dim=-2),
        'detail': detail,
    }
    for part in parts.values():
        part[:, 1:] = part[:, 1:, :1]  # the furniture looks the same on all sides
    return parts


def _lamps(draws: Draws, room: Tensor) -> Tensor:
    """Hang two lamps below the ceiling: (B, 2, 3) m."""
    lamps = (2 * draws.uniform(2, 3) - 1) * 0.8 * room[:, None]
    lamps[..., 2] = 2 * room[:, None, 2] * draws.uniform(2, low=0.75, high=0.97)
    return lamps
