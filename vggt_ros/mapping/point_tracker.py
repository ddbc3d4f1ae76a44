# SPDX-License-Identifier: Apache-2.0
"""
Point tracks across windows, each under an id that stays.

The network tracks points through one window, from a query in one of its frames. A track continues
over the frames that two windows share: it is queried again at its position in the newest shared
frame where it was visible. Tracks that were visible in no shared frame are lost. New tracks start
at corners (Shi-Tomasi) of the newest frame with confident depth, away from the other tracks; in a
first window, where no depth is known, at any corner of the newest frame.

Tracks start in images of the first camera; like all others they are predicted in the images of
every camera of the window. A new map starts with new tracks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.batch import Batch, Mask, PreprocessedImage, Queries
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.rectifier import distort
from vggt_ros.geometry.poses import Array
from vggt_ros.model.prediction import Prediction

_MIN_PROBABILITY = 0.5  # visibility and confidence that a track needs to continue
_SPACING = 0.5  # of the distance between points that cover the image evenly
_CORNER_QUALITY = 0.01  # of the strongest corner
_CORNER_RADIUS = 3  # pixels around a corner that its strength is computed from

Confidence = Mapping[int, npt.NDArray[np.float32]]  # (H, W) by index in the window


@dataclass(frozen=True, slots=True)
class PointTracks:
    """K points in the S frames of a window."""

    ids: npt.NDArray[np.int64]  # (K,) the same in each window that has the track
    # (S, K, 2) as (x, y), pixels of the original images, with distortion; extrapolated outside
    pixels: npt.NDArray[np.float32]
    visibility: npt.NDArray[np.float32]  # (S, K) probability; 0 outside of the network's image
    confidence: npt.NDArray[np.float32]  # (S, K) probability that the pixel is right
    trained: bool  # False: the track head has random weights, the tracks are meaningless


def _no_ids() -> npt.NDArray[np.int64]:
    return np.zeros(0, np.int64)


def _no_positions() -> Array:
    return np.zeros((0, 0, 2))


def _none_visible() -> Mask:
    return np.zeros((0, 0), np.bool_)


@dataclass(frozen=True, slots=True)
class TrackedPoints:
    """The tracks of the last window: K points in S frames."""

    next_id: int = 0  # of a new track
    frame_ids: tuple[int, ...] = ()  # S
    ids: npt.NDArray[np.int64] = field(default_factory=_no_ids)  # (K,)
    positions: Array = field(default_factory=_no_positions)  # (S, K, 2), undistorted source pixels
    visible: Mask = field(default_factory=_none_visible)  # (S, K)
    # Where depth is confident in the newest frame with depth, by its id: (H, W).
    confident: dict[int, Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames, count = len(self.frame_ids), len(self.ids)
        shapes = self.positions.shape, self.visible.shape
        if shapes != ((frames, count, 2), (frames, count)):
            raise ValueError(
                f'tracks of shapes {shapes}, expected {(frames, count, 2)} and {(frames, count)}'
            )


def select_queries(last: TrackedPoints, batch: Batch, count: int) -> Queries | None:
    """
    Choose the points to track through a window.

    :param count: points that are tracked at a time.
    :returns: None if there are none.
    """
    continued = _continue_tracks(last, batch)
    started = _start_tracks(last, batch, continued, count)
    queries = Queries(
        points=np.concatenate([continued.points, started.points]),
        frames=np.concatenate([continued.frames, started.frames]),
        ids=np.concatenate([continued.ids, started.ids]),
    )
    return queries if len(queries.ids) else None


def update_tracks(
    last: TrackedPoints,
    batch: Batch,
    prediction: Prediction,
    depth_confidence: Confidence,
    min_confidence: float,
    trained: bool,
    new_map: bool,
) -> tuple[TrackedPoints, PointTracks | None]:
    """
    Read the predicted tracks of `batch.queries`.

    :param depth_confidence: of the frames with depth.
    :param min_confidence: of the depth where new tracks start.
    :param trained: whether the network's track head was.
    :param new_map: the window starts a map: all tracks get new ids.
    :returns: the tracks to continue, and those of this window: None if nothing was queried or the
        network has not answered.
    """
    queries, tracks = batch.queries, prediction.tracks
    if queries is None or tracks is None:
        return last, None
    assert prediction.visibility is not None and prediction.track_confidence is not None
    count = len(queries.ids)
    ids = np.arange(last.next_id, last.next_id + count) if new_map else queries.ids
    points = tracks[0].double().numpy()
    images = list(zip(batch.images, batch.frames, points, strict=True))
    inside = np.stack([_lie_inside(image, frame, at) for image, frame, at in images])
    visibility = np.where(inside, prediction.visibility[0].numpy(), np.float32(0))
    confidence = prediction.track_confidence[0].numpy()
    positions = np.stack([image.to_source(at) for image, _, at in images])
    with_depth = [i for i in _of_first_camera(batch) if i in depth_confidence]
    newest = TrackedPoints(
        next_id=max(last.next_id, int(ids.max()) + 1),
        frame_ids=batch.ids,
        ids=ids,
        positions=positions,
        visible=(visibility >= _MIN_PROBABILITY) & (confidence >= _MIN_PROBABILITY),
        confident={batch.ids[i]: depth_confidence[i] >= min_confidence for i in with_depth[-1:]},
    )
    original = [
        _to_original(image, frame, at)
        for (image, frame, _), at in zip(images, positions, strict=True)
    ]
    pixels = np.stack(original).astype(np.float32)
    return newest, PointTracks(ids, pixels, visibility, confidence, trained)


def _continue_tracks(last: TrackedPoints, batch: Batch) -> Queries:
    """Query the tracks that were visible in a frame of this window, in the newest such frame."""
    shared = [i for i, frame_id in enumerate(batch.ids) if frame_id in last.frame_ids]
    if not shared:
        return Queries(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), last.ids[:0])
    before = np.array([last.frame_ids.index(batch.ids[i]) for i in shared])
    visible = last.visible[before]  # (shared frames, K)
    alive = np.flatnonzero(visible.any(0))
    newest = len(shared) - 1 - visible[::-1, alive].argmax(0)
    frames = np.array(shared)[newest]
    positions = last.positions[before[newest], alive]
    points = np.zeros((len(alive), 2), np.float32)
    for i in shared:
        points[frames == i] = batch.images[i].from_source(positions[frames == i])
    return Queries(points, frames, last.ids[alive])


def _start_tracks(last: TrackedPoints, batch: Batch, continued: Queries, count: int) -> Queries:
    """Query new points at corners away from the continued tracks, up to `count` in all."""
    indices = _of_first_camera(batch)
    at = ([i for i in indices if batch.ids[i] in last.frame_ids] or indices)[-1]
    image, frame_id = batch.images[at], batch.ids[at]
    inside = _inside_source(image, batch.frames[at]).astype(np.uint8)
    # the border of the image content is no corner of the scene
    kernel = np.ones((2 * _CORNER_RADIUS + 1,) * 2, np.uint8)
    free = np.asarray(cv2.erode(inside, kernel), np.uint8)
    confident = last.confident.get(frame_id)
    # bars around images of several sizes change with the window; then any depth will do
    if confident is not None and confident.shape == free.shape:
        free[~confident] = 0
    spacing = _SPACING * math.sqrt(free.size / count)
    if frame_id in last.frame_ids:
        before = last.frame_ids.index(frame_id)
        covered = last.positions[before, last.visible[before] & np.isin(last.ids, continued.ids)]
        for x, y in image.from_source(covered).round().astype(int).tolist():
            cv2.circle(free, (x, y), math.ceil(spacing), 0, cv2.FILLED)
    points = _find_corners(image, free, count - len(continued.ids), spacing)
    ids = np.arange(last.next_id, last.next_id + len(points))
    return Queries(points, np.full(len(points), at), ids)


def _of_first_camera(batch: Batch) -> list[int]:
    """Return the indices of the first camera's frames; of all, if it has none."""
    indices = [i for i, frame in enumerate(batch.frames) if frame.camera == 0]
    return indices or list(range(len(batch.frames)))


def _find_corners(
    image: PreprocessedImage, free: npt.NDArray[np.uint8], count: int, spacing: float
) -> npt.NDArray[np.float32]:
    """Detect at most `count` corners (n, 2) of an image, where `free` (H, W) is not zero."""
    if count < 1:
        return np.zeros((0, 2), np.float32)
    grey = cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY)
    corners = cv2.goodFeaturesToTrack(grey, count, _CORNER_QUALITY, spacing, mask=free)
    found = [] if corners is None else corners  # its stubs do not know None
    return np.asarray(found, np.float32).reshape(-1, 2)


def _inside_source(image: PreprocessedImage, frame: Frame) -> Mask:
    """Compute which pixels (H, W) of the network's image show the camera's image."""
    back, (height, width) = image.source_from_network, image.pixels.shape[:2]
    rows, columns = frame.image.shape[:2]
    x = back[0, 0] * np.arange(width) + back[0, 2]
    y = back[1, 1] * np.arange(height) + back[1, 2]
    inside_x, inside_y = (
        (position >= -0.5) & (position <= side - 0.5)
        for position, side in ((x, columns), (y, rows))
    )
    inside: Mask = inside_y[:, None] & inside_x
    return inside if image.seen is None else inside & image.seen


def _lie_inside(image: PreprocessedImage, frame: Frame, points: Array) -> Mask:
    """Compute which points (K, 2) of the network's image lie in the camera's image."""
    height, width = image.pixels.shape[:2]
    inside = np.all((points >= -0.5) & (points <= (width - 0.5, height - 0.5)), axis=-1)
    nearest = np.where(inside[:, None], points, 0).round().astype(np.intp)
    columns, rows = nearest[:, 0].clip(0, width - 1), nearest[:, 1].clip(0, height - 1)
    both: Mask = np.logical_and(inside, _inside_source(image, frame)[rows, columns])
    return both


def _to_original(image: PreprocessedImage, frame: Frame, positions: Array) -> Array:
    """Distort pixels (K, 2) of the rectified source into those of the camera's image."""
    if image.pixel_map is None:
        return positions
    assert frame.calibration is not None and image.source_intrinsics is not None
    return distort(positions, image.source_intrinsics, frame.calibration)
