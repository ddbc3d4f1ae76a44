# SPDX-License-Identifier: Apache-2.0
"""
Furnished rooms as tensors: solids, their surfaces and the lamps.

The world frame (`synthetic_room`) has its origin on the floor in the middle of the room, x and y
along the walls and z up, in metres. A solid is a unit cube, ball or cylinder (|x|, |y|, |z| <= 1),
scaled by its half size, rotated about z and translated to its centre; the room is a cube seen from
inside. A ring around the middle, the lane, stays free of furniture: a trajectory inside it never
collides.

A seed gives the same room on every device. All rooms have the same number of solids of each kind,
in the same order, so they can be stacked and rendered as one batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.texture import TextureBank, texture_bank

LANE = (1.4, 2.2)  # m, radii of the ring without furniture around the middle of the room
SIDES = 6  # -x +x -y +y -z +z, by the largest component of the outward normal in the solid's frame

_CENTRE_KINDS = ('box', 'cylinder', 'sphere', 'box', 'sphere')
_WALL_KINDS = ('box', 'cylinder', 'box', 'sphere', 'box', 'cylinder', 'box', 'sphere')
KINDS = ('room', *_CENTRE_KINDS, *_WALL_KINDS, *('box',) * 4)


@dataclasses.dataclass(frozen=True)
class SyntheticScene:
    """R rooms of M solids each; rendered with one room for all views or one per view."""

    centre: Tensor  # (R, M, 3) m
    half_size: Tensor  # (R, M, 3) m
    yaw: Tensor  # (R, M) rad, about z
    texture: Tensor  # (R, M, SIDES) int64, index into the bank
    tile_size: Tensor  # (R, M, SIDES) m, edge of one texture tile on the surface
    offset: Tensor  # (R, M, SIDES, 2) tiles
    colours: Tensor  # (R, M, SIDES, 2, 3) in [0, 1], the two colours that the pattern mixes
    detail: Tensor  # (R, M, SIDES), how much the fine detail varies the brightness
    light: Tensor  # (R, L, 3) m, positions of the lamps
    bank: TextureBank

    @staticmethod
    def room(seed: int, device: torch.device | str = 'cpu') -> SyntheticScene:
        """Furnish one room."""
        random = torch.Generator().manual_seed(seed)
        half = _uniform(random, (3.7, 3.3, 1.3), (4.5, 4.0, 1.6))
        solids = [
            (torch.stack([half[0] * 0, half[1] * 0, half[2]]), half, 0.0),
            *_centre_furniture(random),
            *_wall_furniture(random, half),
            *_paintings(random, half),
        ]
        centre = torch.stack([solid[0] for solid in solids])[None]
        half_size = torch.stack([solid[1] for solid in solids])[None]
        yaw = torch.tensor([solid[2] for solid in solids])[None]
        lamps = half * torch.tensor([[0.5, -0.4, 1.9], [-0.6, 0.5, 1.9]])
        return SyntheticScene(
            centre, half_size, yaw, **_surfaces(random), light=lamps[None], bank=texture_bank()
        ).to(device)

    @staticmethod
    def stack(scenes: Sequence[SyntheticScene]) -> SyntheticScene:
        """Concatenate rooms to one batch."""
        return scenes[0]._map_rooms(
            lambda name: torch.cat([getattr(scene, name) for scene in scenes])
        )

    def repeat_for_views(self, views: int) -> SyntheticScene:
        """Repeat each room for its views, which follow one another."""
        return self._map_rooms(lambda name: getattr(self, name).repeat_interleave(views, dim=0))

    def _map_rooms(self, make: Callable[[str], Tensor]) -> SyntheticScene:
        names = (
            field.name for field in dataclasses.fields(SyntheticScene) if field.name != 'bank'
        )
        return dataclasses.replace(self, **{name: make(name) for name in names})

    def to(self, device: torch.device | str) -> SyntheticScene:
        """Copy all tensors to a device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return SyntheticScene(**moved)


Solid = tuple[Tensor, Tensor, float]  # centre (3,), half size (3,), yaw


def _uniform(random: torch.Generator, low: Sequence[float], high: Sequence[float]) -> Tensor:
    lowest, highest = torch.tensor(low), torch.tensor(high)
    return lowest + (highest - lowest) * torch.rand(lowest.shape, generator=random)


def _centre_furniture(random: torch.Generator) -> list[Solid]:
    """Return a table with objects on it in the middle, inside the lane's inner circle."""
    yaw = float(_uniform(random, [0.0], [math.pi])[0])
    table = _uniform(random, (0.4, 0.3, 0.3), (0.7, 0.55, 0.45))
    top = 2 * float(table[2])
    forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0])
    side = torch.tensor([-math.sin(yaw), math.cos(yaw), 0.0])
    up = torch.tensor([0.0, 0.0, 1.0])
    vase = _uniform(random, (0.08, 0.15), (0.14, 0.3))[[0, 0, 1]]
    ball = _uniform(random, [0.12], [0.2]).expand(3)
    parcel = _uniform(random, (0.1, 0.1, 0.06), (0.18, 0.16, 0.15))
    stool = _uniform(random, [0.2], [0.25]).expand(3)
    beside = float(table[1]) + float(stool[1]) + 0.1
    return [
        (up * table[2], table, yaw),
        (up * (top + vase[2]) + forward * 0.2, vase, 0.0),
        (up * (top + ball[2]) - forward * 0.2 + side * 0.05, ball, 0.0),
        (up * (top + parcel[2]) - side * 0.2 + forward * 0.02, parcel, yaw + 0.5),
        (up * stool[2] + side * beside, stool, 0.0),
    ]


def _wall_furniture(random: torch.Generator, room: Tensor) -> list[Solid]:
    """Return one solid in each octant between the lane and the walls."""
    solids = []
    for octant, kind in enumerate(_WALL_KINDS):
        offset, reach, along, aspect, height, yaw = torch.rand(6, generator=random).tolist()
        angle = 2 * math.pi * (octant + 0.6 * (offset - 0.5)) / len(_WALL_KINDS)
        direction = (math.cos(angle), math.sin(angle))
        wall = min(float(room[i]) / max(abs(direction[i]), 1e-9) for i in range(2))
        bound = min(0.3 + 0.4 * reach, (wall - LANE[1]) / 2.2)
        distance = LANE[1] + bound + along * (wall - LANE[1] - 2.2 * bound)
        wide = bound if kind != 'box' else bound * math.cos(0.5 + 0.5 * aspect)
        deep = bound if kind != 'box' else bound * math.sin(0.5 + 0.5 * aspect)
        tall = bound if kind == 'sphere' else 0.25 + 0.8 * height
        centre = torch.tensor([distance * direction[0], distance * direction[1], tall])
        solids.append((centre, torch.tensor([wide, deep, tall]), 2 * math.pi * yaw))
    return solids


def _paintings(random: torch.Generator, room: Tensor) -> list[Solid]:
    """Return a flat box on each wall."""
    solids = []
    for wall in range(4):
        axis, sign = wall // 2, 1 - 2 * (wall % 2)
        half = _uniform(random, (0.4, 0.4, 0.3), (0.9, 0.9, 0.5))
        half[axis] = 0.03
        centre = torch.stack([room[0] * 0, room[1] * 0, 1.6 + 0 * room[2]])
        centre[axis] = sign * (room[axis] - 0.03)
        centre[1 - axis] = _uniform(random, [-0.5], [0.5])[0] * room[1 - axis]
        solids.append((centre, half, 0.0))
    return solids


def _surfaces(random: torch.Generator) -> dict[str, Tensor]:
    """Draw texture, tile size and two colours for each side of each solid."""
    count, bank = len(KINDS), texture_bank()
    texture = torch.randint(bank.count, (count, SIDES), generator=random)
    texture[0] = torch.randperm(bank.count, generator=random)[:SIDES]  # six different walls
    texture[1:] = texture[1:, :1]  # furniture has one texture on all sides
    tile_size = _uniform(random, [0.8], [1.6]).expand(count, SIDES).clone()
    tile_size[0] = 3 + torch.rand(SIDES, generator=random)
    bright = 0.35 + 0.65 * torch.rand(count, SIDES, 3, generator=random)
    dark = bright.roll(1, -1) * (0.15 + 0.35 * torch.rand(count, SIDES, 1, generator=random))
    bright[0] = 0.5 + 0.5 * bright[0]  # walls are paler than furniture
    bright[1:], dark[1:] = bright[1:, :1], dark[1:, :1]
    return {
        'texture': texture[None],
        'tile_size': tile_size[None],
        'offset': torch.rand(1, count, SIDES, 2, generator=random),
        'colours': torch.stack([bright, dark], dim=-2)[None],
        'detail': torch.full((1, count, SIDES), 0.6),
    }
