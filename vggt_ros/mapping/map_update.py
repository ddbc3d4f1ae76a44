# SPDX-License-Identifier: Apache-2.0
"""What a window adds to the map: its geometry in the map frame.

The map frame is the optical frame of the map's first camera (z forward, x right, y down). Its
scale is that of the network's first window; the world of `MapUpdate` is the map multiplied by the
metric scale, one factor for all lengths, and is in metres if `metric.valid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.batch import Batch
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.loop_closure import LoopClosure
from vggt_ros.mapping.metric_scale import MetricScale
from vggt_ros.mapping.point_tracker import PointTracks
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.mapping.registration import Registration
from vggt_ros.settings import CloudSettings


@dataclass(frozen=True, slots=True)
class PointCloud:
    """Coloured points seen by one camera."""

    xyz: npt.NDArray[np.float32]  # (N, 3), map frame
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), 1 and more


@dataclass(frozen=True, slots=True)
class MapUpdate:
    """One window, registered to the map."""

    map_id: int  # rises by 1 whenever a new map starts
    map_start_reason: str  # '' if the map continues
    window_id: int  # counts windows, including rejected ones
    dropped: int  # frame sets received since the last window that are part of none
    batch: Batch  # S frames, their ids and images
    is_new: tuple[bool, ...]  # S flags: this frame is in no earlier update
    reconstruction: Reconstruction  # with the depth of new frames, and of some others
    confidence: Array  # (S,), mean over each frame's depth, as predicted last
    registration: Registration
    loop_closure: LoopClosure | None  # the loop that ends here; it corrected earlier windows
    metric: MetricScale
    map_covariance: Array | None  # (S, 6, 6) of the cameras, see `PoseUncertainty`; None: unknown
    model: str  # name of the network
    model_trained: bool  # False: random weights, the geometry is meaningless
    tracks: PointTracks | None  # None: not requested, or nothing to track
    seconds: dict[str, float]  # preprocess, inference, reconstruct, register
    settings: CloudSettings

    @property
    def world_from_window(self) -> Sim3:
        """Transform into the world: the map, metric if the scale is known."""
        return Sim3(scale=self.metric.factor) @ self.registration.map_from_window

    @property
    def world_from_camera(self) -> npt.NDArray[np.float64]:
        """The camera poses in the world: (S, 4, 4), rigid."""
        return self.world_from_window.transform_poses(self.reconstruction.window_from_camera)

    @property
    def covariance(self) -> Array | None:
        """Covariance of `world_from_camera`: (S, 6, 6), x, y, z and fixed axes, or None."""
        if self.map_covariance is None:
            return None
        lengths = np.array([self.metric.factor] * 3 + [1.0] * 3)
        scaled: Array = self.map_covariance * np.outer(lengths, lengths)
        return scaled

    def depth(self, i: int) -> npt.NDArray[np.float32]:
        """Depth of frame i, a new one, along the optical axis: (H, W), NaN: not confident."""
        scale = np.float32(self.world_from_window.scale)
        return np.where(
            self._confident(i), scale * self.reconstruction.depth[i], np.float32(np.nan)
        )

    def _confident(self, i: int) -> npt.NDArray[np.bool_]:
        """Compute which pixels (H, W) of frame i are confident and were seen by the lens."""
        confident: npt.NDArray[np.bool_] = (
            self.reconstruction.confidence[i] >= self.settings.min_confidence
        )
        seen = self.batch.images[i].seen
        return confident if seen is None else confident & seen

    def select_pixels(self, i: int) -> npt.NDArray[np.intp]:
        """Select confident pixels of frame i, a new one: flat indices, at most `max_points`."""
        pixels = np.flatnonzero(self._confident(i))
        if len(pixels) > self.settings.max_points:
            spread = np.linspace(0, len(pixels) - 1, self.settings.max_points)
            pixels = pixels[spread.astype(np.intp)]
        return pixels

    def point_cloud(self, i: int) -> PointCloud:
        """Unproject the selected pixels of frame i, a new one."""
        pixels = self.select_pixels(i)
        geometry = self.reconstruction
        # float32 is exact to 1e-7 of the size of a cloud; the transform is composed in float64
        world_from_camera = self.world_from_window.matrix() @ geometry.window_from_camera[i]
        world_from_pixel = world_from_camera[:3, :3] @ np.linalg.inv(geometry.intrinsics[i])
        height, width = geometry.image_size
        per_column, per_row, offset = world_from_pixel.T.astype(np.float32)
        columns = np.arange(width, dtype=np.float32)[:, None] * per_column
        rows = np.arange(height, dtype=np.float32)[:, None] * per_row + offset
        rays = (rows[:, None] + columns).reshape(-1, 3)[pixels]
        depth = geometry.depth[i].ravel()[pixels, None]
        return PointCloud(
            xyz=depth * rays + world_from_camera[:3, 3].astype(np.float32),
            rgb=self.batch.images[i].pixels.reshape(-1, 3)[pixels],
            confidence=geometry.confidence[i].ravel()[pixels],
        )


def corrected_registrations(updates: Sequence[MapUpdate]) -> list[Sim3]:
    """Return map_from_window of the windows of one map after all its loop closures."""
    poses: dict[int, Sim3] = {}
    for update in updates:
        if update.loop_closure is not None:
            for window_id, correction in update.loop_closure.corrections.items():
                if window_id in poses:
                    poses[window_id] = correction @ poses[window_id]
        poses[update.window_id] = update.registration.map_from_window
    return list(poses.values())
