# SPDX-License-Identifier: Apache-2.0
"""
Ray casting of scenes: colour images and exact depth for given cameras.

One ray per pixel, without shadows, reflections or anti-aliased silhouettes. Rays have length 1
along the optical axis, so the distance at which one ends *is* the depth. In the frame of a solid,
divided by its half size, every solid is a unit cube, ball or cylinder, and the distance along the
ray is unchanged; that is the whole of the geometry.

Rays are stored component first, (3, S, P): reductions over a last axis of three are slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_ros.synthetic.scene import KINDS, SIDES, Scene

AMBIENT = 0.5
LAMP_POWER = 0.55
LAMP_REACH = 4.0  # m at which a lamp has half its power


def render(
    scene: Scene, world_from_camera: Tensor, intrinsics: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """
    Render S views.

    :param scene: one room for all views, or S rooms.
    :param world_from_camera: (S, 4, 4), camera axes x right, y down, z forward.
    :param intrinsics: (S, 3, 3), pinhole; pixel (u, v) has integer coordinates.
    :returns: images (S, H, W, 3) uint8 and depth (S, H, W) in metres along the optical axis.
    """
    views = world_from_camera.shape[0]
    rays = _pixel_rays(intrinsics, height, width)
    rays = torch.einsum('sij,jsp->isp', world_from_camera[:, :3, :3], rays)
    origins = world_from_camera[:, :3, 3].T[:, :, None]
    depth, solid = cast(scene, origins, rays)
    point = origins + depth * rays
    focal = intrinsics[:, 0, 0, None]
    images = _shade(scene, point, rays, solid, pixel_size=depth / focal)
    images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    shape = (views, height, width)
    return images.permute(1, 2, 0).reshape(*shape, 3).contiguous(), depth.reshape(shape)


def cast(scene: Scene, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """
    Find where rays end.

    :param origins: (3, S, 1 or P) m, inside the room and outside of the furniture.
    :param rays: (3, S, P)
    :returns: distance (S, P) in lengths of the ray, and index of the solid (S, P) int64.
    """
    nearest = _leave_cube(*_in_frame_of(scene, 0, origins, rays))
    solid = torch.zeros(nearest.shape, dtype=torch.int64, device=nearest.device)
    for index, kind in enumerate(KINDS[1:], start=1):
        distance = _ENTER[kind](*_in_frame_of(scene, index, origins, rays))
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        solid.masked_fill_(closer, index)
    return nearest, solid


def _pixel_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Return (3, S, P): the ray of each pixel in the camera's frame, 1 along the optical axis."""
    v, u = torch.meshgrid(
        torch.arange(height, device=intrinsics.device, dtype=intrinsics.dtype),
        torch.arange(width, device=intrinsics.device, dtype=intrinsics.dtype),
        indexing='ij',
    )
    x = (u.reshape(1, -1) - intrinsics[:, 0, 2, None]) / intrinsics[:, 0, 0, None]
    y = (v.reshape(1, -1) - intrinsics[:, 1, 2, None]) / intrinsics[:, 1, 1, None]
    return torch.stack([x, y, torch.ones_like(x)])


def _in_frame_of(
    scene: Scene, index: int, origins: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Return origins and rays in the unit frame of a solid; no component of a ray is zero."""
    cos, sin = scene.yaw[:, index, None].cos(), scene.yaw[:, index, None].sin()
    half = scene.half_size[:, index].T[:, :, None]

    def turn(vector: Tensor) -> Tensor:
        x, y, z = vector
        return torch.stack([cos * x + sin * y, cos * y - sin * x, z.expand_as(x)]) / half

    local_rays = turn(rays)
    local_rays = torch.where(local_rays.abs() < 1e-9, 1e-9, local_rays)
    return turn(origins - scene.centre[:, index].T[:, :, None]), local_rays


def _slab(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the ray enters and leaves |coordinate| <= 1, for each coordinate."""
    inverse = 1 / ray
    middle, half = -origin * inverse, inverse.abs()
    return middle - half, middle + half


def _leave_cube(origin: Tensor, ray: Tensor) -> Tensor:
    x, y, z = _slab(origin, ray)[1]
    return torch.minimum(torch.minimum(x, y), z)


def _enter_cube(origin: Tensor, ray: Tensor) -> Tensor:
    enter, leave = _slab(origin, ray)
    first = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    last = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    return torch.where((first < last) & (first > 0), first, torch.inf)


def _round(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return where the ray enters and leaves the unit ball (or disc, from two components).

    Found from the point nearest to the centre: the textbook quadratic cancels in float32.
    """
    squared_length = sum(component * component for component in ray)
    nearest = -sum(o * r for o, r in zip(origin, ray, strict=True)) / squared_length
    miss = sum((o + nearest * r) ** 2 for o, r in zip(origin, ray, strict=True))
    half = ((1 - miss) / squared_length).sqrt()  # NaN where the ray misses: fails every test below
    return nearest - half, nearest + half


def _enter_ball(origin: Tensor, ray: Tensor) -> Tensor:
    first, _ = _round(origin, ray)
    return torch.where(first > 0, first, torch.inf)


def _enter_cylinder(origin: Tensor, ray: Tensor) -> Tensor:
    enter_round, leave_round = _round(origin[:2], ray[:2])
    enter_flat, leave_flat = _slab(origin[2], ray[2])
    first = torch.maximum(enter_round, enter_flat)
    last = torch.minimum(leave_round, leave_flat)
    return torch.where((first < last) & (first > 0), first, torch.inf)


_ENTER = {'box': _enter_cube, 'sphere': _enter_ball, 'cylinder': _enter_cylinder}


def _shade(
    scene: Scene, point: Tensor, rays: Tensor, solid: Tensor, pixel_size: Tensor
) -> Tensor:
    """Return the colour (3, S, P) of points on the surfaces of solids."""
    room = torch.arange(scene.yaw.shape[0], device=solid.device)[:, None]
    row = (room * len(KINDS) + solid).reshape(-1)
    points = point.reshape(3, -1)

    centre = scene.centre.reshape(-1, 3)[row].T
    half = scene.half_size.reshape(-1, 3)[row].T
    yaw = scene.yaw.reshape(-1)[row]
    cos, sin = yaw.cos(), yaw.sin()
    x, y, z = points - centre
    local = torch.stack([cos * x + sin * y, cos * y - sin * x, z])
    normal = _outward_normal(local / half, half, solid.reshape(-1))

    axis = normal.abs().argmax(dim=0)
    side = 2 * axis + (normal.gather(0, axis[None])[0] > 0)
    surface = row * SIDES + side
    across = torch.where(axis == 0, local[1], local[0])
    along = torch.where(axis == 2, local[1], local[2])

    normal = torch.stack(
        [cos * normal[0] - sin * normal[1], sin * normal[0] + cos * normal[1], normal[2]]
    )
    ray = rays.reshape(3, -1)
    slant = (ray * normal).sum(0) / ray.square().sum(0).sqrt()
    normal = torch.where(slant > 0, -normal, normal)  # the room is seen from inside
    tile = scene.tile_size.reshape(-1)[surface]
    uv = torch.stack([across, -along]) / tile + scene.offset.reshape(-1, 2)[surface].T
    # A slanted pixel is long in one direction only: between the short and the long edge.
    footprint = pixel_size.reshape(-1) / slant.abs().clamp(min=0.05).sqrt() / tile
    pattern, detail = scene.bank.sample(scene.texture.reshape(-1)[surface], uv, footprint)
    bright, dark = scene.colours.reshape(-1, 2, 3)[surface].permute(1, 2, 0)
    colour = torch.lerp(dark, bright, pattern) * (0.7 + 0.6 * detail)
    return (colour * _light(scene, points, normal, solid.shape)).reshape(point.shape)


def _outward_normal(unit: Tensor, half: Tensor, solid: Tensor) -> Tensor:
    """Return the unit normal (3, P) in the frames of the solids, from the unit-frame points."""
    kind_of = torch.tensor([_SHAPES.index(kind) for kind in KINDS], device=solid.device)
    kind = kind_of[solid]
    magnitude = unit.abs()
    face = magnitude == magnitude.amax(dim=0)
    flat = torch.where(face, unit.sign(), 0.0)
    cap = magnitude[2] > 0.99999 * (unit[0] ** 2 + unit[1] ** 2).sqrt()
    upright = torch.stack([unit[0], unit[1], unit[2] * 0])
    lid = torch.stack([unit[0] * 0, unit[0] * 0, unit[2].sign()])
    normal = torch.where(kind == _SHAPES.index('sphere'), unit / half, flat)
    round_side = torch.where(cap, lid, upright / half)
    normal = torch.where(kind == _SHAPES.index('cylinder'), round_side, normal)
    return normal / normal.square().sum(0).sqrt()


_SHAPES = ('room', 'box', 'sphere', 'cylinder')


def _light(scene: Scene, points: Tensor, normal: Tensor, shape: torch.Size) -> Tensor:
    """Return the brightness (P,): ambient light and diffuse lamps with fall-off."""
    views, pixels = shape
    total = torch.full_like(points[0], AMBIENT)
    for lamp in scene.light.unbind(1):
        position = lamp.T[:, :, None].expand(3, views, pixels).reshape(3, -1)
        toward = position - points
        squared = toward.square().sum(0)
        cosine = (toward * normal).sum(0) / squared.sqrt()
        total += LAMP_POWER * cosine.clamp(min=0) / (1 + squared / LAMP_REACH**2) * 2
    return total
