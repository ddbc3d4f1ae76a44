# SPDX-License-Identifier: Apache-2.0
"""
Points tracked through a window by the network's track head, with a forward-backward check.

The head tracks points of the first frame, so the window is reordered for each query frame. A track
is verified by tracking it back from the other query frames that see it; one that does not return
to its query is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.camera import transform_points
from vggt_ros.geometry.poses import Array
from vggt_ros.model.prediction import Prediction
from vggt_ros.offline.refinement import Tracks

_CELLS = 8  # per side of an image, over which queries are spread
_MIN_SPACING = 2  # pixels between two queries
_MIN_STRENGTH = 0.01  # of a corner, relative to the strongest of the image
_LOW_CONFIDENCE = 0.3  # share of the pixels of a frame without queries: the least confident

Grey = npt.NDArray[np.uint8]


class TrackPredictor(Protocol):
    """A network that tracks points, such as `VGGTNetwork`."""

    def predict(
        self,
        images: torch.Tensor,
        heads: tuple[str, ...],
        query_points: torch.Tensor | None = None,
    ) -> Prediction:
        """Track points (1, K, 2) of the first of images (1, S, 3, H, W)."""
        ...


@dataclass(frozen=True, slots=True)
class TrackingOptions:
    """How queries are chosen and tracks verified."""

    max_queries: int = 500  # in all
    query_frames: int = 3  # evenly spaced over the window
    min_confidence: float = 1.0  # of the depth at a query
    min_visibility: float = 0.5  # probability that the point is visible
    max_return_error: float = 2.0  # pixels, of the forward-backward check

    def __post_init__(self) -> None:
        if self.query_frames < 2:
            raise ValueError(
                f'query_frames is {self.query_frames}, expected 2 or more: tracks are verified '
                'from another query frame'
            )


@dataclass(frozen=True, slots=True)
class QueryTracks:
    """Tracks and the frame of each one's query."""

    tracks: Tracks
    query_frame: npt.NDArray[np.int64]  # (K,), index in the window


def track_window(
    network: TrackPredictor,
    images: torch.Tensor,
    confidence: Mapping[int, npt.NDArray[np.float32]],
    options: TrackingOptions | None = None,
) -> QueryTracks:
    """
    Track corners through a window and verify the tracks.

    The network runs twice for each query frame.

    :param images: (S, 3, H, W), RGB in [0, 1].
    :param confidence: (H, W) of the depth, by index in the window; the frames that can be query
        frames.
    :returns: the tracks that return to their query from each other query frame that sees them, and
        from one at least; perhaps none.
    """
    options = options or TrackingOptions()
    candidates = sorted(confidence)
    count = min(options.query_frames, len(candidates))
    chosen = [
        candidates[i] for i in np.linspace(0, len(candidates) - 1, count).round().astype(int)
    ]
    queries = {
        i: choose_corners(
            _to_grey(images[i]),
            confidence[i],
            options.max_queries // max(count, 1),
            options.min_confidence,
        )
        for i in chosen
    }
    parts = {
        i: _track(network, images, i, points, options.min_visibility)
        for i, points in queries.items()
        if len(points)
    }
    if not parts:
        shape = (len(images), 0)
        empty = Tracks(np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape))
        return QueryTracks(empty, np.zeros(0, np.int64))
    tracks = _concatenate(list(parts.values()))
    query_frame = np.concatenate([np.full(len(queries[i]), i) for i in parts])
    kept = _verify(network, images, chosen, tracks, query_frame, options)
    verified = Tracks(tracks.pixels[:, kept], tracks.observed[:, kept], tracks.confidence[:, kept])
    return QueryTracks(verified, query_frame[kept])


def choose_corners(
    image: Grey,
    confidence: npt.NDArray[np.float32],
    max_count: int,
    min_confidence: float = 1.0,
) -> Array:
    """
    Choose corners, evenly distributed over an image, where depth is confident.

    :param image: (H, W), grey.
    :param confidence: (H, W).
    :returns: (K, 2), x and y, whole pixels.
    """
    strength = cv2.cornerMinEigenVal(image, 3)
    neighbourhood = np.ones((2 * _MIN_SPACING + 1, 2 * _MIN_SPACING + 1), np.uint8)
    least = float(np.quantile(confidence, _LOW_CONFIDENCE))
    confident = confidence >= max(least, min_confidence)
    corners = (strength == cv2.dilate(strength, neighbourhood)) & confident
    corners &= strength > _MIN_STRENGTH * strength.max()
    rows, columns = np.nonzero(corners)
    strongest = np.argsort(-strength[rows, columns], kind='stable')
    rows, columns = rows[strongest], columns[strongest]
    height, width = image.shape
    cell = rows * _CELLS // height * _CELLS + columns * _CELLS // width
    # Rank among the corners of the cell: first the best of all cells, then the second best.
    by_cell = np.argsort(cell, kind='stable')
    starts = np.searchsorted(cell[by_cell], cell)
    rank = np.empty_like(by_cell)
    rank[by_cell] = np.arange(len(cell))
    chosen = np.argsort(rank - starts, kind='stable')[:max_count]
    return np.stack([columns, rows], -1)[chosen].astype(np.float64)


def unproject_queries(
    tracked: QueryTracks,
    depth: Mapping[int, npt.NDArray[np.float32]],
    world_from_camera: Array,
    intrinsics: Array,
) -> Array:
    """
    Unproject the queries with the depth there.

    :param depth: (H, W) by index in the window, along the optical axis.
    :param world_from_camera: (S, 4, 4).
    :param intrinsics: (S, 3, 3), pixels.
    :returns: (K, 3), in the world frame; NaN where the query frame has no depth.
    """
    points = np.full((len(tracked.query_frame), 3), np.nan)
    for i in set(tracked.query_frame.tolist()) & set(depth):
        own = np.flatnonzero(tracked.query_frame == i)
        pixels = tracked.tracks.pixels[i, own]
        columns, rows = pixels.round().astype(int).T
        matrix = intrinsics[i]
        rays = (pixels - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
        in_camera = np.concatenate([rays, np.ones((len(own), 1))], -1)
        in_camera *= depth[i][rows, columns, None]
        points[own] = transform_points(
            torch.from_numpy(world_from_camera[i]), torch.from_numpy(in_camera)
        ).numpy()
    return points


def _to_grey(image: torch.Tensor) -> Grey:
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().cpu().numpy()
    grey: Grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    return grey


def _track(
    network: TrackPredictor,
    images: torch.Tensor,
    query_frame: int,
    queries: Array,
    min_visibility: float,
) -> Tracks:
    """Track points (K, 2) of one frame to all others."""
    order = [query_frame, *(i for i in range(len(images)) if i != query_frame)]
    points = torch.from_numpy(queries).to(images.dtype).unsqueeze(0)
    prediction = network.predict(images[order].unsqueeze(0), ('tracks',), points)
    heads = prediction.tracks, prediction.visibility, prediction.track_confidence
    pixels, visibility, confidence = (
        part[0].double().cpu().numpy()[np.argsort(order)] for part in heads if part is not None
    )
    # the query itself is exact, whatever the head predicts
    pixels[query_frame], visibility[query_frame], confidence[query_frame] = queries, 1, 1
    height, width = images.shape[-2:]
    inside = ((pixels >= 0) & (pixels <= [width - 1, height - 1])).all(-1)
    return Tracks(pixels, inside & (visibility >= min_visibility), confidence)


def _concatenate(parts: list[Tracks]) -> Tracks:
    return Tracks(
        np.concatenate([part.pixels for part in parts], 1),
        np.concatenate([part.observed for part in parts], 1),
        np.concatenate([part.confidence for part in parts], 1),
    )


def _verify(
    network: TrackPredictor,
    images: torch.Tensor,
    query_frames: list[int],
    tracks: Tracks,
    query_frame: npt.NDArray[np.int64],
    options: TrackingOptions,
) -> npt.NDArray[np.bool_]:
    """Check which tracks (K,) return to their query from all query frames that see them."""
    checked = np.zeros(len(query_frame), np.bool_)
    failed = checked.copy()
    for i in query_frames:
        seen = np.flatnonzero(tracks.observed[i] & (query_frame != i))
        if not len(seen):
            continue
        back = _track(network, images, i, tracks.pixels[i, seen], options.min_visibility)
        returned = back.pixels[query_frame[seen], np.arange(len(seen))]
        queries = tracks.pixels[query_frame[seen], seen]
        error = np.linalg.norm(returned - queries, axis=-1)
        checked[seen] = True
        failed[seen] |= ~(error <= options.max_return_error)
    return checked & ~failed
