# SPDX-License-Identifier: Apache-2.0
"""
The windows of a run become files that other tools read.

    cloud.ply            voxels with colour, confidence and the first frame that saw them
    trajectory.tum       camera-to-world, one line per frame
    sparse/0/            COLMAP model with tracks; with `images/`, the folder is a data set
    scene.glb            cloud and trajectory for any 3-D viewer (y up, as in glTF)
    reconstruction.json  frames, files, unit, network, counts

The largest map is in the folder itself, others in `other_maps/<map id>/`, without COLMAP.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import trimesh

from vggt_ros.io.cloud_file import write_cloud
from vggt_ros.io.map_bag import MapBag
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.offline.assembled_map import AssembledMap, assemble_map, count_windows
from vggt_ros.offline.colmap_export import export_colmap
from vggt_ros.offline.folder_files import file_writer, has_file, read_file, write_file
from vggt_ros.offline.frame_images import depth_name, image_name, read_frame_depth
from vggt_ros.offline.refine import refine_map
from vggt_ros.offline.voxel_grid import VoxelCloud, VoxelGrid
from vggt_ros.settings import UNTRAINED_WARNING

_DESCRIPTION = 'reconstruction.json'
logger = logging.getLogger(__name__)

_VOXEL = 0.005  # default side, relative to the median distance of the first window's points
_GLB_POINTS = 300_000
# glTF: x right, y up, z towards the viewer
_GLB_FROM_WORLD = np.diag([1.0, -1.0, -1.0])
_PATH_COLOUR = (214, 39, 40, 255)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How the files are made."""

    voxel: float = 0.0  # side of the cloud's voxels, world units; 0: derived from the scene
    max_points: int = 1_000_000  # of the cloud
    refine: bool = False  # bundle adjustment over the tracks


@dataclass(frozen=True, slots=True)
class Export:
    """What was exported of the largest map."""

    map: AssembledMap
    cloud: VoxelCloud
    other_maps: tuple[int, ...]
    description: dict[str, Any]  # as in `reconstruction.json`


def export(
    folder: Path, options: ExportOptions, run: dict[str, Any], counts: dict[str, Any]
) -> Export:
    """
    Write the files into the folder of a run.

    :param run: its description.
    :param counts: further entries of `reconstruction.json`.
    :raises ValueError: if the folder contains no windows, or a damaged one.
    """
    sizes = count_windows(folder)
    if not sizes:
        raise ValueError(f'{folder} has no windows')
    largest = max(sizes, key=lambda each: (sizes[each], -each))
    others = tuple(sorted(set(sizes) - {largest}))
    for map_id in others:
        assembled = assemble_map(folder, map_id)
        _write_map(folder, f'other_maps/{map_id}/', assembled, build_cloud(assembled, options))
    assembled = assemble_map(folder, largest)
    if options.refine:
        assembled, refinement = refine_map(assembled)
        logger.info('bundle adjustment: %s', refinement)
        counts = {**counts, 'refinement': str(refinement)}
    cloud = build_cloud(assembled, options)
    _write_map(folder, '', assembled, cloud)
    export_colmap(folder, assembled, cloud)
    write_file(folder, 'scene.glb', _make_glb(assembled, cloud))
    description = _describe(assembled, cloud, run, {'other_maps': others, **counts})
    write_file(folder, _DESCRIPTION, json.dumps(description, indent=1).encode())
    return Export(assembled, cloud, others, description)


def export_bag(assembled: AssembledMap, bag: Path) -> None:
    """
    Write a map as a bag of what the node would have published.

    :param bag: `.mcap` file to make; it appears when it is complete.
    """
    poses = np.stack([frame.world_from_camera for frame in assembled.frames])
    stamps = [frame.stamp_ns for frame in assembled.frames]
    # rosbag2 writes folders; this one contains one file
    with TemporaryDirectory(prefix=f'.{bag.stem}', dir=bag.parent) as beside:
        with MapBag(Path(beside) / bag.stem, stamps, poses) as written:
            for i, frame in enumerate(assembled.frames):
                if not frame.depth_step:
                    continue  # it is new in another map
                name = image_name(frame.frame_id)
                image = (
                    read_file(assembled.folder, name) if has_file(assembled.folder, name) else b''
                )
                depth = read_frame_depth(
                    assembled.folder, frame.frame_id, frame.depth_step, frame.depth_size
                )
                written.write_frame(
                    i, assembled.camera_frame, image, depth, frame.depth_intrinsics
                )
            for points in assembled.points():
                for i in np.unique(points.frame):
                    own = points.frame == i
                    written.write_points(
                        int(i), points.xyz[own], points.rgb[own], points.confidence[own]
                    )
        os.replace(next(Path(beside).glob('*/*.mcap')), bag)


def build_cloud(assembled: AssembledMap, options: ExportOptions) -> VoxelCloud:
    """Downsample the points of a map."""
    grid: VoxelGrid | None = None
    for points in assembled.points():
        if grid is None:
            distance = float(np.median(np.linalg.norm(points.xyz, axis=1)))
            grid = VoxelGrid(options.voxel or max(distance * _VOXEL, 1e-9), options.max_points)
        grid.add(points.xyz, points.rgb, points.confidence, points.frame)
    return (grid or VoxelGrid(1.0, 1)).cloud()


def _write_map(folder: Path, below: str, assembled: AssembledMap, cloud: VoxelCloud) -> None:
    """
    Write cloud and trajectory.

    :param below: prefix of their names.
    """
    unit = f'unit: {assembled.unit}; x right, y down, z forward from the first camera'
    with file_writer(folder, f'{below}cloud.ply') as file:
        write_cloud(file, cloud.xyz, cloud.rgb, cloud.confidence, cloud.frame, (unit,))
    stamps = [frame.stamp_ns * 1e-9 for frame in assembled.frames]
    poses = np.stack([frame.world_from_camera for frame in assembled.frames])
    with file_writer(folder, f'{below}trajectory.tum') as file:
        write_trajectory(file, stamps, poses)


def _make_glb(assembled: AssembledMap, cloud: VoxelCloud) -> bytes:
    step = max(1, -(-len(cloud.xyz) // _GLB_POINTS))
    centres = np.stack([frame.world_from_camera[:3, 3] for frame in assembled.frames])
    parts = []
    if len(cloud.xyz):
        parts.append(
            trimesh.PointCloud(cloud.xyz[::step] @ _GLB_FROM_WORLD, colors=cloud.rgb[::step])
        )
    if len(centres) > 1:
        trajectory = trimesh.load_path(centres @ _GLB_FROM_WORLD)
        trajectory.colors = np.tile(_PATH_COLOUR, (len(trajectory.entities), 1))
        parts.append(trajectory)
    data: bytes = trimesh.Scene(parts).export(file_type='glb')
    return data


def _describe(
    assembled: AssembledMap, cloud: VoxelCloud, run: dict[str, Any], counts: dict[str, Any]
) -> dict[str, Any]:
    height, width = assembled.source_size
    frames, windows = len(assembled.frames), len(assembled.windows)
    return {
        'title': f'{run["source"]}: {frames} frames, {windows} windows',
        'warning': '' if run['model_trained'] else UNTRAINED_WARNING,
        'unit': assembled.unit,
        'model': run['model'],
        'map_id': assembled.map_id,
        'points': len(cloud.xyz),
        'voxel': cloud.voxel,
        **counts,
        'frames': [
            {
                'image': _existing(assembled.folder, image_name(frame.frame_id)),
                'depth': _existing(assembled.folder, depth_name(frame.frame_id)),
                'depth_step': frame.depth_step,
                'stamp_ns': frame.stamp_ns,
                'map_id': assembled.map_id,
                'intrinsics': frame.intrinsics.ravel().tolist(),
                'width': width,
                'height': height,
                'confidence': frame.confidence,
            }
            for frame in assembled.frames
        ],
        'run': run,
    }


def _existing(folder: Path, name: str) -> str:
    return name if has_file(folder, name) else ''
