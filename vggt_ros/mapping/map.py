# SPDX-License-Identifier: Apache-2.0
"""The map: everything that outlives a window, made new at each map start.

A `Map` registers windows and adds them, one after the other. What changes with each window is in
`MapState`, plain data that can be written to a file. A map that cannot continue, because a window
does not fit, has a `successor`; only what belongs to the camera or to the stream is passed on.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from vggt_ros.frames.batch import Batch, Queries
from vggt_ros.frames.sliding_window import Window
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.inference.network import Network
from vggt_ros.mapping.covariance import PoseUncertainty
from vggt_ros.mapping.intrinsics import FocalHistory, choose_intrinsics
from vggt_ros.mapping.loop_closure import LoopClosure, LoopMemory, close_loop
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import MetricScale, ScaleHistory, ScaleSource
from vggt_ros.mapping.point_tracker import (
    PointTracks,
    TrackedPoints,
    select_queries,
    update_tracks,
)
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.mapping.registration import (
    RegisteredFrames,
    Registration,
    register,
    register_frames,
)
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MapState:
    """All of a map that changes from window to window."""

    map_id: int = 0
    start_reason: str = ''  # '' before the first window
    frames: RegisteredFrames | None = None  # of the last window; None: the map is empty
    newest_frame_id: int = -1  # of all maps
    confidence: dict[int, float | None] = field(default_factory=dict)  # mean, by frame id
    scale: ScaleHistory = field(default_factory=ScaleHistory)
    focal_lengths: FocalHistory = field(default_factory=FocalHistory)
    uncertainty: PoseUncertainty = field(default_factory=PoseUncertainty)
    loops: LoopMemory = field(default_factory=LoopMemory)
    tracks: TrackedPoints = field(default_factory=TrackedPoints)


class Map:
    """One map that grows."""

    def __init__(
        self,
        settings: Settings,
        network: Network,
        scale_source: ScaleSource | None,
        counts: Counter[str],
        state: MapState | None = None,
    ) -> None:
        """
        Start an empty map, or continue one.

        :param network: predicts joint windows for loop closure.
        :param counts: events are counted here.
        """
        self._settings = settings
        self._network = network
        self._scale_source = scale_source
        self._counts = counts
        self.state = state or MapState()

    @property
    def is_empty(self) -> bool:
        """True before the first window."""
        return self.state.frames is None

    def successor(self, reason: str) -> Map:
        """Return the map that starts now, for this reason; an empty map is its own successor."""
        old = self.state
        if self.is_empty:
            old.start_reason = old.start_reason or reason
            return self
        state = MapState(
            map_id=old.map_id + 1,
            start_reason=reason,
            newest_frame_id=old.newest_frame_id,
            confidence=old.confidence,
            scale=ScaleHistory(last_rejected=old.scale.last_rejected),
            focal_lengths=old.focal_lengths,
            tracks=old.tracks,
        )
        return Map(self._settings, self._network, self._scale_source, self._counts, state)

    def request(self, batch: Batch, with_tracks: bool) -> Batch:
        """Choose the frames whose depth is predicted, and the points to track."""
        queries: Queries | None = None
        if with_tracks and self._settings.tracks.track_points:
            queries = select_queries(self.state.tracks, batch, self._settings.tracks.track_points)
        shared = self._shared(batch.ids)
        new = set(range(len(batch.ids))) - set(shared)
        again = self._settings.registration.choose_shared(shared)
        return replace(batch, depth_frames=tuple(sorted({*new, *again})), queries=queries)

    def halve(self, batch: Batch) -> Batch:
        """Keep the newest half of a window, and one frame of the map to register it by."""
        count = len(batch.ids)
        newest = list(range(count - count // 2, count))
        shared = self._shared(batch.ids)
        if shared and shared[-1] < newest[0]:
            newest[0] = shared[-1]
        return batch.select(newest)

    def choose_intrinsics(self, reconstruction: Reconstruction, batch: Batch) -> Reconstruction:
        """Replace the predicted camera matrices as the settings say."""
        matrices, history = choose_intrinsics(
            self.state.focal_lengths, reconstruction.intrinsics, batch, self._settings.camera
        )
        self.state.focal_lengths = history
        self._counts['focal_length_disagreements'] += history.disagrees
        return replace(reconstruction, intrinsics=matrices)

    def register(self, batch: Batch, reconstruction: Reconstruction) -> Registration:
        """Register a window to the newest frames of the map; the map does not change."""
        return register(
            batch.ids,
            reconstruction,
            self.state.frames,
            self._settings.registration.max_registration_residual,
        )

    def add(
        self,
        window: Window,
        batch: Batch,
        prediction: Prediction,
        reconstruction: Reconstruction,
        registration: Registration,
        seconds: dict[str, float],
    ) -> MapUpdate:
        """
        Add a window.

        :param registration: an accepted one, unless the map is empty.
        """
        state = self.state
        starts = self.is_empty
        if starts:
            registration = replace(registration, map_from_window=Sim3())
            self._counts['maps'] += 1
            logger.info('map %d starts: %s', state.map_id, state.start_reason)
        confidence = self._update_confidence(batch, reconstruction)
        if state.frames is not None:
            shared = self._shared(batch.ids)
            mean = float(confidence[shared].mean())
            state.uncertainty = state.uncertainty.after(registration, mean)
        is_new = tuple(frame_id > state.newest_frame_id for frame_id in batch.ids)
        state.newest_frame_id = batch.ids[-1]
        state.frames = register_frames(
            batch.ids, reconstruction, registration.map_from_window, state.frames, window.anchor
        )
        loop = self._close_loop(batch, reconstruction, prediction, registration)
        if loop is not None:
            correction = loop.corrections[window.window_id]
            corrected = correction @ registration.map_from_window
            registration = replace(registration, map_from_window=corrected)
            state.frames = state.frames.transformed(correction)
            state.scale = state.scale.corrected(loop.corrections)
        metric = self._measure_scale(batch, reconstruction, registration.map_from_window)
        centres = registration.map_from_window.apply(reconstruction.window_from_camera[:, :3, 3])
        return MapUpdate(
            map_id=state.map_id,
            map_start_reason=state.start_reason if starts else '',
            window_id=window.window_id,
            dropped=window.dropped,
            batch=batch,
            is_new=is_new,
            reconstruction=reconstruction,
            confidence=confidence,
            registration=registration,
            loop_closure=loop,
            metric=metric,
            map_covariance=state.uncertainty.covariance(centres, confidence, metric.spread),
            model=self._network.name,
            model_trained=self._network.trained,
            tracks=self._update_tracks(batch, prediction, reconstruction, starts),
            seconds=seconds,
            settings=self._settings.cloud,
        )

    def _shared(self, ids: tuple[int, ...]) -> list[int]:
        """Return the indices of frames that are in the map."""
        known = () if self.state.frames is None else self.state.frames.frames
        return [i for i, frame_id in enumerate(ids) if frame_id in known]

    def _update_confidence(self, batch: Batch, reconstruction: Reconstruction) -> Array:
        """Return the mean confidence of each frame (S,), as predicted last; NaN: never."""
        predicted = {
            batch.ids[i]: float(values.mean()) for i, values in reconstruction.confidence.items()
        }
        before = self.state.confidence
        self.state.confidence = {i: predicted.get(i, before.get(i)) for i in batch.ids}
        return np.array(list(self.state.confidence.values()), float)

    def _close_loop(
        self,
        batch: Batch,
        reconstruction: Reconstruction,
        prediction: Prediction,
        registration: Registration,
    ) -> LoopClosure | None:
        if not self._settings.registration.loop_closure or self.state.frames is None:
            return None
        descriptors = prediction.descriptors
        loop, rejection_reason = close_loop(
            self.state.loops,
            self._network,
            self._settings.registration,
            batch,
            self.state.frames,
            reconstruction.intrinsics,
            None if descriptors is None else descriptors[0],
            registration,
        )
        self._counts['closed_loops'] += loop is not None
        self._counts['rejected_loops'] += bool(rejection_reason)
        return loop

    def _measure_scale(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> MetricScale:
        settings, stamp_ns = self._settings.scale, batch.frames[-1].stamp_ns
        history = self.state.scale
        if self._scale_source is not None and settings.scale_source not in ('none', 'fixed'):
            measurement = self._scale_source.measure(batch, reconstruction, map_from_window)
            if measurement is not None:
                history = history.measured(batch.window_id, stamp_ns, measurement, settings)
                self._counts['rejected_scales'] += history.last_rejected
        self.state.scale = history.updated()
        return self.state.scale.metric_scale(settings, stamp_ns)

    def _update_tracks(
        self,
        batch: Batch,
        prediction: Prediction,
        reconstruction: Reconstruction,
        new_map: bool,
    ) -> PointTracks | None:
        self.state.tracks, tracks = update_tracks(
            self.state.tracks,
            batch,
            prediction,
            reconstruction.confidence,
            self._settings.cloud.min_confidence,
            self._network.tracks_trained,
            new_map,
        )
        return tracks
