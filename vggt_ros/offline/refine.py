# SPDX-License-Identifier: Apache-2.0
"""Bundle adjustment of a window, or of a whole map over the tracks of all its windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vggt_ros.frames.batch import Batch
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.offline.assembled_map import AssembledMap
from vggt_ros.offline.bundle_adjustment import refine_cameras
from vggt_ros.offline.point_tracks import (
    TrackingOptions,
    TrackPredictor,
    track_window,
    unproject_queries,
)
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks

_MAX_ENTRIES = 20_000_000  # frames times tracks: 640 MB; tracks beyond are subsampled


def refine_window(
    network: TrackPredictor,
    batch: Batch,
    reconstruction: Reconstruction,
    options: TrackingOptions | None = None,
    criteria: Criteria | None = None,
) -> Refinement:
    """
    Refine the cameras of one window with tracks of the network.

    :returns: cameras in the window's frame and scale, in the order of the batch.
    :raises ValueError: if pycolmap is not installed.
    """
    # no queries where the lens does not see
    confidence = {
        i: values if (seen := batch.images[i].seen) is None else np.where(seen, values, 0)
        for i, values in reconstruction.confidence.items()
    }
    tracked = track_window(network, batch.stack(), confidence, options)
    cameras = reconstruction.window_from_camera, reconstruction.intrinsics
    points = unproject_queries(tracked, reconstruction.depth, *cameras)
    index = np.array([frame.camera for frame in batch.frames])
    return refine_cameras(*cameras, index, tracked.tracks, points, criteria)


def refine_map(assembled: AssembledMap) -> tuple[AssembledMap, Refinement]:
    """
    Refine the cameras of a map.

    :returns: the refined map, or the given one if the refinement was rejected.
    """
    cameras = np.stack([frame.world_from_camera for frame in assembled.frames])
    intrinsics = np.stack([frame.depth_intrinsics for frame in assembled.frames])
    one_camera = np.zeros(len(cameras), np.int64)
    refined = refine_cameras(cameras, intrinsics, one_camera, gather_tracks(assembled))
    if not refined.accepted:
        return assembled, refined
    frames = tuple(
        replace(frame, world_from_camera=camera, depth_intrinsics=matrix)
        for frame, camera, matrix in zip(
            assembled.frames, refined.world_from_camera, refined.intrinsics, strict=True
        )
    )
    return replace(assembled, frames=frames), refined


def gather_tracks(assembled: AssembledMap) -> Tracks:
    """Collect the tracks of all windows; a point tracked in two windows has two tracks."""
    index = {frame.frame_id: i for i, frame in enumerate(assembled.frames)}
    parts, total = [], 0
    for record in assembled.read_records():
        frame = np.array([index[n] for n in record.track_frame_ids.tolist()], np.int64)
        names, track = np.unique(record.track_ids, return_inverse=True)
        parts.append((frame, track + total, record.track_pixels, record.track_confidence))
        total += len(names)
    step = max(1, -(-total * len(assembled.frames) // _MAX_ENTRIES))
    shape = len(assembled.frames), -(-total // step)
    pixels, observed, confidence = (
        np.zeros((*shape, 2)),
        np.zeros(shape, np.bool_),
        np.zeros(shape),
    )
    for frame, track, part_pixels, part_confidence in parts:
        kept = track % step == 0
        at = frame[kept], track[kept] // step
        pixels[at], observed[at], confidence[at] = part_pixels[kept], True, part_confidence[kept]
    return Tracks(pixels, observed, confidence)
