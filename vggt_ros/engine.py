# SPDX-License-Identifier: Apache-2.0
"""The pipeline as one readable function: a frame goes in, an update of the map comes out.

    frame -> SlidingWindow -> preprocess -> network -> reconstruct -> align -> measure scale
          -> MapUpdate

The engine knows neither threads nor ROS. One thread at a time may call it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import Batch, PreprocessedImage, fit_frames, preprocess
from vggt_ros.frames.rectifier import Rectifier, use_as_rectified
from vggt_ros.frames.resize import choose_resize
from vggt_ros.frames.sliding_window import SlidingWindow, Window
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.inference.network import Network
from vggt_ros.mapping.covariance import PoseCovariance
from vggt_ros.mapping.intrinsics import IntrinsicsEstimator
from vggt_ros.mapping.loop_closure import LoopCloser
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.metric_scale import ScaleEstimator, ScaleSource
from vggt_ros.mapping.point_tracker import PointTracker
from vggt_ros.mapping.reconstruction import PredictionError, Reconstruction, reconstruct
from vggt_ros.mapping.registration import RegisteredFrames, Registration, register, register_frames
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

HEADS = ('camera', 'depth')  # the point head is left out: unprojected depth is more accurate
_SMALLEST_WINDOW = 2  # frames; one has no second to see depth with

# All of an engine that changes from window to window.
_STATE = (
    '_sliding',
    '_scale',
    '_intrinsics',
    '_uncertainty',
    '_loops',
    '_tracks',
    '_placed',
    '_confidence',
    '_map_id',
    '_restart_because',
    '_newest_id',
    '_events',
)

logger = logging.getLogger(__name__)


class StreamingEngine:
    """The map so far, and what is kept of the frames in the window."""

    def __init__(
        self, settings: Settings, network: Network, scale_source: ScaleSource | None = None
    ) -> None:
        """
        Begin an empty map.

        :param scale_source: what knows metres, if `scale_source` asks for something.
        :raises ValueError: if it asks for something that is not there, or loops for GTSAM, or if
            the network cannot run as the settings ask.
        """
        self._settings = settings = network.prepare(settings)
        self._network = network
        self._sliding = SlidingWindow(settings.window)
        self._scale = ScaleEstimator(settings.scale, scale_source)
        self._width = settings.model.resolution or network.image_width
        camera = settings.camera
        self._resize = choose_resize(network.device, settings.model.fast_resize)
        self._as_pinhole = (
            Rectifier(math.radians(camera.rectified_field_of_view)).rectify
            if camera.rectify
            else use_as_rectified
        )
        self._intrinsics = IntrinsicsEstimator(camera)
        self._uncertainty = PoseCovariance()
        closes_loops = settings.registration.loop_closure
        self._loops = LoopCloser(settings.registration, network) if closes_loops else None
        self._tracks = self._make_tracks()
        # Asked at each window, in the thread that calls `add`: tracks cost time.
        self.wants_tracks: Callable[[], bool] = lambda: True
        self._fitted: dict[int, PreprocessedImage] = {}
        self._works_ahead = True
        self._placed: RegisteredFrames | None = None
        self._confidence: dict[int, float | None] = {}  # mean, by frame of the last window
        self._map_id = -1
        self._restart_because = ''  # a new map that a rejected window should have started
        self._newest_id = -1  # the newest frame that was part of an update
        self._events: Counter[str] = Counter()

    def _make_tracks(self) -> PointTracker | None:
        points, trained = self._settings.tracks.track_points, self._network.tracks_trained
        if not points:
            return None
        if not trained:
            logger.warning(
                'track_points is %d, but the track head of the network %s is UNTRAINED: its '
                'tracks mean nothing',
                points,
                self._network.name,
            )
        return PointTracker(points, self._settings.cloud.min_confidence, trained)

    @property
    def window_size(self) -> int:
        """Moments in a window; less than the setting where memory does not suffice for it."""
        return self._sliding.size

    @property
    def window_stride(self) -> int:
        """New moments between two windows; may be less than the setting, as `window_size`."""
        return self._sliding.stride

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far: images by fate, windows, maps, failures."""
        told = Counter(
            rejected_scales=self._scale.refused,
            focal_length_disagreements=self._intrinsics.disagreements,
        )
        loops = Counter[str]() if self._loops is None else self._loops.counts
        return dict(self._sliding.counts + self._events + told + loops)

    def reset(self, reason: str) -> None:
        """Forget the frames in the window; the next one starts a new map."""
        self._sliding.reset(reason)

    def add(
        self, moment: Frame | Sequence[Frame], dropped_stamps_ns: Sequence[int] = ()
    ) -> MapUpdate | None:
        """
        Take the next frame, or those that several cameras took together.

        :param dropped_stamps_ns: stamps of moments received before this one but left out.
        :returns: an update of the map if this moment completes a window.
        :raises PredictionError: if the network's output for that window cannot be geometry. The
            window is lost, the engine goes on.
        """
        window = self._sliding.add(moment, dropped_stamps_ns)
        return None if window is None else self._process(window)

    def work_ahead(self) -> None:
        """
        Prepare and encode the frames that wait for their window to be complete.

        To be called while nothing else is to be done: no result changes, but the next one comes
        sooner.
        """
        if not self._works_ahead:
            return
        model = self._settings.model
        waiting = self._sliding.candidates
        fit_frames(waiting, self._width, model.fit, self._as_pinhole, self._fitted, self._resize)
        if len({image.pixels.shape for image in self._fitted.values()}) != 1:
            return  # images of several sizes get a common one when the window is complete
        try:
            self._network.encode_ahead(self._fitted)
            return
        except torch.cuda.OutOfMemoryError:
            self._events['out_of_memory'] += 1
            self._works_ahead = False
        # outside of the handler, as in `_predict`; the frames are encoded with their window
        torch.cuda.empty_cache()
        logger.warning(
            'the device is out of memory: frames are encoded when their window is complete from '
            'now on'
        )

    def finish(self) -> MapUpdate | None:
        """
        Take what waits for a window when no more moments will come.

        :raises PredictionError: as `add` does.
        """
        window = self._sliding.finish()
        return None if window is None else self._process(window)

    def state(self) -> dict[str, Any]:
        """Give all that `restore` needs to go on from here; it is shared, not copied."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """
        Go on where another engine of the same settings was.

        :param state: its `state`, perhaps from a file; it belongs to this engine from now on.
        """
        for name in _STATE:
            setattr(self, name, state[name])

    def _process(self, window: Window) -> MapUpdate:
        self._events['windows'] += 1
        if window.starts_map:
            self._placed = None
        stopwatch = _Stopwatch()
        batch = preprocess(
            window,
            self._width,
            self._settings.model.fit,
            self._as_pinhole,
            self._fitted,
            self._resize,
        )
        stopwatch.lap('preprocess')
        batch, prediction = self._predict(batch)
        stopwatch.lap('inference')
        try:
            reconstruction = reconstruct(prediction, batch)
            intrinsics = self._intrinsics.choose(reconstruction.intrinsics, batch)
            reconstruction = replace(reconstruction, intrinsics=intrinsics)
        except PredictionError:
            self._events['rejected_windows'] += 1
            self._restart_because = self._restart_because or window.starts_map
            raise
        stopwatch.lap('reconstruct')
        registration = register(
            batch.ids,
            reconstruction,
            self._placed,
            self._settings.registration.max_registration_residual,
        )
        stopwatch.lap('align')
        return self._place(
            window, batch, prediction, reconstruction, registration, stopwatch.seconds
        )

    def _predict(self, batch: Batch) -> tuple[Batch, Prediction]:
        """
        Run the network.

        Where the device's memory does not suffice, the network is to take less of it, and if it
        cannot, windows are halved.
        """
        while True:
            batch = self._ask(batch)
            try:
                return batch, self._network(
                    batch, HEADS if batch.queries is None else (*HEADS, 'tracks')
                )
            except torch.cuda.OutOfMemoryError:
                self._events['out_of_memory'] += 1
                half = len(batch.ids) // 2
                saved = self._network.save_memory()
                if not saved and half < _SMALLEST_WINDOW:
                    raise
            # outside of the handler, whose traceback keeps the tensors of the attempt alive
            torch.cuda.empty_cache()
            if saved:
                logger.warning('the device is out of memory: %s', saved)
                continue
            logger.warning(
                'the device is out of memory with %d frames; windows have %d from now on',
                len(batch.ids),
                half,
            )
            self._sliding.shrink(half)
            batch = batch.select(self._choose_half(batch.ids, half))

    def _ask(self, batch: Batch) -> Batch:
        """Say of which frames the depth is wanted, and which points are to be followed."""
        queries = None
        if self._tracks is not None and self.wants_tracks():
            queries = self._tracks.ask(batch)
        return replace(batch, dense=self._choose_dense(batch.ids), queries=queries)

    def _choose_dense(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Choose frames for depth: those that lie in no map yet, and some that do, spread out."""
        placed = () if self._placed is None else self._placed.frames
        shared = [i for i, number in enumerate(ids) if number in placed]
        wanted = self._settings.registration.shared_depth_frames(len(shared))
        spread = {shared[round(at)] for at in np.linspace(0, len(shared) - 1, wanted)}
        return tuple(i for i, number in enumerate(ids) if number not in placed or i in spread)

    def _choose_half(self, ids: tuple[int, ...], half: int) -> list[int]:
        """Choose the newest frames, but keep one that lies in the map already, to join it by."""
        newest = list(range(len(ids) - half, len(ids)))
        placed = () if self._placed is None else self._placed.frames
        shared = [i for i, number in enumerate(ids) if number in placed]
        if shared and shared[-1] < newest[0]:
            newest[0] = shared[-1]
        return newest

    def _place(
        self,
        window: Window,
        batch: Batch,
        prediction: Prediction,
        reconstruction: Reconstruction,
        registration: Registration,
        seconds: dict[str, float],
    ) -> MapUpdate:
        """Continue the map with this window, or declare a new one."""
        map_start_reason = self._restart_because or window.starts_map
        if not map_start_reason and not registration.trusted:
            map_start_reason = registration.note
            self._events['rejected_registrations'] += 1
        self._events['held_scales'] += registration.scale_held
        if map_start_reason:
            self._placed = None
            registration = replace(registration, map_from_window=Sim3())
            self._map_id += 1
            self._events['maps'] += 1
            self._scale.start_map()
            self._uncertainty.start_map()
            if self._loops is not None:
                self._loops.start_map()
            logger.info('map %d starts: %s', self._map_id, map_start_reason)
        told = {batch.ids[i]: float(c.mean()) for i, c in reconstruction.confidence.items()}
        self._confidence = {n: told.get(n, self._confidence.get(n)) for n in batch.ids}
        confidence = np.array(list(self._confidence.values()), float)
        if self._placed is not None:
            shared = [number in self._placed.frames for number in batch.ids]
            self._uncertainty.join(registration, float(confidence[shared].mean()))
        is_new = tuple(number > self._newest_id for number in batch.ids)
        self._newest_id = batch.ids[-1]
        placed = register_frames(
            batch.ids, reconstruction, registration.map_from_window, self._placed, window.anchor
        )
        closure = None
        if self._loops is not None:
            descriptors = None if prediction.descriptors is None else prediction.descriptors[0]
            closure = self._loops.add(
                batch, placed, reconstruction.intrinsics, descriptors, registration
            )
        if closure is not None:
            moved = closure.corrections[window.window_id]
            place = moved @ registration.map_from_window
            registration = replace(registration, map_from_window=place)
            placed = placed.moved(moved)
            self._scale.correct(closure.corrections)
        self._placed = placed
        self._restart_because = ''
        metric = self._scale.update(batch, reconstruction, registration.map_from_window)
        centres = registration.map_from_window.apply(reconstruction.window_from_camera[:, :3, 3])
        covariance = self._uncertainty.covariance(centres, confidence, metric.spread)
        tracks = None
        if self._tracks is not None:
            starts = bool(map_start_reason)
            tracks = self._tracks.take(batch, prediction, reconstruction.confidence, starts)
        return MapUpdate(
            map_id=self._map_id,
            map_start_reason=map_start_reason,
            window_id=window.window_id,
            skipped=window.skipped,
            batch=batch,
            is_new=is_new,
            reconstruction=reconstruction,
            confidence=confidence,
            registration=registration,
            closure=closure,
            metric=metric,
            map_covariance=covariance,
            model=self._network.name,
            model_trained=self._network.trained,
            tracks=tracks,
            seconds=seconds,
            settings=self._settings.cloud,
        )


class _Stopwatch:
    """Seconds spent in each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, step: str) -> None:
        now = perf_counter()
        self.seconds[step] = now - self._last
        self._last = now
