# SPDX-License-Identifier: Apache-2.0
"""The pipeline as one readable function: a frame goes in, an update of the map comes out.

    frame -> SlidingWindow -> Preprocessor -> network -> reconstruct -> register -> Map.add
          -> MapUpdate

The engine knows neither threads nor ROS. One thread at a time may call it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import Preprocessor
from vggt_ros.frames.sliding_window import SlidingWindow, SlidingWindowState, Window
from vggt_ros.inference.network import Network
from vggt_ros.mapping.map import Map, MapState
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import ScaleSource, check_source
from vggt_ros.mapping.pose_graph import import_gtsam
from vggt_ros.mapping.reconstruction import PredictionError, reconstruct
from vggt_ros.model.prediction import HEADS, Prediction
from vggt_ros.settings import Settings
from vggt_ros.state_dict import from_state_dict, to_state_dict

_MIN_WINDOW = 2  # frames; a single one has no parallax to estimate depth from

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineState:
    """All of an engine that changes from window to window."""

    sliding_window: SlidingWindowState
    map: MapState
    counts: dict[str, int] = field(default_factory=dict)


class StreamingEngine:
    """The current map, the frames of the next window, and the network between them."""

    def __init__(
        self, settings: Settings, network: Network, scale_source: ScaleSource | None = None
    ) -> None:
        """
        Start with an empty map.

        :param scale_source: measures metric scale, if `scale_source` of the settings needs it.
        :raises ValueError: if it is needed and missing, if loop closure lacks GTSAM, or if the
            network cannot run with these settings.
        """
        settings = network.prepare(settings)
        check_source(settings.scale, scale_source)
        if settings.registration.loop_closure:
            import_gtsam()
        if settings.tracks.track_points and not network.tracks_trained:
            logger.warning(
                'track_points is %d, but the track head of the network %s is UNTRAINED: its '
                'tracks are meaningless',
                *(settings.tracks.track_points, network.name),
            )
        width = settings.model.resolution or network.image_width
        self._network = network
        self._counts: Counter[str] = Counter()
        self._sliding_window = SlidingWindow(settings.window)
        self._preprocessor = Preprocessor(settings.model, settings.camera, width, network.device)
        self._map = Map(settings, network, scale_source, self._counts)
        self._encodes_ahead = True

    @property
    def window_size(self) -> int:
        """Frame sets in a window; less than the setting if memory is insufficient."""
        return self._sliding_window.state.size

    @property
    def window_stride(self) -> int:
        """New frame sets between two windows; may be less than the setting, as `window_size`."""
        return self._sliding_window.state.stride

    @property
    def counts(self) -> dict[str, int]:
        """Events so far: images received and dropped by cause, windows, maps, failures."""
        return dict(Counter(self._sliding_window.state.counts) + self._counts)

    def reset(self, reason: str) -> None:
        """Forget the frames in the window; the next one starts a new map."""
        self._sliding_window.reset(reason)

    def add(
        self,
        frames: Frame | Sequence[Frame],
        dropped_stamps_ns: Sequence[int] = (),
        *,
        with_tracks: bool = True,
    ) -> MapUpdate | None:
        """
        Add the next frame, or the synchronized frames of several cameras.

        :param dropped_stamps_ns: stamps of frame sets received before this one but dropped.
        :param with_tracks: points are tracked, which takes time, if `track_points` is set.
        :returns: an update of the map if these frames complete a window.
        :raises PredictionError: if the network's output for that window is not valid geometry.
            The window is lost; the engine can continue.
        """
        window = self._sliding_window.add(frames, dropped_stamps_ns)
        return None if window is None else self._process(window, with_tracks)

    def finish(self, *, with_tracks: bool = True) -> MapUpdate | None:
        """
        Process the last, incomplete window at the end of the stream.

        :raises PredictionError: as `add` does.
        """
        window = self._sliding_window.finish()
        return None if window is None else self._process(window, with_tracks)

    def encode_ahead(self) -> None:
        """
        Preprocess and encode the frames of the next, incomplete window.

        To be called while idle: results do not change, but the next one comes sooner.
        """
        if not self._encodes_ahead:
            return
        images = self._preprocessor.process_frames(self._sliding_window.next_frames)
        if len({image.pixels.shape for image in images.values()}) != 1:
            return  # images of several sizes are padded when the window is complete
        try:
            self._network.encode_ahead(images)
            return
        except torch.cuda.OutOfMemoryError:
            self._counts['out_of_memory'] += 1
            self._encodes_ahead = False
        # outside of the handler, as in `_predict`
        torch.cuda.empty_cache()
        logger.warning(
            'the device is out of memory: from now on frames are encoded when their window is '
            'complete'
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to continue from here: JSON and arrays."""
        state = EngineState(self._sliding_window.state, self._map.state, dict(self._counts))
        return to_state_dict(state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """
        Continue from the state of another engine with the same settings.

        :raises ValueError: if this is not the state of an engine; this one is then unchanged.
        """
        state = from_state_dict(EngineState, state_dict)
        size, stride = state.sliding_window.size, state.sliding_window.stride
        if not 1 <= stride < size <= self.window_size:
            raise ValueError(
                f'windows of {size} frame sets, {stride} of them new, expected at most '
                f'{self.window_size}, and new ones fewer than all'
            )
        self._sliding_window.state = state.sliding_window
        self._map.state = state.map
        self._counts.clear()
        self._counts.update(state.counts)

    def _process(self, window: Window, with_tracks: bool) -> MapUpdate:
        self._counts['windows'] += 1
        if window.map_start_reason:
            self._map = self._map.successor(window.map_start_reason)
        stopwatch = _Stopwatch()
        batch = self._preprocessor.process(window)
        stopwatch.lap('preprocess')
        batch, prediction = self._predict(batch, with_tracks)
        stopwatch.lap('inference')
        try:
            reconstruction = reconstruct(prediction, batch)
        except PredictionError:
            self._counts['rejected_windows'] += 1
            raise
        reconstruction = self._map.choose_intrinsics(reconstruction, batch)
        stopwatch.lap('reconstruct')
        registration = self._map.register(batch, reconstruction)
        self._counts['held_scales'] += registration.scale_held
        if not registration.accepted and not self._map.is_empty:
            self._counts['rejected_registrations'] += 1
            self._map = self._map.successor(registration.rejection_reason)
        stopwatch.lap('register')
        return self._map.add(
            window, batch, prediction, reconstruction, registration, stopwatch.seconds
        )

    def _predict(self, batch: Batch, with_tracks: bool) -> tuple[Batch, Prediction]:
        """
        Run the network.

        Out of memory, the network first trades speed for memory, then windows are halved.
        """
        while True:
            batch = self._map.request(batch, with_tracks)
            heads = HEADS if batch.queries is None else (*HEADS, 'tracks')
            try:
                return batch, self._network(batch, heads)
            except torch.cuda.OutOfMemoryError:
                self._counts['out_of_memory'] += 1
                saved = self._network.save_memory()
                if not saved and len(batch.ids) // 2 < _MIN_WINDOW:
                    raise
            # outside of the handler, whose traceback keeps the tensors of the attempt alive
            torch.cuda.empty_cache()
            if saved:
                logger.warning('the device is out of memory: %s', saved)
                continue
            logger.warning(
                'the device is out of memory with %d frames; windows have %d from now on',
                *(len(batch.ids), len(batch.ids) // 2),
            )
            self._sliding_window.shrink(len(batch.ids) // 2)
            batch = self._map.halve(batch)


class _Stopwatch:
    """Seconds spent in each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, step: str) -> None:
        now = perf_counter()
        self.seconds[step] = now - self._last
        self._last = now
