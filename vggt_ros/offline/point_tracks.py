# SPDX-License-Identifier: Apache-2.0
"""
Points followed through a window by the network's track head, and the window refined with them.

The head follows points of the first frame. So for each frame that points are taken from the
window is reordered, that frame first. Where a track comes by another such frame it is followed
from there as well: one that does not lead back to where it began is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.frames.batch import Batch
from vggt_ros.geometry.camera import transform_points
from vggt_ros.geometry.poses import Array
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.model.prediction import Prediction
from vggt_ros.offline.bundle_adjustment import refine
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks

_CELLS = 8  # in each direction: queries are spread over so many parts of an image
_SPACING = 2  # pixels between two queries, at least
_TEXTURE = 0.01  # of the strongest corner of the image
_LEAST_CONFIDENT = 0.3  # share of the pixels of a frame that no query is put on

Grey = npt.NDArray[np.uint8]


class TrackPredictor(Protocol):
    """What follows points; `VGGTNetwork` does."""

    def predict(
        self,
        images: torch.Tensor,
        heads: tuple[str, ...],
        query_points: torch.Tensor | None = None,
    ) -> Prediction:
        """Follow points (1, K, 2) of the first of images (1, S, 3, H, W)."""
        ...


@dataclass(frozen=True, slots=True)
class TrackingOptions:
    """How points are chosen and which tracks are kept."""

    queries: int = 500  # in all, at most
    query_frames: int = 3  # that they are spread over, evenly over the window
    min_confidence: float = 1.0  # of the depth under a query
    min_visibility: float = 0.5  # probability that the point is seen
    largest_return: float = 2.0  # pixels from the query to where the way back ends

    def __post_init__(self) -> None:
        if self.query_frames < 2:
            raise ValueError(
                f'query_frames is {self.query_frames}, expected 2 or more: tracks are followed '
                'back from another frame'
            )


@dataclass(frozen=True, slots=True)
class Followed:
    """Tracks and where each of them begins."""

    tracks: Tracks
    first: npt.NDArray[np.int64]  # (K,), place of the frame in which it is a query


def find_tracks(
    network: TrackPredictor,
    images: torch.Tensor,
    confidence: Mapping[int, npt.NDArray[np.float32]],
    settings: TrackingOptions | None = None,
) -> Followed:
    """
    Follow confident, textured points through a window, in both directions.

    It takes two runs of the network for each query frame.

    :param images: (S, 3, H, W), RGB in [0, 1].
    :param confidence: (H, W) of the depth, by place in the window; only frames that have one are
        query frames.
    :returns: the tracks that came back from every other query frame that sees them, and from one
        at least; perhaps none.
    """
    settings = settings or TrackingOptions()
    places = sorted(confidence)
    count = min(settings.query_frames, len(places))
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, count).round().astype(int)]
    queries = {
        place: choose_queries(
            _grey(images[place]),
            confidence[place],
            settings.queries // max(count, 1),
            settings.min_confidence,
        )
        for place in chosen
    }
    found = {
        place: _follow(network, images, place, points, settings.min_visibility)
        for place, points in queries.items()
        if len(points)
    }
    if not found:
        shape = (len(images), 0)
        empty = Tracks(np.zeros((*shape, 2)), np.zeros(shape, np.bool_), np.zeros(shape))
        return Followed(empty, np.zeros(0, np.int64))
    tracks = _side_by_side(list(found.values()))
    first = np.concatenate([np.full(len(queries[place]), place) for place in found])
    back = _came_back(network, images, chosen, tracks, first, settings)
    kept = Tracks(tracks.pixels[:, back], tracks.observed[:, back], tracks.confidence[:, back])
    return Followed(kept, first[back])


def refine_window(
    network: TrackPredictor,
    batch: Batch,
    reconstruction: Reconstruction,
    settings: TrackingOptions | None = None,
    criteria: Criteria | None = None,
) -> Refinement:
    """
    Refine the cameras of one window by the tracks that a network finds in its images.

    :returns: cameras in the window's frame and unit, in the order of the batch.
    :raises ValueError: if pycolmap is not installed.
    """
    # Where the lens saw nothing, nothing can be followed.
    confidence = {
        place: values if (seen := batch.images[place].seen) is None else np.where(seen, values, 0)
        for place, values in reconstruction.confidence.items()
    }
    followed = find_tracks(network, batch.stack(), confidence, settings)
    cameras = reconstruction.window_from_camera, reconstruction.intrinsics
    points = lift(followed, reconstruction.depth, *cameras)
    index = np.array([frame.camera for frame in batch.frames])
    return refine(*cameras, index, followed.tracks, points, criteria)


def choose_queries(
    image: Grey,
    confidence: npt.NDArray[np.float32],
    count: int,
    min_confidence: float = 1.0,
) -> Array:
    """
    Choose corners, evenly over an image, where depth is confident.

    :param image: (H, W), grey.
    :param confidence: (H, W).
    :param count: at most.
    :returns: (K, 2), x and y, whole pixels.
    """
    strength = cv2.cornerMinEigenVal(image, 3)
    around = np.ones((2 * _SPACING + 1, 2 * _SPACING + 1), np.uint8)
    least = float(np.quantile(confidence, _LEAST_CONFIDENT))
    confident = confidence >= max(least, min_confidence)
    corners = (strength == cv2.dilate(strength, around)) & confident
    corners &= strength > _TEXTURE * strength.max()
    rows, columns = np.nonzero(corners)
    strongest = np.argsort(-strength[rows, columns], kind='stable')
    rows, columns = rows[strongest], columns[strongest]
    height, width = image.shape
    cell = rows * _CELLS // height * _CELLS + columns * _CELLS // width
    # Its rank among the corners of its cell: first the best of all cells, then the second best.
    by_cell = np.argsort(cell, kind='stable')
    starts = np.searchsorted(cell[by_cell], cell)
    rank = np.empty_like(by_cell)
    rank[by_cell] = np.arange(len(cell))
    chosen = np.argsort(rank - starts, kind='stable')[:count]
    return np.stack([columns, rows], -1)[chosen].astype(np.float64)


def lift(
    followed: Followed,
    depth: Mapping[int, npt.NDArray[np.float32]],
    world_from_camera: Array,
    intrinsics: Array,
) -> Array:
    """
    Place tracks by the depth under their query.

    :param depth: (H, W) by place in the window, along the optical axis.
    :param world_from_camera: (S, 4, 4).
    :param intrinsics: (S, 3, 3), pixels.
    :returns: (K, 3), in the world's frame; NaN where the frame of the query has no depth.
    """
    points = np.full((len(followed.first), 3), np.nan)
    for place in set(followed.first.tolist()) & set(depth):
        own = np.flatnonzero(followed.first == place)
        pixels = followed.tracks.pixels[place, own]
        columns, rows = pixels.round().astype(int).T
        matrix = intrinsics[place]
        rays = (pixels - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
        in_camera = np.concatenate([rays, np.ones((len(own), 1))], -1)
        in_camera *= depth[place][rows, columns, None]
        points[own] = transform_points(
            torch.from_numpy(world_from_camera[place]), torch.from_numpy(in_camera)
        ).numpy()
    return points


def _grey(image: torch.Tensor) -> Grey:
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().cpu().numpy()
    grey: Grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
    return grey


def _follow(
    network: TrackPredictor,
    images: torch.Tensor,
    place: int,
    queries: Array,
    min_visibility: float,
) -> Tracks:
    """Follow points (K, 2) of one frame to all others."""
    order = [place, *(i for i in range(len(images)) if i != place)]
    points = torch.from_numpy(queries).to(images.dtype).unsqueeze(0)
    prediction = network.predict(images[order].unsqueeze(0), ('tracks',), points)
    heads = prediction.tracks, prediction.visibility, prediction.track_confidence
    pixels, visibility, confidence = (
        part[0].double().cpu().numpy()[np.argsort(order)] for part in heads if part is not None
    )
    # The query is seen where it is by definition, whatever the head says of it.
    pixels[place], visibility[place], confidence[place] = queries, 1, 1
    height, width = images.shape[-2:]
    inside = ((pixels >= 0) & (pixels <= [width - 1, height - 1])).all(-1)
    return Tracks(pixels, inside & (visibility >= min_visibility), confidence)


def _side_by_side(parts: list[Tracks]) -> Tracks:
    return Tracks(
        np.concatenate([part.pixels for part in parts], 1),
        np.concatenate([part.observed for part in parts], 1),
        np.concatenate([part.confidence for part in parts], 1),
    )


def _came_back(
    network: TrackPredictor,
    images: torch.Tensor,
    query_frames: list[int],
    tracks: Tracks,
    first: npt.NDArray[np.int64],
    settings: TrackingOptions,
) -> npt.NDArray[np.bool_]:
    """Say which tracks (K,) lead back to their query from all query frames that see them."""
    checked = np.zeros(len(first), np.bool_)
    failed = checked.copy()
    for place in query_frames:
        seen = np.flatnonzero(tracks.observed[place] & (first != place))
        if not len(seen):
            continue
        back = _follow(network, images, place, tracks.pixels[place, seen], settings.min_visibility)
        ends = back.pixels[first[seen], np.arange(len(seen))]
        begins = tracks.pixels[first[seen], seen]
        missed = np.linalg.norm(ends - begins, axis=-1)
        checked[seen] = True
        failed[seen] |= ~(missed <= settings.largest_return)
    return checked & ~failed
