# SPDX-License-Identifier: Apache-2.0
"""
A finished run becomes files that other tools read.

    cloud.ply            voxels with colour, confidence and the frame that saw them first
    trajectory.tum       camera-to-world, one line for each frame
    sparse/0/            COLMAP, with tracks; `images/` is beside it, so the folder is a data set
    scene.glb            cloud and path for any viewer of 3-D models (y up, as glTF has it)
    reconstruction.json  what the rest means: frames, files, unit, model, counts

The largest map is in the folder itself, others in `other_maps/<number>/`, without COLMAP.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from vggt_ros.geometry.poses import Array
from vggt_ros.io.cloud_file import write_cloud
from vggt_ros.io.colmap_model import ColmapModel, write_colmap
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.offline.atomic_write import atomic_path, atomic_writer
from vggt_ros.offline.joined_map import JoinedMap, join_map, map_sizes
from vggt_ros.offline.refine_map import refine_map
from vggt_ros.offline.run import ABOUT
from vggt_ros.offline.voxels import Cloud, VoxelCloud, voxel_keys

DESCRIPTION = 'reconstruction.json'
UNTRAINED = 'the network is UNTRAINED: this shows that everything runs, its geometry means nothing'
logger = logging.getLogger(__name__)

_VOXEL = 0.005  # of the median distance of the first window's points, where nothing is asked
_COLMAP_POINTS = 100_000
_COLMAP_VIEWS = 20  # of a point
_COLMAP_ERROR = 0.01  # of the width; a point that is farther from what a frame saw is not its
_GLB_POINTS = 300_000
# glTF: x right, y up, z to the viewer
_GLB_FROM_WORLD = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the files are made of."""

    voxel: float = 0.0  # side, unit of the map; 0: it follows from the scene
    most_points: int = 1_000_000
    refine: bool = False  # cameras, by the points that were followed


@dataclass(frozen=True, slots=True)
class Export:
    """What was made of the largest map."""

    joined: JoinedMap
    cloud: Cloud
    other_maps: tuple[int, ...]
    description: dict[str, Any]


def export(folder: Path, options: ExportOptions, counts: dict[str, Any]) -> Export:
    """
    Write the files into the folder of a run.

    :param counts: whatever is to be known of the run, for the description.
    :raises ValueError: if there is nothing in it.
    """
    sizes = map_sizes(folder)
    if not sizes:
        raise ValueError(f'{folder} has no windows')
    largest = max(sizes, key=lambda each: (sizes[each], -each))
    others = tuple(sorted(set(sizes) - {largest}))
    for other in others:
        joined = join_map(folder, other)
        _write_map(folder / 'other_maps' / str(other), joined, build_cloud(joined, options))
    joined = join_map(folder, largest)
    if options.refine:
        joined, refinement = refine_map(joined)
        logger.info('bundle adjustment: %s', refinement)
        counts = {**counts, 'refinement': str(refinement)}
    cloud = build_cloud(joined, options)
    _write_map(folder, joined, cloud)
    write_colmap(folder / 'sparse' / '0', make_colmap_model(joined, cloud))
    _write_scene(folder / 'scene.glb', joined, cloud)
    about = json.loads((folder / ABOUT).read_text())
    description = _describe(folder, joined, cloud, about, {'other_maps': others, **counts})
    with atomic_writer(folder / DESCRIPTION) as file:
        file.write(json.dumps(description, indent=1).encode())
    return Export(joined, cloud, others, description)


def build_cloud(joined: JoinedMap, options: ExportOptions) -> Cloud:
    """Gather the points of a map into voxels."""
    cloud: VoxelCloud | None = None
    for points in joined.points():
        if cloud is None:
            distance = float(np.median(np.linalg.norm(points.xyz, axis=1)))
            cloud = VoxelCloud(options.voxel or max(distance * _VOXEL, 1e-9), options.most_points)
        cloud.add(points.xyz, points.rgb, points.confidence, points.frame)
    return (cloud or VoxelCloud(1.0, 1)).cloud()


def make_colmap_model(joined: JoinedMap, cloud: Cloud) -> ColmapModel:
    """
    Let the voxels that several frames saw be COLMAP's points.

    An observation is the pixel whose point fell into the voxel. COLMAP has one camera for all
    pictures: the median of their cameras.
    """
    step = max(1, -(-len(cloud.keys) // _COLMAP_POINTS))
    keys, xyz = cloud.keys[::step], cloud.xyz[::step].astype(np.float64)
    rgb = cloud.rgb[::step]
    intrinsics: Array = np.median([frame.intrinsics for frame in joined.frames], axis=0)
    poses = np.stack([frame.world_from_camera for frame in joined.frames])
    camera_from_world = np.linalg.inv(poses).astype(np.float64)
    largest = _COLMAP_ERROR * joined.source_size[1]
    views = np.zeros(len(keys), np.int64)
    found: list[tuple[Any, ...]] = []
    for points in joined.points():
        own = voxel_keys(points.xyz, cloud.voxel)
        at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
        seen = np.flatnonzero(keys[at] == own)
        # one pixel of each frame
        _, first = np.unique(np.stack([points.frame[seen], at[seen]]), axis=1, return_index=True)
        seen = seen[first]
        seen = seen[views[at[seen]] < _COLMAP_VIEWS]
        pose = camera_from_world[points.frame[seen]]
        in_camera = (pose[:, :3, :3] @ xyz[at[seen]][..., None])[..., 0] + pose[:, :3, 3]
        shown = in_camera @ intrinsics.T
        pixels = shown[:, :2] / shown[:, 2:]
        error = np.linalg.norm(pixels - points.pixels[seen], axis=1)
        good = (in_camera[:, 2] > 0) & (error <= largest)
        seen, error = seen[good], error[good]
        np.add.at(views, at[seen], 1)
        found.append((at[seen], points.frame[seen], points.pixels[seen], error))
    nothing = (np.empty(0, np.intp), np.empty(0, np.int32), np.empty((0, 2)), np.empty(0))
    point, image, pixels, error = (
        np.concatenate(each) for each in zip(*(found or [nothing]), strict=True)
    )
    kept = views >= 2
    used = kept[point]
    number = np.cumsum(kept) - 1
    point = number[point[used]]
    total = np.bincount(point, error[used], kept.sum())
    return ColmapModel(
        size=joined.source_size,
        intrinsics=intrinsics,
        names=tuple(f'{frame.number:06d}.jpg' for frame in joined.frames),
        camera_from_world=camera_from_world,
        xyz=xyz[kept],
        rgb=rgb[kept],
        errors=total / np.maximum(views[kept], 1),
        point=point,
        image=image[used],
        pixels=pixels[used],
    )


def _write_map(folder: Path, joined: JoinedMap, cloud: Cloud) -> None:
    unit = f'unit: {joined.unit}; x right, y down, z forward from the first camera'
    with atomic_path(folder / 'cloud.ply') as path:
        write_cloud(path, cloud.xyz, cloud.rgb, cloud.confidence, cloud.frame, (unit,))
    stamps = [frame.stamp_ns * 1e-9 for frame in joined.frames]
    poses = np.stack([frame.world_from_camera for frame in joined.frames])
    with atomic_path(folder / 'trajectory.tum') as path:
        write_trajectory(path, stamps, poses)


def _write_scene(path: Path, joined: JoinedMap, cloud: Cloud) -> None:
    step = max(1, -(-len(cloud.xyz) // _GLB_POINTS))
    centres = np.stack([frame.world_from_camera[:3, 3] for frame in joined.frames])
    parts = []
    if len(cloud.xyz):
        parts.append(
            trimesh.PointCloud(cloud.xyz[::step] @ _GLB_FROM_WORLD, colors=cloud.rgb[::step])
        )
    if len(centres) > 1:
        way = trimesh.load_path(centres @ _GLB_FROM_WORLD)
        way.colors = np.tile([214, 39, 40, 255], (len(way.entities), 1))
        parts.append(way)
    with atomic_writer(path) as file:
        file.write(trimesh.Scene(parts).export(file_type='glb'))


def _describe(
    folder: Path,
    joined: JoinedMap,
    cloud: Cloud,
    about: dict[str, Any],
    counts: dict[str, Any],
) -> dict[str, Any]:
    height, width = joined.source_size
    return {
        'title': f'{about["source"]}: {len(joined.frames)} frames, {len(joined.windows)} windows',
        'warning': '' if about['model_trained'] else UNTRAINED,
        'unit': joined.unit,
        'model': about['model'],
        'map_id': joined.map_id,
        'points': len(cloud.xyz),
        'voxel': cloud.voxel,
        **counts,
        'frames': [
            {
                'image': _file(folder, 'images', f'{frame.number:06d}.jpg'),
                'depth': _file(folder, 'depth', f'{frame.number:06d}.png'),
                'depth_step': frame.depth_step,
                'stamp_ns': frame.stamp_ns,
                'map_id': joined.map_id,
                'intrinsics': frame.intrinsics.ravel().tolist(),
                'width': width,
                'height': height,
                'confidence': frame.confidence,
            }
            for frame in joined.frames
        ],
        'run': about,
    }


def _file(folder: Path, kind: str, name: str) -> str:
    return f'{kind}/{name}' if (folder / kind / name).exists() else ''
