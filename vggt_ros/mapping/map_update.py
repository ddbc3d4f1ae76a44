# SPDX-License-Identifier: Apache-2.0
"""What a window adds to the map: the same geometry, placed.

The map frame is the optical frame of the map's first camera (z forward, x right, y down). Its
unit is that of the network's first window; what `MapUpdate` gives out is multiplied by the metric
scale, one factor for all, and is in metres where `metric.valid` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.preprocessor import Batch
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
    """Coloured points of one camera."""

    xyz: npt.NDArray[np.float32]  # (N, 3), map frame
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), 1 and more


@dataclass(frozen=True, slots=True)
class MapUpdate:
    """One window, placed in the map."""

    map_id: int  # rises by 1 whenever a new map starts
    map_start_reason: str  # '' if the map goes on
    window_id: int  # counts windows, rejected ones too
    skipped: int  # images received since the last window that became part of none
    batch: Batch  # S frames, their numbers and images
    is_new: tuple[bool, ...]  # S flags: this frame is in no update before
    reconstruction: Reconstruction  # has the depth of new frames, and of some others
    confidence: Array  # (S,), mean over each frame's depth, as of when it was computed last
    registration: Registration
    closure: LoopClosure | None  # the loop that ends here; it has moved earlier windows of the map
    metric: MetricScale
    map_covariance: Array | None  # (S, 6, 6) of the cameras, see `PoseCovariance`; None: unknown
    model: str  # name of the network
    model_trained: bool  # False: random weights, the geometry means nothing
    tracks: PointTracks | None  # None: nobody wanted them, or there was nothing to follow
    seconds: dict[str, float]  # preprocess, inference, reconstruct, align; without work ahead
    settings: CloudSettings

    @property
    def world_from_window(self) -> Sim3:
        """Where the window lies in what is given out: the map, metric if that is known."""
        return Sim3(scale=self.metric.factor) @ self.registration.map_from_window

    @property
    def map_from_camera(self) -> npt.NDArray[np.float64]:
        """The cameras: (S, 4, 4), rigid, camera-to-map."""
        return self.world_from_window.transform_poses(self.reconstruction.window_from_camera)

    @property
    def covariance(self) -> Array | None:
        """How well `map_from_camera` is known: (S, 6, 6), x, y, z and fixed axes, or None."""
        if self.map_covariance is None:
            return None
        lengths = np.array([self.metric.factor] * 3 + [1.0] * 3)
        scaled: Array = self.map_covariance * np.outer(lengths, lengths)
        return scaled

    def depth(self, i: int) -> npt.NDArray[np.float32]:
        """Depth of frame i, a new one, along the optical axis: (H, W), NaN where not trusted."""
        scale = np.float32(self.world_from_window.scale)
        return np.where(
            self._believed(i), scale * self.reconstruction.depth[i], np.float32(np.nan)
        )

    def _believed(self, i: int) -> npt.NDArray[np.bool_]:
        """Say which pixels (H, W) of frame i are given out."""
        believed: npt.NDArray[np.bool_] = (
            self.reconstruction.confidence[i] >= self.settings.min_confidence
        )
        seen = self.batch.fitted[i].seen
        return believed if seen is None else believed & seen

    def chosen_pixels(self, i: int) -> npt.NDArray[np.intp]:
        """Choose pixels of frame i, a new one, that are believed: flat, at most `max_points`."""
        chosen = np.flatnonzero(self._believed(i))
        if len(chosen) > self.settings.max_points:
            spread = np.linspace(0, len(chosen) - 1, self.settings.max_points)
            chosen = chosen[spread.astype(np.intp)]
        return chosen

    def points(self, i: int) -> PointCloud:
        """Give the points of frame i, a new one, that are believed, at most `max_points`."""
        chosen = self.chosen_pixels(i)
        geometry = self.reconstruction
        # float32 carries a cloud to 1e-7 of its size; only the transform is put together in 64
        map_from_camera = self.world_from_window.matrix() @ geometry.window_from_camera[i]
        map_from_pixel = map_from_camera[:3, :3] @ np.linalg.inv(geometry.intrinsics[i])
        height, width = geometry.image_size
        of_columns, of_rows, offset = map_from_pixel.T.astype(np.float32)
        columns = np.arange(width, dtype=np.float32)[:, None] * of_columns
        rows = np.arange(height, dtype=np.float32)[:, None] * of_rows + offset
        rays = (rows[:, None] + columns).reshape(-1, 3)[chosen]
        depth = geometry.depth[i].ravel()[chosen, None]
        return PointCloud(
            xyz=depth * rays + map_from_camera[:3, 3].astype(np.float32),
            rgb=self.batch.fitted[i].pixels.reshape(-1, 3)[chosen],
            confidence=geometry.confidence[i].ravel()[chosen],
        )


def corrected_registrations(updates: Sequence[MapUpdate]) -> list[Sim3]:
    """Say where the windows of one map lie after all its loops: map from window of each."""
    places: dict[int, Sim3] = {}
    for update in updates:
        if update.closure is not None:
            for number, moved in update.closure.corrections.items():
                if number in places:
                    places[number] = moved @ places[number]
        places[update.window_id] = update.registration.map_from_window
    return list(places.values())
