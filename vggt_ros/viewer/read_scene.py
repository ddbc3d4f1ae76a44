# SPDX-License-Identifier: Apache-2.0
"""
Reads the output folder of `reconstruct` as a scene.

Of its files, `reconstruction.json` (title, warning, unit, frames), `trajectory.tum` (a camera per
line), `images/` (a file per frame) and `cloud.ply` (with confidence and frame index) are used.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vggt_ros.geometry.poses import matrices_from_poses
from vggt_ros.io.cloud_file import read_ply_vertices
from vggt_ros.io.images import read_image
from vggt_ros.viewer.scene import (
    MAX_CAMERAS,
    MISSING_IMAGE_GREY,
    Array,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)

_REPORT = 'reconstruction.json'
_KEYS = ('title', 'warning', 'unit', 'frames')
_PROPERTIES = ('x', 'y', 'z', 'red', 'green', 'blue', 'confidence', 'frame')


def read_scene(folder: Path, max_cameras: int = MAX_CAMERAS) -> ViewerScene:
    """
    Read a finished reconstruction.

    Of several maps, whose relative poses are unknown, the one with the most frames is read; the
    warning states this. Of more than `max_cameras` frames, every n-th is read; the title states n.

    :raises ValueError: if a file is missing, invalid, or inconsistent with the others.
    """
    report = _read_report(folder / _REPORT)
    frames = report['frames']
    poses = _read_poses(folder / 'trajectory.tum', len(frames))
    cloud = read_ply_vertices(folder / 'cloud.ply', _PROPERTIES)
    if len(cloud) and not 0 <= cloud['frame'].min() <= cloud['frame'].max() < len(frames):
        raise ValueError(
            f'{folder / "cloud.ply"} has frame indices {cloud["frame"].min()} to '
            f'{cloud["frame"].max()}, expected 0 to {len(frames) - 1}'
        )
    indices, map_warning = _largest_map(frames)
    step = max(-(-len(indices) // max_cameras), 1)
    camera_of_frame = np.full(len(frames), -1, np.int32)
    camera_of_frame[indices] = np.arange(len(indices), dtype=np.int32) // step
    cloud = cloud[camera_of_frame[cloud['frame']] >= 0]
    subsampled = f' (1 in {step} of {len(indices):,} frames)' if step > 1 else ''
    return ViewerScene(
        title=f'{report["title"]}{subsampled}',
        warning='; '.join(part for part in (str(report['warning']), map_warning) if part),
        unit=str(report['unit']),
        cameras=tuple(_read_camera(folder, frames[i], poses[i]) for i in indices[::step]),
        xyz=np.stack([cloud[name] for name in 'xyz'], axis=-1).astype(np.float32),
        rgb=np.stack([cloud[name] for name in ('red', 'green', 'blue')], axis=-1),
        confidence=cloud['confidence'].astype(np.float32),
        frame=camera_of_frame[cloud['frame']],
    )


def read_when_changed(folder: Path) -> Callable[[], ViewerScene | None]:
    """Return a function that reads the scene if the folder is new or has changed, else None."""
    last_mtime: int | None = None

    def read() -> ViewerScene | None:
        nonlocal last_mtime
        try:
            mtime = (folder / _REPORT).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if mtime == last_mtime:
            return None
        scene = read_scene(folder)
        last_mtime = mtime
        return scene

    return read


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f'{path.parent} is not the output folder of a reconstruction: {path.name} cannot be '
            f'read ({error.strerror})'
        ) from error
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(report, dict) or not set(_KEYS) <= set(report):
        raise ValueError(f'{path} is not the report of a reconstruction: it lacks one of {_KEYS}')
    if not isinstance(report['frames'], list) or not report['frames']:
        raise ValueError(f'{path} has no frames')
    return report


def _read_poses(path: Path, frames: int) -> Array:
    """Return world_from_camera (S, 4, 4)."""
    try:
        rows = np.loadtxt(path, np.float64, ndmin=2).reshape(-1, 8)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{path} cannot be read as lines of stamp, tx ty tz, qx qy qz qw: {error}'
        ) from error
    if len(rows) != frames:
        raise ValueError(f'{path} has {len(rows)} cameras, expected {frames}, one per frame')
    lengths = np.linalg.norm(rows[:, 4:], axis=1)
    if not (np.isfinite(rows).all() and (lengths > 0).all()):
        raise ValueError(f'{path} has values that are not finite, or a quaternion of norm 0')
    return matrices_from_poses(rows[:, 1:])


def _largest_map(frames: list[Any]) -> tuple[list[int], str]:
    """Return the frame indices of the largest map, and a warning if there are others."""
    sizes = Counter(_entry(frame, 'map_id', int) for frame in frames)
    largest, size = sizes.most_common(1)[0]
    indices = [i for i, frame in enumerate(frames) if frame['map_id'] == largest]
    if len(sizes) == 1:
        return indices, ''
    return indices, (
        f'{len(sizes)} maps with unknown relative poses: showing the largest, with {size} of '
        f'{len(frames)} frames'
    )


def _read_camera(folder: Path, frame: Any, pose: Array) -> SceneCamera:
    matrix = np.array(_entry(frame, 'intrinsics', list), np.float64)
    if matrix.shape != (9,) or not (matrix[0] > 0 and matrix[4] > 0):
        raise ValueError(
            f'the intrinsics of a frame in {folder / _REPORT} are {matrix.tolist()}, expected 9 '
            'numbers with focal lengths greater than 0'
        )
    size = (_entry(frame, 'height', int), _entry(frame, 'width', int))
    name = _entry(frame, 'image', str)
    image = (
        read_image(folder / name) if name else np.full((*size, 3), MISSING_IMAGE_GREY, np.uint8)
    )
    if image.shape[:2] != size:
        raise ValueError(
            f'{folder / frame["image"]} is {image.shape[1]}x{image.shape[0]} pixels, expected '
            f'{size[1]}x{size[0]}'
        )
    thumbnail, intrinsics = make_thumbnail(image, matrix.reshape(3, 3))
    return SceneCamera(_entry(frame, 'stamp_ns', int), pose, intrinsics, thumbnail)


def _entry(frame: Any, key: str, kind: type) -> Any:
    value = frame.get(key) if isinstance(frame, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f'a frame in {_REPORT} has {value!r} as {key}, expected {kind.__name__}')
    return value
