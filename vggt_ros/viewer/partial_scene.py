# SPDX-License-Identifier: Apache-2.0
"""Reads the scene of a reconstruction that is still in progress, until it is finished."""

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
    MAX_CAMERAS,
    MAX_POINTS,
    MISSING_IMAGE_GREY,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)

_GROWTH = 1.05  # factor of the number of windows after which the map is assembled again


def read_while_growing(folder: Path) -> Callable[[], ViewerScene | None]:
    """
    Return a function that reads the current scene if it has grown, else None.

    :param folder: the output folder, which exists once the reconstruction is finished.
    """
    finished = read_when_changed(folder)
    partial = partial_folder(folder)
    known: dict[int, SceneCamera] = {}
    windows = 0

    def read() -> ViewerScene | None:
        nonlocal windows
        if folder.exists():
            return finished()
        names = list_records(partial)
        if len(names) <= windows * _GROWTH:
            return None
        windows = len(names)
        try:
            return _assemble(partial, names, known)
        except FileNotFoundError:  # the reconstruction has just finished
            return None

    return read


def _assemble(folder: Path, names: list[str], known: dict[int, SceneCamera]) -> ViewerScene:
    assembled = assemble_map(folder, read_record(folder, names[-1]).map_id)
    cloud = build_cloud(assembled, ExportOptions(max_points=MAX_POINTS))
    about = read_description(folder)
    step = max(-(-len(assembled.frames) // MAX_CAMERAS), 1)
    cameras = tuple(_camera(folder, assembled, frame, known) for frame in assembled.frames[::step])
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


def _camera(
    folder: Path, assembled: AssembledMap, frame: MapFrame, known: dict[int, SceneCamera]
) -> SceneCamera:
    """Return the camera of a frame; its image is read once."""
    if frame.frame_id not in known:
        missing = np.full((*assembled.source_size, 3), MISSING_IMAGE_GREY, np.uint8)
        exists = has_file(folder, image_name(frame.frame_id))
        image = read_frame_image(folder, frame.frame_id) if exists else missing
        thumbnail, intrinsics = make_thumbnail(image, frame.intrinsics)
        known[frame.frame_id] = SceneCamera(
            frame.stamp_ns, frame.world_from_camera, intrinsics, thumbnail
        )
    return replace(known[frame.frame_id], world_from_camera=frame.world_from_camera)
