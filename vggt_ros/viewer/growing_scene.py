# SPDX-License-Identifier: Apache-2.0
"""A reconstruction that is being made becomes a scene, again and again, until it is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from vggt_ros.offline.assembled_map import AssembledMap, MapFrame, assemble_map
from vggt_ros.offline.export import ExportOptions, build_cloud
from vggt_ros.offline.folder_files import has_file
from vggt_ros.offline.frame_images import image_name, read_frame_image
from vggt_ros.offline.run import partial_folder, read_description
from vggt_ros.offline.window_record import list_records, read_record
from vggt_ros.settings import UNTRAINED_WARNING
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
        names = list_records(partial)
        if len(names) <= seen * _GROWTH:
            return None
        seen = len(names)
        try:
            return _put_together(partial, names, known)
        except FileNotFoundError:  # it has been finished meanwhile
            return None

    return read


def _put_together(folder: Path, names: list[str], known: dict[int, SceneCamera]) -> ViewerScene:
    assembled = assemble_map(folder, read_record(folder, names[-1]).map_id)
    cloud = build_cloud(assembled, ExportOptions(max_points=MOST_POINTS))
    about = read_description(folder)
    step = max(-(-len(assembled.frames) // MOST_CAMERAS), 1)
    cameras = tuple(_see(folder, assembled, frame, known) for frame in assembled.frames[::step])
    return ViewerScene(
        title=f'{about["source"]}: {len(assembled.frames)} frames so far',
        warning='' if about['model_trained'] else UNTRAINED_WARNING,
        unit=assembled.unit,
        cameras=cameras,
        xyz=cloud.xyz,
        rgb=cloud.rgb,
        confidence=cloud.confidence,
        frame=cloud.frame // np.int32(step),
    )


def _see(
    folder: Path, assembled: AssembledMap, frame: MapFrame, known: dict[int, SceneCamera]
) -> SceneCamera:
    """Show a frame; its picture is read once."""
    if frame.frame_id not in known:
        none = np.full((*assembled.source_size, 3), NO_PICTURE, np.uint8)
        kept = has_file(folder, image_name(frame.frame_id))
        picture = read_frame_image(folder, frame.frame_id) if kept else none
        small, intrinsics = make_thumbnail(picture, frame.intrinsics)
        known[frame.frame_id] = SceneCamera(
            frame.stamp_ns, frame.world_from_camera, intrinsics, small
        )
    return replace(known[frame.frame_id], world_from_camera=frame.world_from_camera)
