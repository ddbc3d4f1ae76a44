# SPDX-License-Identifier: Apache-2.0
"""
Points that are followed from window to window, each under one number.

The network follows points through one window, from a frame of that window. A track goes on
through the frames that two windows share: it is asked for again at its newest place there where
it was seen. Tracks that were seen in no shared frame are lost. As many new ones begin, at corners
(Shi-Tomasi) of the newest frame whose depth is known and believed, away from those that go on; in
a first window, where no depth is known, at any corner of the newest frame.

New points begin in images of the first camera; like all others they are looked for in the images
of every camera of the window. A new map begins with new tracks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import Batch, PreprocessedImage, Queries
from vggt_ros.frames.rectifier import distort
from vggt_ros.geometry.poses import Array
from vggt_ros.model.prediction import Prediction

_SEEN = 0.5  # visibility and confidence, both probabilities, that a track needs to go on
_SPACING = 0.5  # of the distance that points have which cover the image evenly
_WEAKEST_CORNER = 0.01  # of the strongest one's strength
_CORNER_RADIUS = 3  # pixels around a corner that tell its strength

Confidence = Mapping[int, npt.NDArray[np.float32]]  # (H, W) by place in the window
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PointTracks:
    """K points in the S frames of a window."""

    ids: npt.NDArray[np.int64]  # (K,) the same number in each window that has the track
    # (S, K, 2) as (x, y), pixels of the original images, distorted as they came; outside of the
    # image a guess
    pixels: npt.NDArray[np.float32]
    visibility: npt.NDArray[np.float32]  # (S, K) probability; 0 outside of what the network saw
    confidence: npt.NDArray[np.float32]  # (S, K) probability that the pixel is right
    trained: bool  # False: the head has random weights, the tracks mean nothing


@dataclass(frozen=True, slots=True)
class _Followed:
    """What is kept of the last window."""

    numbers: tuple[int, ...]  # S frames
    ids: npt.NDArray[np.int64]  # (K,)
    places: Array  # (S, K, 2), pixels of the sources, without distortion
    seen: Mask  # (S, K)
    believed: dict[int, Mask]  # of the newest frame with depth, by its number: (H, W)


class PointTracker:
    """The tracks that go on, and the numbers that are taken."""

    def __init__(self, points: int, min_confidence: float, trained: bool) -> None:
        """
        Begin without tracks.

        :param points: how many are followed at a time.
        :param min_confidence: of the depth where new ones begin.
        :param trained: whether the network's head for tracks was.
        """
        self._points = points
        self._min_confidence = min_confidence
        self._trained = trained
        self._next_id = 0
        nothing = np.zeros((0, 0), np.bool_)
        self._last = _Followed((), np.zeros(0, np.int64), np.zeros((0, 0, 2)), nothing, {})

    def ask(self, batch: Batch) -> Queries | None:
        """Choose what to follow through this window; None: there is nothing."""
        going_on = self._go_on(batch)
        beginning = self._begin(batch, going_on)
        queries = Queries(
            *(
                np.concatenate([getattr(part, name) for part in (going_on, beginning)])
                for name in ('points', 'frames', 'ids')
            )
        )
        return queries if len(queries.ids) else None

    def take(
        self, batch: Batch, prediction: Prediction, confidence: Confidence, starts_map: bool
    ) -> PointTracks | None:
        """
        Take what the network says of `batch.queries`.

        :param confidence: of the depth of some frames.
        :param starts_map: the window continues no map: all tracks are new ones.
        :returns: None if the network was asked nothing or has not answered.
        """
        queries, tracks = batch.queries, prediction.tracks
        if queries is None or tracks is None:
            return None
        assert prediction.visibility is not None and prediction.track_confidence is not None
        count = len(queries.ids)
        ids = np.arange(self._next_id, self._next_id + count) if starts_map else queries.ids
        points = tracks[0].double().numpy()
        images = list(zip(batch.fitted, batch.frames, points, strict=True))
        shown = np.stack([_is_shown(image, frame, at) for image, frame, at in images])
        visibility = np.where(shown, prediction.visibility[0].numpy(), np.float32(0))
        sureness = prediction.track_confidence[0].numpy()
        places = np.stack([image.to_source(at) for image, _, at in images])
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        self._last = _Followed(
            numbers=batch.ids,
            ids=ids,
            places=places,
            seen=(visibility >= _SEEN) & (sureness >= _SEEN),
            believed=self._believe(batch, confidence),
        )
        original = [
            _to_original(image, frame, at)
            for (image, frame, _), at in zip(images, places, strict=True)
        ]
        pixels = np.stack(original).astype(np.float32)
        return PointTracks(ids, pixels, visibility, sureness, self._trained)

    def _believe(self, batch: Batch, confidence: Confidence) -> dict[int, Mask]:
        """Say where depth is believed in the newest frame that has some, of the first camera."""
        known = [i for i in _of_first_camera(batch) if i in confidence]
        return {batch.ids[i]: confidence[i] >= self._min_confidence for i in known[-1:]}

    def _go_on(self, batch: Batch) -> Queries:
        """Ask for the tracks that were seen in a frame of this window, in the newest such."""
        last = self._last
        shared = [i for i, number in enumerate(batch.ids) if number in last.numbers]
        if not shared:
            return Queries(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), last.ids[:0])
        before = np.array([last.numbers.index(batch.ids[i]) for i in shared])
        seen = last.seen[before]  # (shared frames, K)
        alive = np.flatnonzero(seen.any(0))
        newest = len(shared) - 1 - seen[::-1, alive].argmax(0)
        frames = np.array(shared)[newest]
        places = last.places[before[newest], alive]
        points = np.zeros((len(alive), 2), np.float32)
        for i in shared:
            points[frames == i] = batch.fitted[i].from_source(places[frames == i])
        return Queries(points, frames, last.ids[alive])

    def _begin(self, batch: Batch, going_on: Queries) -> Queries:
        """Ask for new points where there is room for some."""
        last = self._last
        places = _of_first_camera(batch)
        at = ([i for i in places if batch.ids[i] in last.numbers] or places)[-1]
        image = batch.fitted[at]
        shown = _shown(image, batch.frames[at]).astype(np.uint8)
        # the edge of what is shown is no corner of the scene
        around = np.ones((2 * _CORNER_RADIUS + 1,) * 2, np.uint8)
        free = np.asarray(cv2.erode(shown, around), np.uint8)
        believed = last.believed.get(batch.ids[at])
        # bars around images of several sizes change with the window; then any depth will do
        if believed is not None and believed.shape == free.shape:
            free[~believed] = 0
        spacing = _SPACING * math.sqrt(free.size / self._points)
        if batch.ids[at] in last.numbers:
            before = last.numbers.index(batch.ids[at])
            covered = last.places[before, last.seen[before] & np.isin(last.ids, going_on.ids)]
            for x, y in image.from_source(covered).round().astype(int).tolist():
                cv2.circle(free, (x, y), math.ceil(spacing), 0, cv2.FILLED)
        points = _find_corners(image, free, self._points - len(going_on.ids), spacing)
        ids = np.arange(self._next_id, self._next_id + len(points))
        return Queries(points, np.full(len(points), at), ids)


def _of_first_camera(batch: Batch) -> list[int]:
    """List the places of the first camera's frames; of all, if it has none."""
    places = [i for i, frame in enumerate(batch.frames) if frame.camera == 0]
    return places or list(range(len(batch.frames)))


def _find_corners(
    image: PreprocessedImage, free: npt.NDArray[np.uint8], count: int, spacing: float
) -> npt.NDArray[np.float32]:
    """Find at most so many corners (n, 2) of an image, where `free` (H, W) is not zero."""
    if count < 1:
        return np.zeros((0, 2), np.float32)
    grey = cv2.cvtColor(image.pixels, cv2.COLOR_RGB2GRAY)
    corners = cv2.goodFeaturesToTrack(grey, count, _WEAKEST_CORNER, spacing, mask=free)
    found: npt.NDArray[np.float32] = np.zeros((0, 2), np.float32)
    if corners is not None:
        found = np.asarray(corners, np.float32).reshape(-1, 2)
    return found


def _shown(image: PreprocessedImage, frame: Frame) -> Mask:
    """Say which pixels (H, W) of the network's image show something of the camera's image."""
    back, (height, width) = image.source_from_network, image.pixels.shape[:2]
    rows, columns = frame.image.shape[:2]
    x = back[0, 0] * np.arange(width) + back[0, 2]
    y = back[1, 1] * np.arange(height) + back[1, 2]
    inside_x, inside_y = (
        (place >= -0.5) & (place <= side - 0.5) for place, side in ((x, columns), (y, rows))
    )
    shown: Mask = inside_y[:, None] & inside_x
    return shown if image.seen is None else shown & image.seen


def _is_shown(image: PreprocessedImage, frame: Frame, points: Array) -> Mask:
    """Say which points (K, 2) of the network's image lie in it and show something."""
    height, width = image.pixels.shape[:2]
    inside = np.all((points >= -0.5) & (points <= (width - 0.5, height - 0.5)), axis=-1)
    nearest = np.where(inside[:, None], points, 0).round().astype(np.intp)
    columns, rows = nearest[:, 0].clip(0, width - 1), nearest[:, 1].clip(0, height - 1)
    shown: Mask = np.logical_and(inside, _shown(image, frame)[rows, columns])
    return shown


def _to_original(image: PreprocessedImage, frame: Frame, places: Array) -> Array:
    """Turn pixels (K, 2) of the source without distortion into those of the camera's image."""
    if image.place is None:
        return places
    assert frame.calibration is not None and image.calibrated is not None
    return distort(places, image.calibrated, frame.calibration)
