# SPDX-License-Identifier: Apache-2.0
"""
Ray casting of scenes: colour images and exact depth for given cameras.

One ray per pixel, without shadows, reflections or anti-aliased silhouettes. Rays have length 1
along the optical axis, so the distance along a ray *is* the depth. In the frame of a solid,
divided by its half size, every solid is a unit cube, ball or cylinder, and distances along rays
are unchanged.

Rays are stored component first, (S, 3, P): reductions over a last axis of three are slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_ros.lab.synthetic.scene import KINDS, SIDES, SyntheticScene

AMBIENT = 0.5
LAMP_POWER = 1.1
LAMP_REACH = 4.0  # m at which a lamp has half its power
RAYS_PER_CHUNK = {'cpu': 2**14, 'cuda': 2**23}  # fits into the CPU's cache; into GPU memory


def render(
    scene: SyntheticScene, world_from_camera: Tensor, intrinsics: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """
    Render S views.

    :param scene: one room for all views, or S rooms.
    :param world_from_camera: (S, 4, 4), camera axes x right, y down, z forward.
    :param intrinsics: (S, 3, 3), pinhole; pixel (u, v) has integer coordinates.
    :returns: images (S, H, W, 3) uint8 and depth (S, H, W) in metres along the optical axis.
    """
    views, device = len(world_from_camera), world_from_camera.device
    images = torch.empty(views, height, width, 3, dtype=torch.uint8, device=device)
    depth = torch.empty(views, height, width, device=device)
    step = max(1, RAYS_PER_CHUNK[device.type] // (views * width))
    origins = world_from_camera[:, :3, 3]
    for top in range(0, height, step):
        rows = torch.arange(top, min(top + step, height), device=device)
        rays = world_from_camera[:, :3, :3] @ _camera_rays(intrinsics, rows, width)
        distance, solid = cast_rays(scene, origins, rays)
        points = origins[:, :, None] + distance[:, None] * rays
        pixel_size = distance / intrinsics[:, 0, 0, None]
        colours = _shade(scene, points, rays, solid, pixel_size)
        block = slice(top, top + len(rows))
        images[:, block] = colours.transpose(1, 2).reshape(views, len(rows), width, 3)
        depth[:, block] = distance.reshape(views, len(rows), width)
    return images, depth


def _camera_rays(intrinsics: Tensor, rows: Tensor, width: int) -> Tensor:
    """Return the rays of some rows of pixels, (S, 3, P), 1 along the optical axis."""
    u = torch.arange(width, device=rows.device).repeat(len(rows))
    v = rows.repeat_interleave(width)
    x = (u - intrinsics[:, 0, 2, None]) / intrinsics[:, 0, 0, None]
    y = (v - intrinsics[:, 1, 2, None]) / intrinsics[:, 1, 1, None]
    return torch.stack([x, y, torch.ones_like(x)], dim=1)


def cast_rays(scene: SyntheticScene, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """
    Intersect rays with the nearest surface.

    :param origins: (S, 3) m, inside the room and outside of the furniture.
    :param rays: (S, 3, P)
    :returns: distance (S, P) in lengths of the ray, and index of the solid (S, P) int64.
    """
    unit_from_world = _unit_from_world(scene)
    unit_origins = (unit_from_world @ (origins[:, None] - scene.centre)[..., None]).unbind(1)

    def unit_rays(index: int) -> Tensor:
        # no component may be zero, since they are divided by
        return unit_from_world[:, index] @ rays + 1e-12

    nearest = _wall_distance(unit_origins[0], unit_rays(0))
    solid = torch.zeros(nearest.shape, dtype=torch.int64, device=nearest.device)
    for index, kind in enumerate(KINDS[1:], start=1):
        enter, leave = _INTERSECT[kind](unit_origins[index], unit_rays(index))
        closer = (enter > 0) & (enter < torch.minimum(leave, nearest))
        nearest = torch.where(closer, enter, nearest)
        solid.masked_fill_(closer, index)
    return nearest, solid


def _unit_from_world(scene: SyntheticScene) -> Tensor:
    """Return (R, M, 3, 3), world directions to directions in the unit frame of a solid."""
    cos, sin = scene.yaw.cos(), scene.yaw.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.stack([cos, sin, zero, -sin, cos, zero, zero, zero, one], dim=-1)
    return rotation.reshape(*cos.shape, 3, 3) / scene.half_size[..., None]


def _slab(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances at which each component enters and leaves -1 <= component <= 1."""
    inverse = 1 / ray
    middle, half = -origin * inverse, inverse.abs()
    return middle - half, middle + half


def _wall_distance(origin: Tensor, ray: Tensor) -> Tensor:
    x, y, z = _slab(origin, ray)[1].unbind(1)
    return torch.minimum(torch.minimum(x, y), z)


# Each of these returns the distances (S, P) at which rays (S, 3, P) from origins (S, 3, 1) enter
# and leave a solid; a ray that misses leaves before or where it enters.


def _intersect_cube(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    enter, leave = (bound.unbind(1) for bound in _slab(origin, ray))
    return (
        torch.maximum(torch.maximum(enter[0], enter[1]), enter[2]),
        torch.minimum(torch.minimum(leave[0], leave[1]), leave[2]),
    )


def _intersect_ball(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """
    Intersect the unit ball, or the unit disc if there are two components.

    Computed from the point nearest to the centre: the textbook quadratic cancels in float32.
    """
    squared_length = ray.square().sum(1)
    nearest = (origin * ray).sum(1) / -squared_length
    miss = (origin + nearest[:, None] * ray).square().sum(1)
    # 0 for a ray that misses, so that it leaves where it enters; NaN arithmetic is slow.
    half = ((1 - miss).clamp(min=0) / squared_length).sqrt()
    return nearest - half, nearest + half


def _intersect_cylinder(origin: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    enter_round, leave_round = _intersect_ball(origin[:, :2], ray[:, :2])
    enter_flat, leave_flat = _slab(origin[:, 2], ray[:, 2])
    return torch.maximum(enter_round, enter_flat), torch.minimum(leave_round, leave_flat)


_INTERSECT = {'box': _intersect_cube, 'sphere': _intersect_ball, 'cylinder': _intersect_cylinder}
_ROUND = ('sphere', 'cylinder')


def _shade(
    scene: SyntheticScene, points: Tensor, rays: Tensor, solid: Tensor, pixel_size: Tensor
) -> Tensor:
    """
    Colour the points where rays end.

    :param pixel_size: (S, P) m, size of a pixel at the point on a surface facing the camera.
    :returns: (S, 3, P) uint8.
    """
    room = torch.arange(len(scene.yaw), device=solid.device)[:, None]
    row = (room * len(KINDS) + solid).reshape(-1)
    points, rays = (vector.transpose(0, 1).reshape(3, -1) for vector in (points, rays))
    cos_sin = torch.stack([scene.yaw.cos().reshape(-1), scene.yaw.sin().reshape(-1)])
    cos, sin = cos_sin[:, row]
    x, y, z = points - scene.centre.reshape(-1, 3).T[:, row]
    local = torch.stack([cos * x + sin * y, cos * y - sin * x, z])
    local_normal = _outward_normal(local, scene.half_size.reshape(-1, 3).T[:, row], solid)
    nx, ny, nz = local_normal
    across_x, across_y, across_z = local_normal.abs()
    # argmax over an axis of three takes longer than everything else here
    is_x = (across_x >= across_y) & (across_x >= across_z)
    is_y = ~is_x & (across_y >= across_z)
    axis = torch.where(is_x, 0, torch.where(is_y, 1, 2))
    side = 2 * axis + (torch.where(is_x, nx, torch.where(is_y, ny, nz)) > 0)
    normal = torch.stack([cos * nx - sin * ny, sin * nx + cos * ny, nz])
    slant = (rays * normal).sum(0) / rays.square().sum(0).sqrt()
    normal = torch.where(slant > 0, -normal, normal)  # the room is seen from inside
    across = torch.where(axis == 0, local[1], local[0])
    along = torch.where(axis == 2, local[1], local[2])
    # A slanted pixel is stretched in one direction only: take the geometric mean.
    footprint = pixel_size.reshape(-1) / slant.abs().clamp(min=0.05).sqrt()
    surface = row * SIDES + side
    colour = _albedo(scene, surface, torch.stack([across, -along]), footprint)
    colour = colour * _irradiance(scene, points, normal)
    colour = (colour * 255).round().clamp(0, 255).to(torch.uint8)
    return colour.reshape(3, *solid.shape).transpose(0, 1)


def _albedo(scene: SyntheticScene, surface: Tensor, position: Tensor, footprint: Tensor) -> Tensor:
    """Return the colour (3, N) of surfaces at positions (2, N) on them, footprint (N,), in m."""
    tile = scene.tile_size.reshape(-1)[surface]
    uv = position / tile + scene.offset.reshape(-1, 2).T[:, surface]
    texture = scene.texture.reshape(-1)[surface]
    pattern, detail = scene.bank.sample(texture, uv, footprint / tile)
    bright, dark = scene.colours.reshape(-1, 6).T[:, surface].split(3)
    strength = scene.detail.reshape(-1)[surface]
    colour: Tensor = torch.lerp(dark, bright, pattern) * (1 + strength * (detail - 0.5))
    return colour


def _outward_normal(local: Tensor, half: Tensor, solid: Tensor) -> Tensor:
    """Return the unit normals (3, N) at points (3, N) on solids, in the solids' frames."""
    is_sphere, is_round = (
        torch.tensor([kind in kinds for kind in KINDS], device=solid.device)[solid.reshape(-1)]
        for kinds in (('sphere',), _ROUND)
    )
    unit = local / half
    x, y, z = unit.abs()
    radius = torch.where(is_round, unit[:2].square().sum(0).sqrt(), torch.maximum(x, y))
    on_side, on_lid = (radius >= z) | is_sphere, (z > radius) | is_sphere
    on_x, on_y = on_side & (is_round | (x >= y)), on_side & (is_round | (y > x))
    normal = unit / half * torch.stack([on_x, on_y, on_lid])
    return normal / normal.square().sum(0).sqrt()


def _irradiance(scene: SyntheticScene, points: Tensor, normal: Tensor) -> Tensor:
    """Return the brightness (N,): ambient light and diffuse lamps with fall-off."""
    total = torch.full_like(points[0], AMBIENT)
    for lamp in scene.light.unbind(1):
        position = lamp.T[:, :, None].expand(3, len(lamp), points.shape[1] // len(lamp))
        toward = position.reshape(3, -1) - points
        squared = toward.square().sum(0)
        cosine = (toward * normal).sum(0).clamp(min=0) / squared.sqrt()
        total += LAMP_POWER * cosine / (1 + squared / LAMP_REACH**2)
    return total
