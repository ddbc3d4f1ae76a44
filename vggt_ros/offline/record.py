# SPDX-License-Identifier: Apache-2.0
"""
What a window adds to a reconstruction, as a file of its own.

Everything is kept as the window has it, in its own frame and unit, beside its place in the map:
so a loop that is closed later, or a scale that becomes known later, moves what is there without
touching it. Pixels are those of the network's image. A record is an `.npz` without pickles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.offline.atomic_write import atomic_writer
from vggt_ros.offline.refinement import Tracks

FOLDER = 'windows'
STEPS = ('preprocess', 'inference', 'reconstruct', 'register')


@dataclass(frozen=True, slots=True)
class Record:
    """One window of S frames, D of them new, with P chosen pixels."""

    window_id: int
    map_id: int
    map_start_reason: str
    ids: npt.NDArray[np.int64]  # (S,), frame numbers
    is_new: npt.NDArray[np.bool_]  # (S,)
    stamps_ns: npt.NDArray[np.int64]  # (S,)
    camera_frame: str
    window_from_camera: Array  # (S, 4, 4)
    intrinsics: Array  # (S, 3, 3), pixels of the network's image
    source_from_network: Array  # (S, 3, 3), pixels of the network's image to those of the source
    network_size: npt.NDArray[np.int64]  # H, W
    source_size: npt.NDArray[np.int64]  # H, W
    map_from_window: Array  # (13,): scale, rotation, translation, as when the window was joined
    # Windows that a loop, closed with this one, has moved: their numbers (M,), and how (M, 13).
    corrected: npt.NDArray[np.int64]
    corrections: Array
    factor: float  # metres in one map unit, as known then
    factor_valid: bool
    scale_source: str
    confidence: Array  # (S,), mean of each frame
    residual: float  # of the registration, share of the depth; 0 where a map starts
    inliers: float
    trusted: bool
    note: str
    seconds: Array  # (4,), of `STEPS`
    # Chosen pixels of the new frames, all in one:
    pixel_frame: npt.NDArray[np.int64]  # (P,), frame number
    pixel: npt.NDArray[np.int32]  # (P,), row * W + column
    depth: npt.NDArray[np.float32]  # (P,), along the optical axis, unit of the window
    pixel_confidence: npt.NDArray[np.float32]  # (P,)
    rgb: npt.NDArray[np.uint8]  # (P, 3)
    # Points that were followed through the window, if somebody asked, by their O observations:
    track: npt.NDArray[np.int64]  # (O,), which one
    track_frame: npt.NDArray[np.int64]  # (O,), frame number
    track_pixels: Array  # (O, 2)
    track_confidence: Array  # (O,)
    depth_steps: Array  # (S,), window units in one step of the frame's depth picture; 0: none

    @property
    def place_in_map(self) -> Sim3:
        """Say where the window was put: map from window."""
        return _unpack(self.map_from_window)

    @property
    def moved(self) -> dict[int, Sim3]:
        """Say which windows were moved then, and how."""
        return {int(n): _unpack(each) for n, each in zip(self.corrected, self.corrections)}

    def save(self, folder: Path) -> Path:
        """Write the file; it is there as a whole or not at all."""
        path = folder / FOLDER / f'{self.window_id:06d}.npz'
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        with atomic_writer(path) as file:
            np.savez(file, **values)
        return path


def load_record(path: Path) -> Record:
    """
    Read a file back.

    :raises ValueError: if it is no record.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            values = {each.name: stored[each.name] for each in fields(Record)}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f'{path} is no window of a reconstruction: {error}') from error
    return Record(**{name: v if v.ndim else v.item() for name, v in values.items()})


def record_files(folder: Path) -> list[Path]:
    """List the files of a reconstruction, in the order of windows."""
    return sorted((folder / FOLDER).glob('[0-9]*.npz'))


def load_records(folder: Path) -> Iterator[Record]:
    """Read the records of a reconstruction one by one."""
    for path in record_files(folder):
        yield load_record(path)


def make_record(update: MapUpdate, depth_steps: Array, tracks: Tracks | None = None) -> Record:
    """
    Keep what is worth keeping of an update.

    :param depth_steps: (S,), of the depth pictures that were written of the new frames.
    :param tracks: through the frames of the window, in pixels of the network's image.
    """
    batch, geometry = update.batch, update.reconstruction
    chosen = {i: update.select_pixels(i) for i, new in enumerate(update.is_new) if new}
    moved = {} if update.loop_closure is None else update.loop_closure.corrections

    def gather(images: dict[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.concatenate([images[i].ravel()[at] for i, at in chosen.items()] or [_NOTHING])

    colours = [batch.images[i].pixels.reshape(-1, 3)[at] for i, at in chosen.items()]
    return Record(
        window_id=update.window_id,
        map_id=update.map_id,
        map_start_reason=update.map_start_reason,
        ids=np.array(batch.ids),
        is_new=np.array(update.is_new),
        stamps_ns=np.array([frame.stamp_ns for frame in batch.frames]),
        camera_frame=batch.frames[-1].camera_frame,
        window_from_camera=geometry.window_from_camera,
        intrinsics=geometry.intrinsics,
        source_from_network=np.stack([image.source_from_network for image in batch.images]),
        network_size=np.array(geometry.image_size),
        source_size=np.array(batch.frames[-1].image.shape[:2]),
        map_from_window=_pack(update.registration.map_from_window),
        corrected=np.array(list(moved), np.int64),
        corrections=np.array([_pack(each) for each in moved.values()]).reshape(-1, 13),
        factor=update.metric.factor,
        factor_valid=update.metric.valid,
        scale_source=update.metric.source,
        confidence=update.confidence,
        residual=0.0 if update.map_start_reason else float(update.registration.residual),
        inliers=1.0 if update.map_start_reason else float(update.registration.inliers),
        trusted=bool(update.map_start_reason) or update.registration.accepted,
        note='' if update.map_start_reason else update.registration.rejection_reason,
        seconds=np.array([update.seconds[step] for step in STEPS]),
        pixel_frame=np.repeat(
            np.array([batch.ids[i] for i in chosen], np.int64), [len(at) for at in chosen.values()]
        ),
        pixel=np.concatenate([*chosen.values(), np.empty(0, np.intp)]).astype(np.int32),
        depth=gather(geometry.depth),
        pixel_confidence=gather(geometry.confidence),
        rgb=np.concatenate([*colours, np.empty((0, 3), np.uint8)]),
        **_flatten(tracks or _NO_TRACKS, batch.ids),
        depth_steps=depth_steps,
    )


_NOTHING = np.empty(0, np.float32)
_NO_TRACKS = Tracks(np.empty((0, 0, 2)), np.empty((0, 0), np.bool_), np.empty((0, 0)))


def _flatten(tracks: Tracks, ids: tuple[int, ...]) -> dict[str, npt.NDArray[Any]]:
    """Keep what was observed."""
    frame, track = np.nonzero(tracks.observed)
    return {
        'track': track,
        'track_frame': np.array(ids, np.int64)[frame],
        'track_pixels': tracks.pixels[frame, track],
        'track_confidence': tracks.confidence[frame, track],
    }


def _pack(place: Sim3) -> Array:
    return np.concatenate([[place.scale], place.rotation.ravel(), place.translation])


def _unpack(packed: Array) -> Sim3:
    return Sim3(float(packed[0]), packed[1:10].reshape(3, 3), packed[10:])
