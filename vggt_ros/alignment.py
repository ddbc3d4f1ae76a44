# SPDX-License-Identifier: Apache-2.0
"""A window finds its place in the map, by the frames that both contain.

Every window comes in a frame and a unit of its own. Shared frames are matched by their number,
never by position in the window. Scale is the median ratio of the depths of the same pixels;
rotation is averaged over the shared cameras' full rotations (camera centres alone leave the roll
about a straight path free); translation follows from both. A weak alignment is a result with
`trusted = False` and the reason, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import nearest_rotation
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.reconstruct import Reconstruction

_PIXELS_PER_FRAME = 4096  # enough for a median to 1 %, cheap at any resolution
_INLIER = 0.1  # relative difference of depth up to which a pixel counts as agreeing


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where a window lies in the map, and how well that is known."""

    map_from_window: Sim3  # the identity if there is nothing to align to
    shared: int  # frames that the window and the map have in common
    residual: float  # median relative difference of depth after alignment; NaN without overlap
    inliers: float  # share of compared pixels whose depth agrees to 10 %; NaN without overlap
    trusted: bool
    note: str  # why it is not trusted, '' if it is


@dataclass(frozen=True, slots=True)
class PlacedWindow:
    """A window that lies in the map: what the next one is aligned to."""

    ids: tuple[int, ...]  # S frame numbers
    reconstruction: Reconstruction
    map_from_window: Sim3


def align(
    ids: Sequence[int],
    reconstruction: Reconstruction,
    placed: PlacedWindow | None,
    max_residual: float,
) -> Alignment:
    """
    Align a window with the one placed last.

    :param ids: S frame numbers of the new window.
    :param placed: the window to align with; None if the map is empty.
    :param max_residual: the largest residual that is trusted.
    """
    shared = [] if placed is None else sorted(set(ids) & set(placed.ids))
    if placed is None or not shared:
        return Alignment(Sim3(), 0, np.nan, np.nan, False, 'no frame is shared with the map')
    here = [list(ids).index(number) for number in shared]
    there = [placed.ids.index(number) for number in shared]
    log_ratio = _log_depth_ratio(reconstruction, here, placed.reconstruction, there)
    log_scale = float(np.median(log_ratio))
    difference = np.abs(np.expm1(log_ratio - log_scale))
    residual = float(np.median(difference))
    map_from_camera = placed.map_from_window.place(placed.reconstruction.window_from_camera[there])
    map_from_window = _fit_cameras(
        map_from_camera,
        reconstruction.window_from_camera[here],
        placed.map_from_window.scale * np.exp(log_scale),
    )
    trusted = residual <= max_residual
    note = '' if trusted else f'depth of shared frames differs by {residual:.2g}'
    inliers = float(np.mean(difference <= _INLIER))
    return Alignment(map_from_window, len(shared), residual, inliers, trusted, note)


def _log_depth_ratio(
    new: Reconstruction, here: list[int], old: Reconstruction, there: list[int]
) -> npt.NDArray[np.float32]:
    """Compare the depth of the same pixels, old to new, where both are rather confident."""
    ratios = []
    for i, j in zip(here, there):
        step = max(new.depth[i].size // _PIXELS_PER_FRAME, 1)
        confidence = np.minimum(
            new.confidence[i].ravel()[::step], old.confidence[j].ravel()[::step]
        )
        chosen = confidence >= np.median(confidence)
        depth = new.depth[i].ravel()[::step][chosen]
        ratios.append(np.log(old.depth[j].ravel()[::step][chosen] / depth))
    return np.concatenate(ratios)


def _fit_cameras(
    map_from_camera: npt.NDArray[np.float64],
    window_from_camera: npt.NDArray[np.float64],
    scale: float,
) -> Sim3:
    """Fit rotation and translation to cameras known in both frames, (N, 4, 4) each."""
    turns = map_from_camera[:, :3, :3] @ window_from_camera[:, :3, :3].transpose(0, 2, 1)
    rotation = nearest_rotation(torch.from_numpy(turns.sum(0))).numpy()
    moved = scale * window_from_camera[:, :3, 3] @ rotation.T
    return Sim3(scale, rotation, (map_from_camera[:, :3, 3] - moved).mean(0))
