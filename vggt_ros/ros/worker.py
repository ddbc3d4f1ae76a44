# SPDX-License-Identifier: Apache-2.0
"""
The thread that thinks, so that the executor never waits for the network.

Images wait as messages in a short buffer; the thread decodes one, hands it to the engine and
publishes what comes out. While none waits, the engine works ahead. If images come faster than
windows are computed, the buffer is dropped: the image goes whose absence leaves the others most
evenly spread in time. The engine is told the stamps of those left out. Only images are dropped,
never windows: a window, once complete, is computed.

This is the one place of the node that catches failures: each is logged once, counted, and the
next image goes on.
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReceivedImage:
    """An image message that has not been decoded yet."""

    message: Any  # sensor_msgs/Image or CompressedImage
    stamp_ns: int  # acquisition time
    arrived: float  # time.monotonic() in the callback
    calibration: Calibration | None
    camera: int = 0


@dataclass(frozen=True)
class ReceivedFrameSet:
    """Images that several cameras took together, or one alone."""

    images: tuple[ReceivedImage, ...]

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the first."""
        return self.images[0].stamp_ns

    @property
    def arrived(self) -> float:
        """When the last one came, time.monotonic()."""
        return max(image.arrived for image in self.images)


class InferenceWorker:
    """One thread and the images waiting for it."""

    def __init__(
        self,
        engine: StreamingEngine,
        decode: Callable[[ReceivedFrameSet], Sequence[Frame]],
        publish: Callable[[MapUpdate, ReceivedFrameSet], None],
        capacity: int,
        counts: Counter[str],
        complain: Callable[[str, str], None],
        wants_tracks: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Prepare the worker; `start` starts it.

        :param decode: raises ImageError where no image can be used.
        :param publish: called in the thread, with the images that completed the window.
        :param capacity: moments that may wait: as many as a window takes.
        :param counts: what happens is counted here.
        :param complain: takes the kind of a failure and a sentence about it.
        """
        self.engine_counts = engine.counts  # a copy, replaced as a whole: safe to read
        self._counts = counts
        self._engine = engine
        self._decode = decode
        self._publish = publish
        self._complain = complain
        self._wants_tracks = wants_tracks
        self._capacity = capacity
        self._waiting: list[ReceivedFrameSet] = []
        self._left_out: list[ReceivedFrameSet] = []  # until one that came later is taken
        self._unseen_ns: list[int] = []  # left out before an image that could not be decoded
        self._last_taken_ns: int | None = None
        self._reset_reason = ''
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name='vggt_worker', daemon=True)

    @property
    def waiting(self) -> int:
        """Moments that wait now."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """
        Ask the thread to end after the window that it computes; nothing more is published.

        :param timeout: seconds to wait for it; None: as long as it takes.
        :returns: True if the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def offer(self, moment: ReceivedFrameSet) -> None:
        """Take images; returns at once."""
        with self._changed:
            self._waiting.append(moment)
            if len(self._waiting) > self._capacity:
                stamps = [waiting.stamp_ns for waiting in self._waiting]
                self._left_out.append(
                    self._waiting.pop(choose_left_out(self._last_taken_ns, stamps))
                )
                self._counts['dropped'] += 1
            self._changed.notify()

    def reset(self, reason: str) -> None:
        """Start a new map with the next image that arrives; images waiting are given up."""
        with self._changed:
            self._counts['given_up_at_reset'] += len(self._waiting)
            self._waiting.clear()
            self._left_out.clear()
            self._reset_reason = reason

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                moment, skipped_ns, reset_reason = self._take()
            if reset_reason:
                self._engine.reset(reset_reason)
            self._process(moment, skipped_ns)
            self.engine_counts = self._engine.counts

    def _take(self) -> tuple[ReceivedFrameSet, list[int], str]:
        moment = self._waiting.pop(0)
        self._last_taken_ns = moment.stamp_ns
        earlier = [other for other in self._left_out if other.arrived < moment.arrived]
        self._left_out = [other for other in self._left_out if other.arrived > moment.arrived]
        earlier.sort(key=lambda other: other.arrived)
        reset_reason, self._reset_reason = self._reset_reason, ''
        return moment, [other.stamp_ns for other in earlier], reset_reason

    def _process(self, moment: ReceivedFrameSet, skipped_ns: list[int]) -> None:
        try:
            update = self._engine.add(
                self._decode(moment),
                self._unseen_ns + skipped_ns,
                with_tracks=self._wants_tracks(),
            )
            self._unseen_ns = []
            if update is not None and not self._stopping:
                self._publish(update, moment)
            if not self._waiting and not self._stopping:
                self._engine.encode_ahead()
        except ImageError as error:
            # the engine has not seen these: it judges with the next image that can be decoded
            self._unseen_ns += skipped_ns
            kind = f'bad_image_{error.cause}'
            self._counts[kind] += 1
            self._complain(kind, f'an image is left out: {error}')
        except PredictionError as error:
            self._unseen_ns = []
            self._complain('rejected_window', f'a window is rejected: {error}')
        except Exception as error:  # the thread must outlive whatever a model or a driver raises
            self._unseen_ns = []
            kind = type(error).__name__
            self._counts['failures'] += 1
            logger.debug('the failure in full', exc_info=True)
            self._complain(kind, f'an image or a window is lost: {kind}: {error}')


def choose_left_out(before_ns: int | None, stamps_ns: Sequence[int]) -> int:
    """
    Choose the image to leave out: the one whose absence leaves the smallest hole in time.

    Repeated as images arrive, this keeps the gaps within a factor of about two of each other. The
    newest image stays, since there is no gap after it yet.

    :param before_ns: stamp of the image before the first; None if there was none: the first stays.
    :param stamps_ns: at least two.
    :returns: an index into `stamps_ns`.
    """
    edge = stamps_ns[0] if before_ns is None else before_ns
    earlier = (edge, *stamps_ns[:-2])
    holes = [abs(after - before) for before, after in zip(earlier, stamps_ns[1:])]
    first = 1 if before_ns is None and len(holes) > 1 else 0
    return min(range(first, len(holes)), key=lambda i: holes[i])
