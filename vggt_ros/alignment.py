# SPDX-License-Identifier: Apache-2.0
"""A window finds its place in the map, by the frames that both contain.

Every window comes in a frame and a unit of its own. Shared frames are matched by their number,
never by position in the window. What is known of a shared frame is its camera and its depth, in
both windows:

- Scale is the median ratio of the depths of the same pixels. It needs no motion. A least-squares
  similarity of the points would shrink with their noise: by 6 % over 125 joints at 1 % of noise.
- Rotation is averaged over the shared cameras' full rotations. Camera centres alone leave the
  roll about a straight path free.
- Translation is averaged over the shared cameras once scale and rotation are known.

The averages are weighted, by iteratively reweighted least squares (Huber): a camera counts less
where its points miss those of the map by more than the points of the other shared cameras do. All
points of a frame miss by its camera's error together, so the weight is one for the frame.

A weak alignment is a result with `trusted = False` and the reason, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.camera import unproject
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation, rotation_angle
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.reconstruct import Reconstruction

_PIXELS_PER_FRAME = 4096  # enough for a median to 1 %, cheap at any resolution
_INLIER = 0.1  # relative distance up to which a point counts as agreeing
_ROUNDS = 5  # of reweighting; the weights change by less than 1 % after four
_HUBER = 1.345  # times the median miss: 95 % as efficient as the mean where all are alike
_ALIKE = 1e-9  # relative miss that is rounding and tells no camera from another
# Without motion and with depth that contradicts itself, a new scale would be a guess.
_NO_PARALLAX = 0.005  # extent of the shared cameras over their median depth
_UNSURE_DEPTH = 0.1  # median relative difference of depth


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where a window lies in the map, and how well that is known."""

    map_from_window: Sim3  # the identity if there is nothing to align to
    shared: int  # frames that the window and the map have in common
    residual: float  # median distance of the same points, over their depth; NaN without overlap
    inliers: float  # share of compared points that are within 10 %; NaN without overlap
    # Median relative difference of the depth of the same pixels once scaled: how well the
    # windows agree about what they see, whatever their cameras; NaN without overlap.
    depth_residual: float
    # Extent of the shared cameras over their median depth: near 0, the camera stood or turned on
    # the spot, and only depth tells the scale; NaN without overlap.
    parallax: float
    # How the shared cameras scatter about the joint, by which `uncertainty` judges it: variances
    # along each axis, in map units and rad, about the middle (3,) of the shared cameras in the
    # map. NaN with fewer than two of them.
    shift_variance: float
    turn_variance: float
    middle: Array
    scale_held: bool  # neither depth nor motion told the scale: it is that of the window before
    trusted: bool
    note: str  # why it is not trusted, '' if it is


@dataclass(frozen=True, slots=True)
class PlacedWindow:
    """A window that lies in the map: what the next one is aligned to."""

    ids: tuple[int, ...]  # S frame numbers
    reconstruction: Reconstruction
    map_from_window: Sim3


@dataclass(frozen=True, slots=True)
class _SharedFrame:
    """A frame as two windows have it, each in its own frame and unit."""

    old_camera: Array  # (4, 4), window-from-camera
    new_camera: Array
    old_points: Array  # (P, 3), the pixels that both are rather confident of, in the window
    old_depth: Array  # (P,)
    new_points: Array
    new_depth: Array


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
        return _nothing_shared()
    frames = [
        _share(
            placed.reconstruction,
            placed.ids.index(number),
            reconstruction,
            list(ids).index(number),
        )
        for number in shared
    ]
    log_ratio = np.concatenate([np.log(f.old_depth / f.new_depth) for f in frames])
    log_scale = float(np.median(log_ratio))
    depth_residual = float(np.median(np.abs(np.expm1(log_ratio - log_scale))))
    parallax = _parallax(frames)
    held = depth_residual > _UNSURE_DEPTH and parallax < _NO_PARALLAX
    old_from_new = _fit_cameras(frames, 1.0 if held else float(np.exp(log_scale)))
    distance = np.concatenate([_distances(frame, old_from_new) for frame in frames])
    residual = float(np.median(distance))
    trusted = residual <= max_residual
    note = (
        '' if trusted else f'points of the shared frames differ by {residual:.2g} of their depth'
    )
    shift_variance, turn_variance = _scatter(frames, old_from_new)
    centres = np.stack([frame.old_camera[:3, 3] for frame in frames])
    return Alignment(
        map_from_window=placed.map_from_window @ old_from_new,
        shared=len(shared),
        residual=residual,
        inliers=float(np.mean(distance <= _INLIER)),
        depth_residual=depth_residual,
        parallax=parallax,
        shift_variance=shift_variance * placed.map_from_window.scale**2,
        turn_variance=turn_variance,
        middle=placed.map_from_window.apply(centres.mean(0)),
        scale_held=held,
        trusted=trusted,
        note=note,
    )


def _nothing_shared() -> Alignment:
    return Alignment(
        map_from_window=Sim3(),
        shared=0,
        residual=np.nan,
        inliers=np.nan,
        depth_residual=np.nan,
        parallax=np.nan,
        shift_variance=np.nan,
        turn_variance=np.nan,
        middle=np.full(3, np.nan),
        scale_held=False,
        trusted=False,
        note='no frame is shared with the map',
    )


def _share(old: Reconstruction, there: int, new: Reconstruction, here: int) -> _SharedFrame:
    """Take the same pixels of a frame from two windows, where both are rather confident."""
    step = max(round((new.depth[here].size / _PIXELS_PER_FRAME) ** 0.5), 1)
    confidence = np.minimum(
        new.confidence[here, ::step, ::step], old.confidence[there, ::step, ::step]
    )
    chosen = confidence >= np.median(confidence)
    return _SharedFrame(
        old.window_from_camera[there],
        new.window_from_camera[here],
        *_points(old, there, step, chosen),
        *_points(new, here, step, chosen),
    )


def _points(
    window: Reconstruction, i: int, step: int, chosen: npt.NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Give points (P, 3), in the window's frame, and depth (P,) of every `step`-th pixel."""
    depth = window.depth[i, ::step, ::step].astype(np.float64)
    intrinsics = np.diag([1 / step, 1 / step, 1]) @ window.intrinsics[i]
    in_camera = unproject(torch.from_numpy(depth), torch.from_numpy(intrinsics)).numpy()
    pose = window.window_from_camera[i]
    return in_camera[chosen] @ pose[:3, :3].T + pose[:3, 3], depth[chosen]


def _parallax(frames: list[_SharedFrame]) -> float:
    """Measure how far the shared cameras moved, over what they see, in the map's window."""
    centres = np.stack([frame.old_camera[:3, 3] for frame in frames])
    depth = np.median(np.concatenate([frame.old_depth for frame in frames]))
    return float(np.linalg.norm(np.ptp(centres, axis=0)) / depth)


def _fit_cameras(frames: list[_SharedFrame], scale: float) -> Sim3:
    """Average where the shared cameras put the new window in the old, by their points."""
    old = np.stack([frame.old_camera for frame in frames])
    new = np.stack([frame.new_camera for frame in frames])
    turns = old[:, :3, :3] @ new[:, :3, :3].transpose(0, 2, 1)
    weights = np.full(len(frames), 1 / len(frames))
    for _ in range(_ROUNDS):
        turn = torch.from_numpy(np.einsum('n,nij->ij', weights, turns))
        rotation = nearest_rotation(turn).numpy()
        moved = scale * new[:, :3, 3] @ rotation.T
        fitted = Sim3(scale, rotation, weights @ (old[:, :3, 3] - moved))
        miss = np.array([np.median(_distances(frame, fitted)) for frame in frames])
        miss = np.maximum(miss, _ALIKE)
        weights = np.minimum(1, _HUBER * np.median(miss) / miss)
        weights /= weights.sum()
    return fitted


def _scatter(frames: list[_SharedFrame], old_from_new: Sim3) -> tuple[float, float]:
    """Give the variances along each axis of how the cameras differ: in length and in rad."""
    if len(frames) == 1:
        return np.nan, np.nan
    old = np.stack([frame.old_camera for frame in frames])
    placed = old_from_new.place(np.stack([frame.new_camera for frame in frames]))
    shifts = placed[:, :3, 3] - old[:, :3, 3]
    turns = rotation_angle(torch.from_numpy(old[:, :3, :3].transpose(0, 2, 1) @ placed[:, :3, :3]))
    freedom = 3 * (len(frames) - 1)  # the means over the cameras took one value for each axis
    return float(np.square(shifts).sum()) / freedom, float(turns.square().sum()) / freedom


def _distances(frame: _SharedFrame, old_from_new: Sim3) -> Array:
    """Measure how far the same points lie apart, over their depth: (P,)."""
    apart = old_from_new.apply(frame.new_points) - frame.old_points
    distances: Array = np.linalg.norm(apart, axis=-1) / frame.old_depth
    return distances
