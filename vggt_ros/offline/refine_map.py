# SPDX-License-Identifier: Apache-2.0
"""The cameras of a whole map are refined by the points that were followed through its windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vggt_ros.offline.bundle_adjustment import refine
from vggt_ros.offline.joined_map import JoinedMap
from vggt_ros.offline.record import load_record
from vggt_ros.offline.refinement import Refinement, Tracks

_ENTRIES = 20_000_000  # frames times tracks: 640 MB; of more, tracks are left out evenly


def refine_map(joined: JoinedMap) -> tuple[JoinedMap, Refinement]:
    """
    Refine a map.

    :returns: the map, as it was where the refinement was refused, and what was found.
    """
    cameras = np.stack([frame.world_from_camera for frame in joined.frames])
    intrinsics = np.stack([frame.depth_intrinsics for frame in joined.frames])
    one_camera = np.zeros(len(cameras), np.int64)
    found = refine(cameras, intrinsics, one_camera, gather_tracks(joined))
    if not found.accepted:
        return joined, found
    frames = tuple(
        replace(frame, world_from_camera=camera, depth_intrinsics=matrix)
        for frame, camera, matrix in zip(
            joined.frames, found.world_from_camera, found.intrinsics, strict=True
        )
    )
    return replace(joined, frames=frames), found


def gather_tracks(joined: JoinedMap) -> Tracks:
    """Put the tracks of all windows beside each other; a point that two follow is two tracks."""
    index = {frame.number: i for i, frame in enumerate(joined.frames)}
    parts, total = [], 0
    for path in joined.files:
        record = load_record(path)
        frame = np.array([index[n] for n in record.track_frame.tolist()], np.int64)
        names, track = np.unique(record.track, return_inverse=True)
        parts.append((frame, track + total, record.track_pixels, record.track_confidence))
        total += len(names)
    step = max(1, -(-total * len(joined.frames) // _ENTRIES))
    count = -(-total // step)
    shape = len(joined.frames), count
    pixels, observed, confidence = (
        np.zeros((*shape, 2)),
        np.zeros(shape, np.bool_),
        np.zeros(shape),
    )
    for frame, track, places, believed in parts:
        kept = track % step == 0
        at = frame[kept], track[kept] // step
        pixels[at], observed[at], confidence[at] = places[kept], True, believed[kept]
    return Tracks(pixels, observed, confidence)
