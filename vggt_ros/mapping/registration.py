# SPDX-License-Identifier: Apache-2.0
"""A window finds its place in the map, by the frames that both contain.

Every window comes in a frame and a unit of its own. Shared frames are matched by their number,
never by position in the window. What is known of a shared frame is its camera and its depth, in
the window and, from the one before, in the map. An anchor, kept for many windows, stays where it
was put first: each of them is held by it, and turns add up more slowly.

- Scale is the median ratio of the depths of the same pixels, of those shared frames whose depth
  was computed again. It needs no motion. A least-squares
  similarity of the points would shrink with their noise: by 6 % over 125 joints at 1 % of noise.
- Rotation is averaged over the shared cameras' full rotations. Camera centres alone leave the
  roll about a straight path free.
- Translation is averaged over the shared cameras once scale and rotation are known.

The averages are weighted, by iteratively reweighted least squares (Huber): a camera counts less
where its points miss those of the map by more than the points of the other shared cameras do. All
points of a frame miss by its camera's error together, so the weight is one for the frame.

A weak registration is a result with `trusted = False` and the reason, not an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import nearest_rotation, rotation_angle
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.reconstruction import Reconstruction

_PIXELS_PER_FRAME = 4096  # enough for a median to 1 %, cheap at any resolution
_POINTS_PER_FRAME = 1024  # by which shared cameras are weighed against each other
_INLIER = 0.1  # relative distance up to which a point counts as agreeing
_ROUNDS = 5  # of reweighting, at most
_SETTLED = 0.01  # change of the weights below which no other round comes
_HUBER = 1.345  # times the median miss: 95 % as efficient as the mean where all are alike
_ALIKE = 1e-9  # relative miss that is rounding and tells no camera from another
# Without motion and with depth that contradicts itself, a new scale would be a guess.
_NO_PARALLAX = 0.005  # extent of the shared cameras over their median depth
_UNSURE_DEPTH = 0.1  # median relative difference of depth


@dataclass(frozen=True, slots=True)
class Registration:
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
    # How the shared frames scatter about the joint, by which `uncertainty` judges it: variances of
    # their cameras along each axis, in map units and rad, about the middle (3,) of the shared
    # cameras in the map; and of the logarithm of their scales. NaN with fewer than two of them
    # (of whose depth was computed again).
    translation_variance: float
    rotation_variance: float
    scale_variance: float
    middle: Array
    scale_held: bool  # neither depth nor motion told the scale: it is that of the window before
    trusted: bool
    note: str  # why it is not trusted, '' if it is


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """Camera and dropped-out depth of a frame, in a window's frame and unit or in the map's."""

    camera: Array  # (4, 4), rigid, camera to window or map
    intrinsics: Array  # (3, 3), pixels of the dropped depth
    depth: npt.NDArray[np.float32]  # (h, w), along the optical axis
    confidence: npt.NDArray[np.float32]  # (h, w)

    def moved(self, place: Sim3) -> FrameGeometry:
        """Carry the frame along into another frame and unit."""
        depth = np.float32(place.scale) * self.depth
        return replace(self, camera=place.transform_poses(self.camera), depth=depth)

    def points(self, pixels: npt.NDArray[np.intp]) -> Array:
        """Give the points (P, 3) of these pixels (P,), counted row by row."""
        rows, columns = np.divmod(pixels, self.depth.shape[1])
        rays = np.stack((columns, rows, np.ones_like(rows)), -1)
        depth = self.depth.ravel()[pixels, None].astype(np.float64)
        turned = (rays * depth) @ (self.camera[:3, :3] @ np.linalg.inv(self.intrinsics)).T
        found: Array = turned + self.camera[:3, 3]
        return found


@dataclass(frozen=True, slots=True)
class RegisteredFrames:
    """What a window is aligned to: frames that lie in the map."""

    frames: dict[int, FrameGeometry]  # by number, in the map
    scale: float  # map units in one unit of the window placed last

    def moved(self, place: Sim3) -> RegisteredFrames:
        """Carry all of them along."""
        frames = {number: frame.moved(place) for number, frame in self.frames.items()}
        return RegisteredFrames(frames, place.scale * self.scale)


def subsample(reconstruction: Reconstruction, i: int) -> FrameGeometry:
    """Take what registration needs of a frame whose depth is there."""
    step = max(round((reconstruction.depth[i].size / _PIXELS_PER_FRAME) ** 0.5), 1)
    return FrameGeometry(
        camera=reconstruction.window_from_camera[i],
        intrinsics=np.diag([1 / step, 1 / step, 1]) @ reconstruction.intrinsics[i],
        depth=reconstruction.depth[i][::step, ::step].copy(),
        confidence=reconstruction.confidence[i][::step, ::step].copy(),
    )


def register_frames(
    ids: Sequence[int],
    reconstruction: Reconstruction,
    map_from_window: Sim3,
    before: RegisteredFrames | None,
    staying: Collection[int],
) -> RegisteredFrames:
    """
    Put the frames of a window into the map.

    :param before: what the window was aligned to; of a frame whose depth was not computed again,
        that is kept. None: the window begins a map, and such frames are left out.
    :param staying: numbers of frames that stay where they are, if they lie there already.
    """
    there = {} if before is None else before.frames
    cameras = map_from_window.transform_poses(reconstruction.window_from_camera)
    frames = {}
    for i, number in enumerate(ids):
        if number in there and number in staying:
            frames[number] = there[number]
        elif i in reconstruction.depth:
            frames[number] = subsample(reconstruction, i).moved(map_from_window)
        elif number in there:
            frames[number] = replace(there[number], camera=cameras[i])
    return RegisteredFrames(frames, map_from_window.scale)


@dataclass(frozen=True, slots=True)
class _SharedFrames:
    """N frames as the map and a window have them, with P points of each."""

    old_cameras: Array  # (N, 4, 4), map-from-camera
    new_cameras: Array  # (N, 4, 4), window-from-camera
    old_points: Array  # (N, P, 3), in the map
    old_depth: Array  # (N, P)
    new_points: Array  # (N, P, 3), of the same pixels, in the window

    def distances(self, map_from_window: Sim3) -> Array:
        """Measure how far the same points lie apart, over their depth: (N, P)."""
        apart = map_from_window.apply(self.new_points) - self.old_points
        distances: Array = np.sqrt(np.einsum('npi,npi->np', apart, apart)) / self.old_depth
        return distances


def register(
    ids: Sequence[int],
    reconstruction: Reconstruction,
    placed: RegisteredFrames | None,
    max_residual: float,
) -> Registration:
    """
    Align a window with frames that lie in the map.

    :param ids: S frame numbers of the new window.
    :param placed: the frames to align with; None if the map is empty.
    :param max_residual: the largest residual that is trusted.
    """
    shared = [] if placed is None else [i for i, n in enumerate(ids) if n in placed.frames]
    if placed is None or not shared:
        return _nothing_shared()
    told = [i for i in shared if i in reconstruction.depth]
    if not told:
        return _nothing_shared()
    new = {i: subsample(reconstruction, i) for i in told}
    pixels = {i: _choose_pixels(placed.frames[ids[i]], new[i]) for i in told}
    ratios = [_log_ratio(placed.frames[ids[i]], new[i], pixels[i]) for i in told]
    log_ratio = np.concatenate(ratios)
    log_scale = float(np.median(log_ratio))
    depth_residual = float(np.median(np.abs(np.expm1(log_ratio - log_scale))))
    parallax = _parallax(placed, [ids[i] for i in shared])
    held = depth_residual > _UNSURE_DEPTH and parallax < _NO_PARALLAX
    scale = placed.scale if held else float(np.exp(log_scale))
    for i in shared:
        if i not in new:
            new[i] = _carry_over(placed.frames[ids[i]], reconstruction, i, scale)
            pixels[i] = _choose_pixels(placed.frames[ids[i]], new[i])
    cameras = _gather(
        [placed.frames[ids[i]] for i in shared],
        [new[i] for i in shared],
        [pixels[i] for i in shared],
    )
    map_from_window = _fit_cameras(cameras, scale)
    of_told = [shared.index(i) for i in told]
    distance = cameras.distances(map_from_window)[of_told]
    residual = float(np.median(distance))
    trusted = residual <= max_residual
    note = (
        '' if trusted else f'points of the shared frames differ by {residual:.2g} of their depth'
    )
    translation_variance, rotation_variance = _scatter(cameras, map_from_window)
    return Registration(
        map_from_window=map_from_window,
        shared=len(shared),
        residual=residual,
        inliers=float(np.mean(distance <= _INLIER)),
        depth_residual=depth_residual,
        parallax=parallax,
        translation_variance=translation_variance,
        rotation_variance=rotation_variance,
        scale_variance=_scatter_of_scales(ratios),
        middle=cameras.old_cameras[:, :3, 3].mean(0),
        scale_held=held,
        trusted=trusted,
        note=note,
    )


def _nothing_shared() -> Registration:
    return Registration(
        map_from_window=Sim3(),
        shared=0,
        residual=np.nan,
        inliers=np.nan,
        depth_residual=np.nan,
        parallax=np.nan,
        translation_variance=np.nan,
        rotation_variance=np.nan,
        scale_variance=np.nan,
        middle=np.full(3, np.nan),
        scale_held=False,
        trusted=False,
        note='no frame is shared with the map',
    )


def _choose_pixels(old: FrameGeometry, new: FrameGeometry) -> npt.NDArray[np.intp]:
    """Choose the pixels of a frame (P,) that both are rather confident of, row by row."""
    confidence = np.minimum(new.confidence, old.confidence)
    return np.flatnonzero(confidence >= np.median(confidence))


def _log_ratio(old: FrameGeometry, new: FrameGeometry, pixels: npt.NDArray[np.intp]) -> Array:
    """Compare the depth of these pixels: (P,)."""
    ratio = old.depth.ravel()[pixels].astype(np.float64) / new.depth.ravel()[pixels]
    found: Array = np.log(ratio)
    return found


def _carry_over(
    old: FrameGeometry, reconstruction: Reconstruction, i: int, scale: float
) -> FrameGeometry:
    """Take a frame whose depth was not computed again: its depth is that of the map."""
    return replace(old.moved(Sim3(1 / scale)), camera=reconstruction.window_from_camera[i])


def _gather(
    old: Sequence[FrameGeometry],
    new: Sequence[FrameGeometry],
    pixels: Sequence[npt.NDArray[np.intp]],
) -> _SharedFrames:
    """Put shared frames side by side, with as many points of each, spread over its pixels."""
    count = min(_POINTS_PER_FRAME, *(len(each) for each in pixels))
    few = [each[np.linspace(0, len(each) - 1, count).astype(np.intp)] for each in pixels]
    return _SharedFrames(
        old_cameras=np.stack([frame.camera for frame in old]),
        new_cameras=np.stack([frame.camera for frame in new]),
        old_points=np.stack([frame.points(each) for frame, each in zip(old, few)]),
        old_depth=np.stack([frame.depth.ravel()[each] for frame, each in zip(old, few)]),
        new_points=np.stack([frame.points(each) for frame, each in zip(new, few)]),
    )


def _parallax(placed: RegisteredFrames, shared: list[int]) -> float:
    """Measure how far the shared cameras moved, over what they see."""
    frames = [placed.frames[number] for number in shared]
    depth = np.median(np.stack([frame.depth for frame in frames]))
    centres = np.stack([frame.camera[:3, 3] for frame in frames])
    return float(np.linalg.norm(np.ptp(centres, axis=0)) / depth)


def _fit_cameras(frames: _SharedFrames, scale: float) -> Sim3:
    """Average where the shared cameras put the window in the map, by their points."""
    old, new = frames.old_cameras, frames.new_cameras
    turns = old[:, :3, :3] @ new[:, :3, :3].transpose(0, 2, 1)
    weights = np.full(len(old), 1 / len(old))
    for _ in range(_ROUNDS):
        turn = torch.from_numpy(np.einsum('n,nij->ij', weights, turns))
        rotation = nearest_rotation(turn).numpy()
        moved = scale * new[:, :3, 3] @ rotation.T
        fitted = Sim3(scale, rotation, weights @ (old[:, :3, 3] - moved))
        miss = np.maximum(np.median(frames.distances(fitted), axis=1), _ALIKE)
        wanted = np.minimum(1, _HUBER * np.median(miss) / miss)
        wanted /= wanted.sum()
        if np.abs(wanted - weights).max() < _SETTLED * weights.max():
            break
        weights = wanted
    return fitted


def _scatter(frames: _SharedFrames, map_from_window: Sim3) -> tuple[float, float]:
    """Give the variances along each axis of how the cameras differ: in length and in rad."""
    old, count = frames.old_cameras, len(frames.old_cameras)
    if count == 1:
        return np.nan, np.nan
    placed = map_from_window.transform_poses(frames.new_cameras)
    shifts = placed[:, :3, 3] - old[:, :3, 3]
    turns = rotation_angle(torch.from_numpy(old[:, :3, :3].transpose(0, 2, 1) @ placed[:, :3, :3]))
    freedom = 3 * (count - 1)  # the means over the cameras took one value for each axis
    return float(np.square(shifts).sum()) / freedom, float(turns.square().sum()) / freedom


def _scatter_of_scales(log_ratios: list[Array]) -> float:
    """Give the variance of the frames' scales, each by all of its pixels (P,)."""
    if len(log_ratios) == 1:
        return np.nan
    return float(np.var([np.median(ratio) for ratio in log_ratios], ddof=1))
