# SPDX-License-Identifier: Apache-2.0
"""Registration of a window to the map, a Sim(3), from the frames that both contain.

Every window has a frame of reference and a scale of its own. Shared frames are matched by their
id, never by their index in the window. Of a shared frame the camera pose and the depth are known,
in the window and, from the one before, in the map. An anchor, shared by many windows, keeps its
first pose, which limits rotational drift.

- Scale is the median ratio of the depths of the same pixels, of those shared frames whose depth
  was predicted again. It needs no motion. A least-squares similarity of the points would shrink
  with their noise: by 6 % over 125 registrations at 1 % of noise.
- Rotation is averaged over the full rotations of the shared cameras. Camera centres alone leave
  the roll about a straight trajectory undetermined.
- Translation is averaged over the shared cameras once scale and rotation are known.

The averages are weighted, by iteratively reweighted least squares (Huber): a camera has less
weight if its points are farther from those of the map than the points of the other shared cameras.
The error of a camera moves all points of its frame together, so each frame has one weight.

A poor registration is a result with `accepted = False` and the reason, not an error.
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
_POINTS_PER_FRAME = 1024  # for the weights of the shared cameras
_INLIER = 0.1  # relative distance up to which a point is an inlier
_MAX_ITERATIONS = 5  # of reweighting
_CONVERGED = 0.01  # relative change of the weights
_HUBER = 1.345  # times the median distance: 95 % efficiency for normal errors
_ROUNDING = 1e-9  # relative distance below which there are no differences between cameras
# Without motion and with inconsistent depth the scale is not observable, and is held.
_MIN_PARALLAX = 0.005  # extent of the shared cameras over their median depth
_MAX_DEPTH_RESIDUAL = 0.1  # median relative difference of depth


@dataclass(frozen=True, slots=True)
class Registration:
    """The pose and scale of a window in the map, and how well they are determined."""

    map_from_window: Sim3  # the identity without shared frames
    shared: int  # frames that the window and the map have in common
    residual: float  # median distance of the same points, over their depth; NaN without overlap
    inliers: float  # share of the points within 10 % of their depth; NaN without overlap
    # Median relative difference of the depth of the same pixels once scaled: how well the
    # windows agree about what they see, whatever their cameras; NaN without overlap.
    depth_residual: float
    # Extent of the shared cameras over their median depth: near 0, the camera was stationary or
    # only rotated, and the scale is observable from depth alone; NaN without overlap.
    parallax: float
    # Scatter of the shared frames about the registration, see `covariance`: variances of their
    # cameras along each axis, in map units and rad, about the centroid (3,) of the shared cameras
    # in the map; and of the logarithm of their scales. NaN with fewer than two of them (with depth
    # that was predicted again).
    translation_variance: float
    rotation_variance: float
    scale_variance: float
    centroid: Array
    scale_held: bool  # scale not observable: that of the window before is used
    accepted: bool
    rejection_reason: str  # '' if accepted


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """Camera and subsampled depth of a frame, in the frame and scale of a window or of the map."""

    camera: Array  # (4, 4), rigid, camera to window or map
    intrinsics: Array  # (3, 3), pixels of the subsampled depth
    depth: npt.NDArray[np.float32]  # (h, w), along the optical axis
    confidence: npt.NDArray[np.float32]  # (h, w)

    def __post_init__(self) -> None:
        if self.camera.shape != (4, 4) or self.intrinsics.shape != (3, 3):
            raise ValueError(
                f'camera matrices of shapes {self.camera.shape} and {self.intrinsics.shape}, '
                'expected (4, 4) and (3, 3)'
            )
        if not self.intrinsics.diagonal().min() > 0:
            raise ValueError(
                f'camera matrix {self.intrinsics.tolist()}, expected focal lengths above 0'
            )
        shapes = self.depth.shape, self.confidence.shape
        if self.depth.ndim != 2 or not self.depth.size or shapes[0] != shapes[1]:
            raise ValueError(
                f'depth and confidence of shapes {shapes[0]} and {shapes[1]}, expected (h, w)'
            )

    def transformed(self, target_from_here: Sim3) -> FrameGeometry:
        """Transform into another frame of reference and scale."""
        depth = np.float32(target_from_here.scale) * self.depth
        camera = target_from_here.transform_poses(self.camera)
        return replace(self, camera=camera, depth=depth)

    def points(self, pixels: npt.NDArray[np.intp]) -> Array:
        """Unproject pixels (P,), flat indices in row-major order, to points (P, 3)."""
        rows, columns = np.divmod(pixels, self.depth.shape[1])
        rays = np.stack((columns, rows, np.ones_like(rows)), -1)
        depth = self.depth.ravel()[pixels, None].astype(np.float64)
        rotated = (rays * depth) @ (self.camera[:3, :3] @ np.linalg.inv(self.intrinsics)).T
        points: Array = rotated + self.camera[:3, 3]
        return points


@dataclass(frozen=True, slots=True)
class RegisteredFrames:
    """Frames with known poses in the map, which the next window is registered to."""

    frames: dict[int, FrameGeometry]  # by frame id, in the map
    scale: float  # of the last window: map units in one unit of it

    def transformed(self, target_from_here: Sim3) -> RegisteredFrames:
        """Transform all of them."""
        frames = {i: frame.transformed(target_from_here) for i, frame in self.frames.items()}
        return RegisteredFrames(frames, target_from_here.scale * self.scale)


def subsample(reconstruction: Reconstruction, i: int) -> FrameGeometry:
    """Subsample a frame with depth to what registration needs."""
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
    fixed: Collection[int],
) -> RegisteredFrames:
    """
    Transform the frames of a window into the map.

    :param before: frames that the window was registered to; the depth of a frame that was not
        predicted again is taken from there. None: the window starts a map, and such frames are
        left out.
    :param fixed: ids of frames that keep their pose if they are in the map already.
    """
    known = {} if before is None else before.frames
    cameras = map_from_window.transform_poses(reconstruction.window_from_camera)
    frames = {}
    for i, frame_id in enumerate(ids):
        if frame_id in known and frame_id in fixed:
            frames[frame_id] = known[frame_id]
        elif i in reconstruction.depth:
            frames[frame_id] = subsample(reconstruction, i).transformed(map_from_window)
        elif frame_id in known:
            frames[frame_id] = replace(known[frame_id], camera=cameras[i])
    return RegisteredFrames(frames, map_from_window.scale)


@dataclass(frozen=True, slots=True)
class _SharedFrames:
    """N frames in the map and in a window, with P points of each."""

    old_cameras: Array  # (N, 4, 4), map-from-camera
    new_cameras: Array  # (N, 4, 4), window-from-camera
    old_points: Array  # (N, P, 3), in the map
    old_depth: Array  # (N, P)
    new_points: Array  # (N, P, 3), of the same pixels, in the window

    def distances(self, map_from_window: Sim3) -> Array:
        """Compute the distances of the same points, over their depth: (N, P)."""
        offset = map_from_window.apply(self.new_points) - self.old_points
        distances: Array = np.sqrt(np.einsum('npi,npi->np', offset, offset)) / self.old_depth
        return distances


def register(
    ids: Sequence[int],
    reconstruction: Reconstruction,
    registered: RegisteredFrames | None,
    max_residual: float,
) -> Registration:
    """
    Register a window to frames of the map.

    :param ids: S frame ids of the new window.
    :param registered: the frames to register to; None if the map is empty.
    :param max_residual: the largest residual that is accepted.
    """
    shared = [] if registered is None else [i for i, n in enumerate(ids) if n in registered.frames]
    if registered is None or not shared:
        return _no_overlap()
    with_depth = [i for i in shared if i in reconstruction.depth]
    if not with_depth:
        return _no_overlap()
    new = {i: subsample(reconstruction, i) for i in with_depth}
    pixels = {i: _choose_pixels(registered.frames[ids[i]], new[i]) for i in with_depth}
    ratios = [_log_ratio(registered.frames[ids[i]], new[i], pixels[i]) for i in with_depth]
    log_ratio = np.concatenate(ratios)
    log_scale = float(np.median(log_ratio))
    depth_residual = float(np.median(np.abs(np.expm1(log_ratio - log_scale))))
    parallax = _parallax(registered, [ids[i] for i in shared])
    held = depth_residual > _MAX_DEPTH_RESIDUAL and parallax < _MIN_PARALLAX
    scale = registered.scale if held else float(np.exp(log_scale))
    for i in shared:
        if i not in new:
            new[i] = _carry_over(registered.frames[ids[i]], reconstruction, i, scale)
            pixels[i] = _choose_pixels(registered.frames[ids[i]], new[i])
    cameras = _gather(
        [registered.frames[ids[i]] for i in shared],
        [new[i] for i in shared],
        [pixels[i] for i in shared],
    )
    map_from_window = _fit_cameras(cameras, scale)
    with_depth_rows = [shared.index(i) for i in with_depth]
    distance = cameras.distances(map_from_window)[with_depth_rows]
    residual = float(np.median(distance))
    accepted = residual <= max_residual
    reason = f'points of the shared frames differ by {residual:.2g} of their depth'
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
        centroid=cameras.old_cameras[:, :3, 3].mean(0),
        scale_held=held,
        accepted=accepted,
        rejection_reason='' if accepted else reason,
    )


def _no_overlap() -> Registration:
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
        centroid=np.full(3, np.nan),
        scale_held=False,
        accepted=False,
        rejection_reason='no frame is shared with the map',
    )


def _choose_pixels(old: FrameGeometry, new: FrameGeometry) -> npt.NDArray[np.intp]:
    """Select the pixels of a frame (P,) whose confidence in both is above the median."""
    confidence = np.minimum(new.confidence, old.confidence)
    return np.flatnonzero(confidence >= np.median(confidence))


def _log_ratio(old: FrameGeometry, new: FrameGeometry, pixels: npt.NDArray[np.intp]) -> Array:
    """Compare the depth of these pixels: (P,)."""
    ratio = old.depth.ravel()[pixels].astype(np.float64) / new.depth.ravel()[pixels]
    log_ratio: Array = np.log(ratio)
    return log_ratio


def _carry_over(
    old: FrameGeometry, reconstruction: Reconstruction, i: int, scale: float
) -> FrameGeometry:
    """Use the map's depth for a frame whose depth was not predicted again."""
    return replace(old.transformed(Sim3(1 / scale)), camera=reconstruction.window_from_camera[i])


def _gather(
    old: Sequence[FrameGeometry],
    new: Sequence[FrameGeometry],
    pixels: Sequence[npt.NDArray[np.intp]],
) -> _SharedFrames:
    """Stack shared frames, with the same number of points of each, spread over its pixels."""
    count = min(_POINTS_PER_FRAME, *(len(each) for each in pixels))
    few = [each[np.linspace(0, len(each) - 1, count).astype(np.intp)] for each in pixels]
    return _SharedFrames(
        old_cameras=np.stack([frame.camera for frame in old]),
        new_cameras=np.stack([frame.camera for frame in new]),
        old_points=np.stack([frame.points(each) for frame, each in zip(old, few)]),
        old_depth=np.stack([frame.depth.ravel()[each] for frame, each in zip(old, few)]),
        new_points=np.stack([frame.points(each) for frame, each in zip(new, few)]),
    )


def _parallax(registered: RegisteredFrames, shared: list[int]) -> float:
    """Compute the extent of the shared cameras over their median depth."""
    frames = [registered.frames[i] for i in shared]
    depth = np.median(np.stack([frame.depth for frame in frames]))
    centres = np.stack([frame.camera[:3, 3] for frame in frames])
    return float(np.linalg.norm(np.ptp(centres, axis=0)) / depth)


def _fit_cameras(frames: _SharedFrames, scale: float) -> Sim3:
    """Average the pose of the window in the map over the shared cameras, robustly."""
    old, new = frames.old_cameras, frames.new_cameras
    rotations = old[:, :3, :3] @ new[:, :3, :3].transpose(0, 2, 1)
    weights = np.full(len(old), 1 / len(old))
    for _ in range(_MAX_ITERATIONS):
        mean = torch.from_numpy(np.einsum('n,nij->ij', weights, rotations))
        rotation = nearest_rotation(mean).numpy()
        moved = scale * new[:, :3, 3] @ rotation.T
        fitted = Sim3(scale, rotation, weights @ (old[:, :3, 3] - moved))
        distance = np.maximum(np.median(frames.distances(fitted), axis=1), _ROUNDING)
        wanted = np.minimum(1, _HUBER * np.median(distance) / distance)
        wanted /= wanted.sum()
        if np.abs(wanted - weights).max() < _CONVERGED * weights.max():
            break
        weights = wanted
    return fitted


def _scatter(frames: _SharedFrames, map_from_window: Sim3) -> tuple[float, float]:
    """Compute the variances of the differences of the cameras: along an axis, and in rad."""
    old, count = frames.old_cameras, len(frames.old_cameras)
    if count == 1:
        return np.nan, np.nan
    new = map_from_window.transform_poses(frames.new_cameras)
    offsets = new[:, :3, 3] - old[:, :3, 3]
    angles = rotation_angle(torch.from_numpy(old[:, :3, :3].transpose(0, 2, 1) @ new[:, :3, :3]))
    freedom = 3 * (count - 1)  # the means over the cameras use one degree for each axis
    return float(np.square(offsets).sum()) / freedom, float(angles.square().sum()) / freedom


def _scatter_of_scales(log_ratios: list[Array]) -> float:
    """Compute the variance of the scales of the frames, each from all of its pixels (P,)."""
    if len(log_ratios) == 1:
        return np.nan
    return float(np.var([np.median(ratio) for ratio in log_ratios], ddof=1))
