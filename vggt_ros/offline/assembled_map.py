# SPDX-License-Identifier: Apache-2.0
"""
One map assembled from the records of its windows, with the final poses.

Loop closures move windows that were written before, and the last metric scale is used for all of
them. Of a frame in several windows the first one is used. The world frame is the optical frame of
the map's first camera (z forward, x right, y down).
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
from vggt_ros.offline.window_record import (
    WindowRecord,
    list_records,
    read_record,
    read_records,
)


@dataclass(frozen=True, slots=True)
class MapFrame:
    """One frame with its final pose."""

    frame_id: int  # names its files
    stamp_ns: int
    world_from_camera: Array  # (4, 4), rigid
    depth_intrinsics: Array  # (3, 3), pixels of the depth image
    source_from_depth: Array  # (3, 3), pixels of the depth image to those of the source image
    depth_size: tuple[int, int]  # H, W of the depth image
    depth_step: float  # world units per unit of the depth image; 0: there is none
    confidence: float  # mean of its depth; 0: unknown

    @property
    def intrinsics(self) -> Array:
        """The camera matrix (3, 3) for pixels of the source image."""
        matrix: Array = self.source_from_depth @ self.depth_intrinsics
        return matrix


@dataclass(frozen=True, slots=True)
class WindowStatistics:
    """Figures of one window, for the report."""

    window_id: int
    stamp_ns: int  # of its newest frame
    map_scale: float  # metres per map unit, as known then
    map_scale_valid: bool
    residual: float  # of the registration, relative to the depth
    confidence: float  # mean of its frames
    seconds: dict[str, float]  # by step
    loop_closed: bool


@dataclass(frozen=True, slots=True)
class MapPoints:
    """P points that one window added."""

    xyz: npt.NDArray[np.float32]  # (P, 3), world
    rgb: npt.NDArray[np.uint8]  # (P, 3)
    confidence: npt.NDArray[np.float32]  # (P,)
    frame: npt.NDArray[np.int32]  # (P,), index into `AssembledMap.frames`
    pixels: npt.NDArray[np.float32]  # (P, 2), x and y in the source image


@dataclass(frozen=True, slots=True)
class AssembledMap:
    """One map; its points are read on demand."""

    folder: Path  # of the reconstruction
    map_id: int
    frames: tuple[MapFrame, ...]  # in time order
    windows: tuple[WindowStatistics, ...]
    source_size: tuple[int, int]  # H, W of the source images
    camera_frame: str
    unit: str  # 'm' or 'units of the network'
    map_start_reason: str
    world_from_window: dict[int, Sim3]
    records: tuple[str, ...]  # files, relative to the folder

    def points(self) -> Iterator[MapPoints]:
        """Read the points, window by window."""
        index = {frame.frame_id: i for i, frame in enumerate(self.frames)}
        for record in self.read_records():
            if len(record.point_pixels):
                of_window = np.array([index[n] for n in record.frame_ids.tolist()], np.int32)
                frame = of_window[np.searchsorted(record.frame_ids, record.point_frame_ids)]
                scale = self.world_from_window[record.window_id].scale
                yield self._unproject(record, frame, scale)

    def read_records(self) -> Iterator[WindowRecord]:
        """Read the records of the map one by one."""
        for name in self.records:
            yield read_record(self.folder, name)

    def _unproject(
        self, record: WindowRecord, frame: npt.NDArray[np.int32], scale: float
    ) -> MapPoints:
        """Unproject the points of a record from the final poses of their frames."""
        v, u = np.divmod(record.point_pixels.astype(np.float64), record.network_size[1])
        homogeneous = np.stack([u, v, np.ones_like(u)], axis=1)[..., None]
        xyz, pixels = np.empty((len(u), 3)), np.empty((len(u), 2))
        for i in np.unique(frame):
            own, camera = frame == i, self.frames[i]
            rays = (np.linalg.inv(camera.depth_intrinsics) @ homogeneous[own])[..., 0]
            in_camera = rays * (scale * record.point_depth[own, None])
            pose = camera.world_from_camera
            xyz[own] = in_camera @ pose[:3, :3].T + pose[:3, 3]
            pixels[own] = (camera.source_from_depth @ homogeneous[own])[:, :2, 0]
        return MapPoints(
            xyz=xyz.astype(np.float32),
            rgb=record.point_rgb,
            confidence=record.point_confidence,
            frame=frame,
            pixels=pixels.astype(np.float32),
        )


def count_windows(folder: Path) -> Counter[int]:
    """Count the windows of each map of a reconstruction."""
    return Counter(record.map_id for record in read_records(folder))


def assemble_map(folder: Path, map_id: int) -> AssembledMap:
    """
    Assemble one map of a reconstruction.

    :raises ValueError: if it has no such map, or a file is damaged.
    """
    map_from_window: dict[int, Sim3] = {}
    records: list[WindowRecord] = []
    names = []
    for name in list_records(folder):
        record = read_record(folder, name)
        if record.map_id != map_id:
            continue
        for window_id, correction in record.corrections.items():
            if window_id in map_from_window:
                map_from_window[window_id] = correction @ map_from_window[window_id]
        map_from_window[record.window_id] = record.map_from_window
        records.append(_without_points(record))
        names.append(name)
    if not records:
        raise ValueError(f'{folder} has no map {map_id}')
    newest = records[-1]
    world_from_map = Sim3(scale=newest.map_scale)
    world_from_window = {n: world_from_map @ each for n, each in map_from_window.items()}
    frames: dict[int, MapFrame] = {}
    for record in records:
        for frame in _frames(record, world_from_window[record.window_id]):
            frames.setdefault(frame.frame_id, frame)
    return AssembledMap(
        folder=folder,
        map_id=map_id,
        frames=tuple(frames[frame_id] for frame_id in sorted(frames)),
        windows=tuple(_statistics(record) for record in records),
        source_size=(int(newest.source_size[0]), int(newest.source_size[1])),
        camera_frame=newest.camera_frame,
        unit='m' if newest.map_scale_valid else 'units of the network',
        map_start_reason=records[0].map_start_reason,
        world_from_window=world_from_window,
        records=tuple(names),
    )


def _frames(record: WindowRecord, world_from_window: Sim3) -> Iterator[MapFrame]:
    cameras = world_from_window.transform_poses(record.window_from_camera)
    for i, frame_id in enumerate(record.frame_ids.tolist()):
        yield MapFrame(
            frame_id=frame_id,
            stamp_ns=int(record.stamps_ns[i]),
            world_from_camera=cameras[i],
            depth_intrinsics=record.intrinsics[i],
            source_from_depth=record.source_from_network[i],
            depth_size=(int(record.network_size[0]), int(record.network_size[1])),
            depth_step=float(record.depth_steps[i] * world_from_window.scale),
            confidence=float(record.confidence[i]),
        )


def _statistics(record: WindowRecord) -> WindowStatistics:
    known = record.confidence[record.confidence > 0]
    return WindowStatistics(
        window_id=record.window_id,
        stamp_ns=int(record.stamps_ns[-1]),
        map_scale=record.map_scale,
        map_scale_valid=record.map_scale_valid,
        residual=record.residual,
        confidence=float(known.mean()) if len(known) else 0.0,
        seconds=record.seconds,
        loop_closed=bool(record.corrections),
    )


def _without_points(record: WindowRecord) -> WindowRecord:
    """Drop the large arrays: a map may have thousands of windows."""
    return replace(
        record,
        point_frame_ids=record.point_frame_ids[:0].copy(),
        point_pixels=record.point_pixels[:0].copy(),
        point_depth=record.point_depth[:0].copy(),
        point_confidence=record.point_confidence[:0].copy(),
        point_rgb=record.point_rgb[:0].copy(),
    )
