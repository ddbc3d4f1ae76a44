# SPDX-License-Identifier: Apache-2.0
"""
What one window adds to a reconstruction, as a file of its own.

Geometry is in the window's own frame and scale, beside the transform into the map: a loop closure,
or a metric scale known later, moves a window without rewriting it. Pixels are those of the
network's image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.offline.folder_files import list_files
from vggt_ros.offline.refinement import Tracks
from vggt_ros.offline.state_file import read_state, write_state
from vggt_ros.state_dict import from_state_dict, to_state_dict

WINDOWS = 'windows'
STEPS = ('preprocess', 'inference', 'reconstruct', 'register')
_SUFFIX = '.safetensors'
_MAX_SIDE = 1 << 16  # pixels of an image
_RIGID = 1e-3  # deviation of R R' from the identity


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """One window of S frames; P points of new frames, O observations of tracks."""

    window_id: int
    map_id: int
    map_start_reason: str  # '' if the map continues
    frame_ids: npt.NDArray[np.int64]  # (S,), increasing
    is_new: npt.NDArray[np.bool_]  # (S,)
    stamps_ns: npt.NDArray[np.int64]  # (S,)
    camera_frame: str
    window_from_camera: Array  # (S, 4, 4), rigid
    intrinsics: Array  # (S, 3, 3), pixels of the network's image
    source_from_network: Array  # (S, 3, 3), pixels of the network's image to those of the source
    network_size: npt.NDArray[np.int64]  # (2,): H, W
    source_size: npt.NDArray[np.int64]  # (2,): H, W
    map_from_window: Sim3  # as registered
    corrections: dict[int, Sim3]  # by window: new from old pose in the map, of a loop closed here
    map_scale: float  # metres per map unit, as known then
    map_scale_valid: bool
    scale_source: str
    confidence: Array  # (S,), mean of each frame; 0: unknown
    residual: float  # of the registration, relative to the depth; 0 where a map starts
    inliers: float
    seconds: dict[str, float]  # by step
    point_frame_ids: npt.NDArray[np.int64]  # (P,)
    point_pixels: npt.NDArray[np.int32]  # (P,), row * W + column
    point_depth: npt.NDArray[np.float32]  # (P,), along the optical axis, scale of the window
    point_confidence: npt.NDArray[np.float32]  # (P,)
    point_rgb: npt.NDArray[np.uint8]  # (P, 3)
    track_ids: npt.NDArray[np.int64]  # (O,)
    track_frame_ids: npt.NDArray[np.int64]  # (O,)
    track_pixels: Array  # (O, 2)
    track_confidence: Array  # (O,)
    depth_steps: Array  # (S,), window units per unit of the depth image; 0: there is no image

    def __post_init__(self) -> None:
        frames, points = len(self.frame_ids), len(self.point_pixels)
        observations = len(self.track_ids)
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(('frame_ids', 'is_new', 'stamps_ns'), (frames,)),
            **dict.fromkeys(('confidence', 'depth_steps'), (frames,)),
            'window_from_camera': (frames, 4, 4),
            **dict.fromkeys(('intrinsics', 'source_from_network'), (frames, 3, 3)),
            **dict.fromkeys(('network_size', 'source_size'), (2,)),
            **dict.fromkeys(('point_frame_ids', 'point_pixels'), (points,)),
            **dict.fromkeys(('point_depth', 'point_confidence'), (points,)),
            'point_rgb': (points, 3),
            **dict.fromkeys(('track_ids', 'track_frame_ids'), (observations,)),
            'track_pixels': (observations, 2),
            'track_confidence': (observations,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f'{name} is {getattr(self, name).shape}; expected {shape}')
        for name, valid in self._checks().items():
            if not valid:
                raise ValueError(f'{name} is out of range')

    def _checks(self) -> dict[str, bool]:
        """Check the values of each field that indices and inverses are made of."""
        ids, size = self.frame_ids, self.network_size
        sizes = np.stack([self.network_size, self.source_size])
        transforms = [self.map_from_window, *self.corrections.values()]
        return {
            'window_id': self.window_id >= 0,
            'map_id': self.map_id >= 0,
            'frame_ids': len(ids) > 0 and bool((np.diff(ids, prepend=-1) > 0).all()),
            'stamps_ns': bool((self.stamps_ns >= 0).all()),
            'window_from_camera': _are_rotations(self.window_from_camera[:, :3, :3]),
            'intrinsics': bool((self.intrinsics[:, [0, 1], [0, 1]] > 0).all()),
            'source_from_network': bool((self.source_from_network[:, [0, 1], [0, 1]] > 0).all()),
            'size of an image': bool(((sizes > 0) & (sizes <= _MAX_SIDE)).all()),
            'map_from_window or a correction': all(
                each.rotation.shape == (3, 3)
                and each.translation.shape == (3,)
                and _are_rotations(each.rotation[None])
                for each in transforms
            ),
            'map_scale': self.map_scale > 0,
            'seconds': set(self.seconds) == set(STEPS),
            'point_frame_ids': bool(np.isin(self.point_frame_ids, ids).all()),
            'point_pixels': bool(
                ((self.point_pixels >= 0) & (self.point_pixels < size.prod())).all()
            ),
            'track_ids': bool((self.track_ids >= 0).all()),
            'track_frame_ids': bool(np.isin(self.track_frame_ids, ids).all()),
            'depth_steps': bool((self.depth_steps >= 0).all()),
        }


def write_record(folder: Path, record: WindowRecord) -> None:
    """Write a record into the folder of a reconstruction, atomically."""
    write_state(folder, f'{WINDOWS}/{record.window_id:06d}{_SUFFIX}', to_state_dict(record))


def read_record(folder: Path, name: str) -> WindowRecord:
    """
    Read a record back.

    :param name: of the file, relative to the folder.
    :raises ValueError: if it is none.
    """
    state = read_state(folder, name)
    try:
        record = from_state_dict(WindowRecord, state)
        if f'{record.window_id:06d}' != Path(name).stem:
            raise ValueError(f'it is of window {record.window_id}')
    except ValueError as error:
        raise ValueError(f'{folder / name} is no window of a reconstruction: {error}') from error
    return record


def list_records(folder: Path) -> list[str]:
    """List the files of a reconstruction's records, in the order of windows."""
    return sorted(list_files(folder, WINDOWS, _SUFFIX), key=lambda name: (len(name), name))


def read_records(folder: Path) -> Iterator[WindowRecord]:
    """Read the records of a reconstruction one by one."""
    for name in list_records(folder):
        yield read_record(folder, name)


def make_record(
    update: MapUpdate, depth_steps: Array, tracks: Tracks | None = None
) -> WindowRecord:
    """
    Select what is kept of an update.

    :param depth_steps: (S,), of the depth images that were written of the new frames.
    :param tracks: through the frames of the window, in pixels of the network's image.
    """
    batch, geometry, metric = update.batch, update.reconstruction, update.metric
    starts_map = bool(update.map_start_reason)
    return WindowRecord(
        window_id=update.window_id,
        map_id=update.map_id,
        map_start_reason=update.map_start_reason,
        frame_ids=np.array(batch.ids, np.int64),
        is_new=np.array(update.is_new, np.bool_),
        stamps_ns=np.array([frame.stamp_ns for frame in batch.frames], np.int64),
        camera_frame=batch.frames[-1].camera_frame,
        window_from_camera=np.asarray(geometry.window_from_camera, np.float64),
        intrinsics=np.asarray(geometry.intrinsics, np.float64),
        source_from_network=np.stack([image.source_from_network for image in batch.images]).astype(
            np.float64
        ),
        network_size=np.array(geometry.image_size, np.int64),
        source_size=np.array(batch.frames[-1].image.shape[:2], np.int64),
        map_from_window=update.registration.map_from_window,
        corrections={} if update.loop_closure is None else update.loop_closure.corrections,
        map_scale=float(metric.factor),
        map_scale_valid=bool(metric.valid),
        scale_source=metric.source,
        confidence=np.nan_to_num(np.asarray(update.confidence, np.float64), nan=0.0),
        residual=0.0 if starts_map else float(update.registration.residual),
        inliers=1.0 if starts_map else float(update.registration.inliers),
        seconds={step: update.seconds[step] for step in STEPS},
        **_select_points(update),
        **_list_observations(tracks, batch.ids),
        depth_steps=np.asarray(depth_steps, np.float64),
    )


def _select_points(update: MapUpdate) -> dict[str, npt.NDArray[Any]]:
    """Gather the selected pixels of all new frames."""
    batch, geometry = update.batch, update.reconstruction
    selected = {i: update.select_pixels(i) for i, new in enumerate(update.is_new) if new}

    def gather(images: dict[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate(
            [np.empty(0, np.float32), *(images[i].ravel()[at] for i, at in selected.items())]
        )

    colours = [batch.images[i].pixels.reshape(-1, 3)[at] for i, at in selected.items()]
    return {
        'point_frame_ids': np.repeat(
            np.array([batch.ids[i] for i in selected], np.int64),
            [len(at) for at in selected.values()],
        ),
        'point_pixels': np.concatenate([np.empty(0, np.intp), *selected.values()]).astype(
            np.int32
        ),
        'point_depth': gather(geometry.depth),
        'point_confidence': gather(geometry.confidence),
        'point_rgb': np.concatenate([np.empty((0, 3), np.uint8), *colours]),
    }


def _list_observations(
    tracks: Tracks | None, frame_ids: tuple[int, ...]
) -> dict[str, npt.NDArray[Any]]:
    if tracks is None:
        nothing = np.empty((len(frame_ids), 0))
        tracks = Tracks(nothing[..., None].repeat(2, -1), nothing.astype(np.bool_), nothing)
    frame, track = np.nonzero(tracks.observed)
    return {
        'track_ids': track.astype(np.int64),
        'track_frame_ids': np.array(frame_ids, np.int64)[frame],
        'track_pixels': tracks.pixels[frame, track].astype(np.float64),
        'track_confidence': tracks.confidence[frame, track].astype(np.float64),
    }


def _are_rotations(matrices: Array) -> bool:
    """Check (N, 3, 3)."""
    products = matrices @ matrices.transpose(0, 2, 1)
    return bool((np.abs(products - np.eye(3)) < _RIGID).all())
