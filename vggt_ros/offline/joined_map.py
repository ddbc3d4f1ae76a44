# SPDX-License-Identifier: Apache-2.0
"""
The windows of one map put together: where everything lies in the end.

Loops that were closed after a window was written have moved it, and the scale that the map ended
with holds for all of it. A frame is taken from the first window that has it. The world frame is
the optical frame of the map's first camera (z forward, x right, y down).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.offline.record import Record, load_record, load_records, record_files


@dataclass(frozen=True, slots=True)
class MapFrame:
    """One picture in its place."""

    number: int  # names its files
    stamp_ns: int
    world_from_camera: Array  # (4, 4), rigid
    depth_intrinsics: Array  # (3, 3), pixels of the depth picture
    source_from_depth: Array  # (3, 3), pixels of the depth picture to those of the source picture
    depth_step: float  # world units in one step of the depth picture; 0: there is none
    confidence: float  # mean over its depth

    @property
    def intrinsics(self) -> Array:
        """Give the camera matrix (3, 3) for pixels of the source picture."""
        matrix: Array = self.source_from_depth @ self.depth_intrinsics
        return matrix


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """What one window says of itself."""

    window_id: int
    stamp_ns: int  # of its newest frame
    factor: float  # metres in one unit of the map, as known then
    factor_valid: bool
    residual: float
    confidence: float
    seconds: Array  # (4,), of `record.STEPS`
    loop: bool  # a loop was closed with it


@dataclass(frozen=True, slots=True)
class MapPoints:
    """Points that one window added; P of them."""

    xyz: npt.NDArray[np.float32]  # (P, 3), world
    rgb: npt.NDArray[np.uint8]  # (P, 3)
    confidence: npt.NDArray[np.float32]  # (P,)
    frame: npt.NDArray[np.int32]  # (P,), index into `JoinedMap.frames`
    pixels: npt.NDArray[np.float32]  # (P, 2), x and y in the source picture


@dataclass(frozen=True, slots=True)
class JoinedMap:
    """All of one map but its points, which are read when they are wanted."""

    map_id: int
    frames: tuple[MapFrame, ...]  # in order of time
    windows: tuple[WindowFigures, ...]
    source_size: tuple[int, int]  # H, W of the pictures
    camera_frame: str
    unit: str  # 'm' or 'units of the network'
    factor: float  # metres in one unit of the map; 1 where that is unknown
    map_start_reason: str
    world_from_window: dict[int, Sim3]
    files: tuple[Path, ...]  # of its records

    def points(self) -> Iterator[MapPoints]:
        """Read the points, window by window."""
        index = {frame.number: i for i, frame in enumerate(self.frames)}
        for path in self.files:
            record = load_record(path)
            if len(record.pixel):
                seen_by = np.array([index[n] for n in record.ids.tolist()], np.int32)
                at = seen_by[np.searchsorted(record.ids, record.pixel_frame)]  # numbers rise
                scale = self.world_from_window[record.window_id].scale
                yield self._place_points(record, at, scale)

    def _place_points(
        self, record: Record, frame: npt.NDArray[np.int32], scale: float
    ) -> MapPoints:
        """Put the points of a record where the cameras of their frames are now."""
        v, u = np.divmod(record.pixel.astype(np.float64), record.network_size[1])
        homogeneous = np.stack([u, v, np.ones_like(u)], axis=1)[..., None]
        xyz, pixels = np.empty((len(u), 3)), np.empty((len(u), 2))
        for i in np.unique(frame):
            own, seen_by = frame == i, self.frames[i]
            rays = (np.linalg.inv(seen_by.depth_intrinsics) @ homogeneous[own])[..., 0]
            in_camera = rays * (scale * record.depth[own, None])
            camera = seen_by.world_from_camera
            xyz[own] = in_camera @ camera[:3, :3].T + camera[:3, 3]
            pixels[own] = (seen_by.source_from_depth @ homogeneous[own])[:, :2, 0]
        return MapPoints(
            xyz=xyz.astype(np.float32),
            rgb=record.rgb,
            confidence=record.pixel_confidence,
            frame=frame,
            pixels=pixels.astype(np.float32),
        )


def map_sizes(folder: Path) -> Counter[int]:
    """Count the windows of each map."""
    return Counter(record.map_id for record in load_records(folder))


def join_map(folder: Path, map_id: int) -> JoinedMap:
    """
    Put one map of a reconstruction together.

    :raises ValueError: if it has no such map, or a file is broken.
    """
    places: dict[int, Sim3] = {}
    records: list[Record] = []
    files = []
    for path in record_files(folder):
        record = load_record(path)
        if record.map_id != map_id:
            continue
        for number, moved in record.moved.items():
            if number in places:
                places[number] = moved @ places[number]
        places[record.window_id] = record.place_in_map
        records.append(_without_points(record))
        files.append(path)
    if not records:
        raise ValueError(f'{folder} has no map {map_id}')
    newest = records[-1]
    world_from_window = {
        number: Sim3(scale=newest.factor) @ place for number, place in places.items()
    }
    frames: dict[int, MapFrame] = {}
    for record in records:
        for frame in _frames(record, world_from_window[record.window_id]):
            frames.setdefault(frame.number, frame)
    return JoinedMap(
        map_id=map_id,
        frames=tuple(frames[number] for number in sorted(frames)),
        windows=tuple(_figures(record) for record in records),
        source_size=(int(newest.source_size[0]), int(newest.source_size[1])),
        camera_frame=newest.camera_frame,
        unit='m' if newest.factor_valid else 'units of the network',
        factor=newest.factor,
        map_start_reason=records[0].map_start_reason,
        world_from_window=world_from_window,
        files=tuple(files),
    )


def _frames(record: Record, world_from_window: Sim3) -> Iterator[MapFrame]:
    cameras = world_from_window.transform_poses(record.window_from_camera)
    for i, number in enumerate(record.ids.tolist()):
        yield MapFrame(
            number=number,
            stamp_ns=int(record.stamps_ns[i]),
            world_from_camera=cameras[i],
            depth_intrinsics=record.intrinsics[i],
            source_from_depth=record.source_from_network[i],
            depth_step=float(record.depth_steps[i] * world_from_window.scale),
            confidence=float(record.confidence[i]),
        )


def _figures(record: Record) -> WindowFigures:
    return WindowFigures(
        window_id=record.window_id,
        stamp_ns=int(record.stamps_ns[-1]),
        factor=record.factor,
        factor_valid=record.factor_valid,
        residual=record.residual,
        confidence=float(np.nanmean(record.confidence)),
        seconds=record.seconds,
        loop=len(record.corrected) > 0,
    )


def _without_points(record: Record) -> Record:
    """Let go of what is large: a map may have thousands of windows."""
    few = dict.fromkeys(('pixel_frame', 'pixel', 'depth', 'pixel_confidence', 'rgb'), _NONE)
    return replace(record, **few)  # type: ignore[arg-type]


_NONE = np.empty(0)
