# SPDX-License-Identifier: Apache-2.0
"""A reconstruction that is being made becomes a scene, again and again, until it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from vggt_ros.io.images import read_image
from vggt_ros.offline.export import UNTRAINED, ExportOptions, build_cloud
from vggt_ros.offline.joined_map import JoinedMap, MapFrame, join_map
from vggt_ros.offline.record import load_record, record_files
from vggt_ros.offline.run import ABOUT, partial_folder
from vggt_ros.viewer.read_scene import read_when_changed
from vggt_ros.viewer.scene import (
    MOST_CAMERAS,
    MOST_POINTS,
    NO_PICTURE,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)

_GROWTH = 1.05  # times the windows, before all of it is put together again


def read_growing(folder: Path) -> Callable[[], ViewerScene | None]:
    """
    Make what `follow` reads.

    :param folder: the output that was asked for; it is there when the reconstruction is finished.
    :returns: gives the newest map whenever there is more of it; at last what was written.
    """
    finished = read_when_changed(folder)
    partial = partial_folder(folder)
    known: dict[int, SceneCamera] = {}
    seen = 0

    def read() -> ViewerScene | None:
        nonlocal seen
        if folder.exists():
            return finished()
        files = record_files(partial)
        if len(files) <= seen * _GROWTH:
            return None
        seen = len(files)
        try:
            return _put_together(partial, files, known)
        except FileNotFoundError:  # it has been finished meanwhile
            return None

    return read


def _put_together(folder: Path, files: list[Path], known: dict[int, SceneCamera]) -> ViewerScene:
    joined = join_map(folder, load_record(files[-1]).map_id)
    cloud = build_cloud(joined, ExportOptions(most_points=MOST_POINTS))
    about = json.loads((folder / ABOUT).read_text())
    step = max(-(-len(joined.frames) // MOST_CAMERAS), 1)
    cameras = tuple(_see(folder, joined, frame, known) for frame in joined.frames[::step])
    return ViewerScene(
        title=f'{about["source"]}: {len(joined.frames)} frames so far',
        warning='' if about['model_trained'] else UNTRAINED,
        unit=joined.unit,
        cameras=cameras,
        xyz=cloud.xyz,
        rgb=cloud.rgb,
        confidence=cloud.confidence,
        frame=cloud.frame // np.int32(step),
    )


def _see(
    folder: Path, joined: JoinedMap, frame: MapFrame, known: dict[int, SceneCamera]
) -> SceneCamera:
    """Show a frame; its picture is read once."""
    if frame.number not in known:
        path = folder / 'images' / f'{frame.number:06d}.jpg'
        none = np.full((*joined.source_size, 3), NO_PICTURE, np.uint8)
        picture = read_image(path) if path.exists() else none
        small, intrinsics = make_thumbnail(picture, frame.intrinsics)
        known[frame.number] = SceneCamera(
            frame.stamp_ns, frame.world_from_camera, intrinsics, small
        )
    return replace(known[frame.number], world_from_camera=frame.world_from_camera)
