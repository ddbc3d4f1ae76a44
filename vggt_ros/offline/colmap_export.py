# SPDX-License-Identifier: Apache-2.0
"""
A map as a sparse model of COLMAP, in which voxels that several frames see are the points.

An observation is the pixel whose point is in the voxel. COLMAP gets one PINHOLE camera for all
images, the median of their intrinsics. Its pixel coordinates begin at the corner of an image, not
at the centre of the first pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pycolmap

from vggt_ros.geometry.poses import Array
from vggt_ros.offline.assembled_map import AssembledMap
from vggt_ros.offline.folder_files import write_file
from vggt_ros.offline.frame_images import image_name
from vggt_ros.offline.voxel_grid import VoxelCloud, voxel_keys

_MAX_POINTS = 100_000
_MAX_TRACK_LENGTH = 20
_MAX_ERROR = 0.01  # reprojection error of an observation, relative to the width of the image
_CORNER = 0.5  # pixels from the corner of an image to the centre of its first pixel


@dataclass(frozen=True, slots=True)
class _Observations:
    """O observations of K points; see `_observe`."""

    point: npt.NDArray[np.intp]  # (O,), index of the point
    frame: npt.NDArray[np.int32]  # (O,), index of the frame
    pixels: Array  # (O, 2), pixel centres at integers
    error: Array  # (O,), reprojection error, pixels


def export_colmap(folder: Path, assembled: AssembledMap, cloud: VoxelCloud) -> None:
    """
    Write a sparse model.

    :param folder: of the reconstruction; the model is in `sparse/0`.
    """
    step = max(1, -(-len(cloud.keys) // _MAX_POINTS))
    keys, xyz, rgb = cloud.keys[::step], cloud.xyz[::step].astype(np.float64), cloud.rgb[::step]
    intrinsics: Array = np.median([frame.intrinsics for frame in assembled.frames], axis=0)
    poses = np.stack([frame.world_from_camera for frame in assembled.frames])
    camera_from_world = np.linalg.inv(poses).astype(np.float64)
    found = _observe(assembled, cloud.voxel, keys, xyz, intrinsics, camera_from_world)
    views = np.bincount(found.point, minlength=len(keys))
    kept = views >= 2
    used = kept[found.point]
    index = np.cumsum(kept) - 1
    observations = _Observations(
        index[found.point[used]], found.frame[used], found.pixels[used], found.error[used]
    )
    model = _make_model(
        assembled, intrinsics, camera_from_world, xyz[kept], rgb[kept], observations
    )
    # pycolmap writes to paths
    with TemporaryDirectory() as written:
        model.write(written)
        for path in sorted(Path(written).iterdir()):
            write_file(folder, f'sparse/0/{path.name}', path.read_bytes())


def _observe(
    assembled: AssembledMap,
    voxel: float,
    keys: npt.NDArray[np.int64],
    xyz: Array,
    intrinsics: Array,
    camera_from_world: Array,
) -> _Observations:
    """
    Find the pixels whose points are in the voxels.

    :param keys: (K,) of the voxels, increasing; `xyz` (K, 3) are their points.
    :param intrinsics: (3, 3).
    :param camera_from_world: (S, 4, 4).
    """
    max_error = _MAX_ERROR * assembled.source_size[1]
    views = np.zeros(len(keys), np.int64)
    parts = [
        _Observations(np.empty(0, np.intp), np.empty(0, np.int32), np.empty((0, 2)), xyz[:0, 0])
    ]
    for points in assembled.points():
        own = voxel_keys(points.xyz, voxel)
        at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
        seen = np.flatnonzero(keys[at] == own)
        # one pixel of each frame
        _, first = np.unique(np.stack([points.frame[seen], at[seen]]), axis=1, return_index=True)
        seen = seen[first]
        seen = seen[views[at[seen]] < _MAX_TRACK_LENGTH]
        pose = camera_from_world[points.frame[seen]]
        in_camera = (pose[:, :3, :3] @ xyz[at[seen]][..., None])[..., 0] + pose[:, :3, 3]
        projected = in_camera @ intrinsics.T
        pixels = projected[:, :2] / projected[:, 2:]
        error = np.linalg.norm(pixels - points.pixels[seen], axis=1)
        good = (in_camera[:, 2] > 0) & (error <= max_error)
        seen, error = seen[good], error[good]
        np.add.at(views, at[seen], 1)
        parts.append(_Observations(at[seen], points.frame[seen], points.pixels[seen], error))
    return _Observations(
        np.concatenate([part.point for part in parts]),
        np.concatenate([part.frame for part in parts]),
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.error for part in parts]),
    )


def _make_model(
    assembled: AssembledMap,
    intrinsics: Array,
    camera_from_world: Array,
    xyz: Array,
    rgb: npt.NDArray[np.uint8],
    observations: _Observations,
) -> pycolmap.Reconstruction:
    """Make COLMAP's objects; its ids begin at 1."""
    model = pycolmap.Reconstruction()
    height, width = assembled.source_size
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    cx, cy = intrinsics[:2, 2] + _CORNER
    model.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model='PINHOLE', width=width, height=height, params=[fx, fy, cx, cy], camera_id=1
        )
    )
    order = np.argsort(observations.frame, kind='stable')
    starts = np.searchsorted(observations.frame[order], np.arange(len(assembled.frames) + 1))
    tracks = [pycolmap.Track() for _ in xyz]
    for i, frame in enumerate(assembled.frames):
        own = order[starts[i] : starts[i + 1]]
        name = Path(image_name(frame.frame_id)).name
        image = pycolmap.Image(name=name, camera_id=1, image_id=i + 1)
        image.points2D = pycolmap.Point2DList(
            [
                pycolmap.Point2D(pixel + _CORNER)
                for pixel in observations.pixels[own].astype(np.float64)
            ]
        )
        pose = camera_from_world[i]
        model.add_image_with_trivial_frame(
            image, pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:3, :3]), pose[:3, 3])
        )
        for at, point in enumerate(observations.point[own].tolist()):
            tracks[point].add_element(i + 1, at)
    total = np.bincount(observations.point, observations.error, len(xyz))
    length = np.bincount(observations.point, minlength=len(xyz))
    errors = total / np.maximum(length, 1)
    for position, colour, error, track in zip(xyz, rgb, errors, tracks, strict=True):
        point_id = model.add_point3D(position, track, colour)
        model.points3D[point_id].error = float(error)
    return model
