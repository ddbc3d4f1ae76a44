# SPDX-License-Identifier: Apache-2.0
"""
A folder that `reconstruct` wrote becomes a scene.

Read are `reconstruction.json` (title, warning, unit, frames), `trajectory.tum` (a camera a line),
`images/` (a file a frame) and `cloud.ply` (binary, with confidence and the number of the frame).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vggt_ros.geometry.poses import matrices_from_poses
from vggt_ros.io.images import read_image
from vggt_ros.viewer.read_ply import read_vertices
from vggt_ros.viewer.scene import (
    MOST_CAMERAS,
    NO_PICTURE,
    Array,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)

_REPORT = 'reconstruction.json'
_KEYS = ('title', 'warning', 'unit', 'frames')
_PROPERTIES = ('x', 'y', 'z', 'red', 'green', 'blue', 'confidence', 'frame')


def read_scene(folder: Path) -> ViewerScene:
    """
    Read a finished reconstruction.

    Of several maps, which no known relation connects, the one with the most frames is taken, and
    of more frames than a scene has, every n-th; both are said, as warning and in the title.

    :raises ValueError: if the folder is not one, or its parts do not fit together.
    """
    report = _read_report(folder / _REPORT)
    frames = report['frames']
    poses = _read_poses(folder / 'trajectory.tum', len(frames))
    cloud = read_vertices(folder / 'cloud.ply', _PROPERTIES)
    if len(cloud) and not 0 <= cloud['frame'].min() <= cloud['frame'].max() < len(frames):
        raise ValueError(
            f'{folder / "cloud.ply"} names frames {cloud["frame"].min()} to '
            f'{cloud["frame"].max()}, expected 0 to {len(frames) - 1}'
        )
    chosen, note = _largest_map(frames)
    step = max(-(-len(chosen) // MOST_CAMERAS), 1)
    place = np.full(len(frames), -1, np.int32)  # of each frame among the cameras
    place[chosen] = np.arange(len(chosen), dtype=np.int32) // step
    cloud = cloud[place[cloud['frame']] >= 0]
    dropped = f' (1 in {step} of {len(chosen):,} frames)' if step > 1 else ''
    return ViewerScene(
        title=f'{report["title"]}{dropped}',
        warning='; '.join(part for part in (str(report['warning']), note) if part),
        unit=str(report['unit']),
        cameras=tuple(_read_camera(folder, frames[i], poses[i]) for i in chosen[::step]),
        xyz=np.stack([cloud[name] for name in 'xyz'], axis=-1).astype(np.float32),
        rgb=np.stack([cloud[name] for name in ('red', 'green', 'blue')], axis=-1),
        confidence=cloud['confidence'].astype(np.float32),
        frame=place[cloud['frame']],
    )


def read_when_changed(folder: Path) -> Callable[[], ViewerScene | None]:
    """Make what `follow` reads: the folder's scene whenever it is there and new."""
    seen: int | None = None

    def read() -> ViewerScene | None:
        nonlocal seen
        try:
            written = (folder / _REPORT).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if written == seen:
            return None
        scene = read_scene(folder)
        seen = written
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
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(report, dict) or not set(_KEYS) <= set(report):
        raise ValueError(f'{path} is not the report of a reconstruction: it lacks one of {_KEYS}')
    if not isinstance(report['frames'], list) or not report['frames']:
        raise ValueError(f'{path} lists no frames: there is nothing to see')
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
        raise ValueError(f'{path} has {len(rows)} cameras, expected {frames}, one a frame')
    lengths = np.linalg.norm(rows[:, 4:], axis=1)
    if not (np.isfinite(rows).all() and (lengths > 0).all()):
        raise ValueError(f'{path} holds numbers that are not finite or no rotation')
    return matrices_from_poses(rows[:, 1:])


def _largest_map(frames: list[Any]) -> tuple[list[int], str]:
    """Return the numbers of the frames of the map that has most, and a word about the others."""
    sizes = Counter(_entry(frame, 'map_id', int) for frame in frames)
    largest, size = sizes.most_common(1)[0]
    chosen = [i for i, frame in enumerate(frames) if frame['map_id'] == largest]
    if len(sizes) == 1:
        return chosen, ''
    return chosen, (
        f'{len(sizes)} maps without a known relation: this is the largest, with {size} of '
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
    image = read_image(folder / name) if name else np.full((*size, 3), NO_PICTURE, np.uint8)
    if image.shape[:2] != size:
        raise ValueError(
            f'{folder / frame["image"]} is {image.shape[1]}x{image.shape[0]} pixels, expected '
            f'{size[1]}x{size[0]}'
        )
    thumbnail, intrinsics = make_thumbnail(image, matrix.reshape(3, 3))
    return SceneCamera(_entry(frame, 'stamp_ns', int), pose, intrinsics, thumbnail)


def _entry(frame: Any, key: str, kind: type) -> Any:
    found = frame.get(key) if isinstance(frame, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f'a frame in {_REPORT} has {found!r} as {key}, expected {kind.__name__}')
    return found
