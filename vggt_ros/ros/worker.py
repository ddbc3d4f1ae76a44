# SPDX-License-Identifier: Apache-2.0
"""
The thread that runs the engine, so that the executor never waits for the network.

Images wait as messages in a short queue; the thread decodes one frame set, passes it to the engine
and publishes the update. While none waits, the engine encodes ahead. Under load frame sets are
dropped from the queue: the one whose absence leaves the others most evenly spaced in time. The
engine receives their stamps. Windows are never dropped: a complete one is computed.

Failures are caught here and nowhere else in the node: each is reported as a fault, and the next
frame set is processed.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.io.message_reading import ImageError
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.ros.faults import Faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedImage:
    """An image message that is not decoded yet."""

    message: Any  # ImageMessage or CompressedImageMessage, as its camera's intake subscribes
    stamp_ns: int  # acquisition time
    arrived: float  # time.monotonic() in the callback
    calibration: Calibration | None
    camera: int = 0  # index


@dataclass(frozen=True)
class ReceivedFrameSet:
    """The synchronized images of several cameras, or one image."""

    images: tuple[ReceivedImage, ...]

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the first image."""
        return self.images[0].stamp_ns

    @property
    def arrived(self) -> float:
        """Arrival of the last image, time.monotonic()."""
        return max(image.arrived for image in self.images)


class InferenceWorker:
    """One thread and its queue."""

    def __init__(
        self,
        engine: StreamingEngine,
        decode: Callable[[ReceivedImage], Frame],
        publish: Callable[[MapUpdate, ReceivedFrameSet], None],
        with_tracks: Callable[[], bool],
        capacity: int,
        counts: Counter[str],
        faults: Faults,
    ) -> None:
        """
        Prepare the worker; `start` starts it.

        :param decode: raises ImageError if an image cannot be decoded.
        :param publish: called in the thread, with the frame set that completed the window.
        :param with_tracks: returns whether the next window needs tracks.
        :param capacity: of the queue, frame sets: as many as a window needs.
        :param counts: `dropped` and `discarded_at_reset` are counted here.
        """
        self.engine_counts = engine.counts  # a copy, replaced as a whole: safe to read
        self._engine = engine
        self._decode = decode
        self._publish = publish
        self._with_tracks = with_tracks
        self._capacity = capacity
        self._counts = counts
        self._faults = faults
        self._queue: list[ReceivedFrameSet] = []
        self._dropped: list[ReceivedFrameSet] = []  # until one that arrived later is processed
        self._undelivered_ns: list[int] = []  # dropped before a frame set that was undecodable
        self._last_processed_ns: int | None = None
        self._reset_reason = ''
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name='vggt_worker', daemon=True)

    @property
    def waiting(self) -> int:
        """Frame sets in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """
        Stop the thread after the current window; nothing more is published.

        :param timeout: seconds to wait for it; None: as long as it takes.
        :returns: True if the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def push(self, frame_set: ReceivedFrameSet) -> None:
        """Add a frame set to the queue; returns at once."""
        with self._changed:
            self._queue.append(frame_set)
            if len(self._queue) > self._capacity:
                stamps = [waiting.stamp_ns for waiting in self._queue]
                index = choose_dropped(self._last_processed_ns, stamps)
                self._dropped.append(self._queue.pop(index))
                self._counts['dropped'] += 1
            self._changed.notify()

    def reset(self, reason: str) -> None:
        """Discard the queue; the next frame set that arrives starts a new map."""
        with self._changed:
            self._counts['discarded_at_reset'] += len(self._queue)
            self._queue.clear()
            self._dropped.clear()
            self._reset_reason = reason

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                frame_set, dropped_ns, reset_reason = self._pop()
            if reset_reason:
                self._engine.reset(reset_reason)
            self._process(frame_set, dropped_ns)
            self.engine_counts = self._engine.counts

    def _pop(self) -> tuple[ReceivedFrameSet, list[int], str]:
        """Return the oldest frame set, the stamps dropped before it and the reason of a reset."""
        frame_set = self._queue.pop(0)
        self._last_processed_ns = frame_set.stamp_ns
        earlier = [other for other in self._dropped if other.arrived < frame_set.arrived]
        self._dropped = [other for other in self._dropped if other.arrived > frame_set.arrived]
        earlier.sort(key=lambda other: other.arrived)
        reset_reason, self._reset_reason = self._reset_reason, ''
        return frame_set, [other.stamp_ns for other in earlier], reset_reason

    def _process(self, frame_set: ReceivedFrameSet, dropped_ns: list[int]) -> None:
        dropped_ns = self._undelivered_ns + dropped_ns
        self._undelivered_ns = []
        try:
            frames = self._decode_all(frame_set)
            if not frames:  # the engine judges gaps with the next frame set
                self._undelivered_ns = dropped_ns
                return
            update = self._engine.add(frames, dropped_ns, with_tracks=self._with_tracks())
            if update is not None and not self._stopping:
                self._publish(update, frame_set)
            if not self._queue and not self._stopping:
                self._engine.encode_ahead()
        except PredictionError as error:
            self._faults.report('rejected_windows', f'window rejected: {error}')
        except Exception as error:  # the thread must survive whatever a model or a driver raises
            logger.debug('traceback of the failure', exc_info=True)
            kind = type(error).__name__
            self._faults.report(f'failure_{kind}', f'frame or window lost: {kind}: {error}')

    def _decode_all(self, frame_set: ReceivedFrameSet) -> list[Frame]:
        """Decode a frame set without the images that cannot be decoded."""
        frames = []
        for image in frame_set.images:
            try:
                frames.append(self._decode(image))
            except ImageError as error:
                self._faults.report(f'bad_image_{error.cause}', f'image dropped: {error}')
        return frames


def choose_dropped(before_ns: int | None, stamps_ns: Sequence[int]) -> int:
    """
    Choose the image whose absence leaves the smallest gap in time.

    Repeated as images arrive, this keeps the gaps within a factor of about two of each other. The
    newest image stays, since there is no gap after it yet.

    :param before_ns: stamp of the image before the first; None if there was none: the first stays.
    :param stamps_ns: at least two.
    :returns: an index into `stamps_ns`.
    """
    edge = stamps_ns[0] if before_ns is None else before_ns
    earlier = (edge, *stamps_ns[:-2])
    gaps = [abs(after - before) for before, after in zip(earlier, stamps_ns[1:])]
    first = 1 if before_ns is None and len(gaps) > 1 else 0
    return min(range(first, len(gaps)), key=lambda i: gaps[i])
