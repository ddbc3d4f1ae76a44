# SPDX-License-Identifier: Apache-2.0
"""
Images of several cameras become frame sets: those with nearly the same stamp.

Like ApproximateTime of ROS's message_filters, images are matched by their stamps, each is used
once, and the cameras need no common trigger. Unlike it, a silent camera does not block the
others: after a timeout they continue without it, and it is used again with its next image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Stamped(Protocol):
    """Anything with an acquisition time."""

    @property
    def stamp_ns(self) -> int:
        """Nanoseconds."""
        ...


T = TypeVar('T', bound=Stamped)


class Synchronizer(Generic[T]):
    """The images of each camera that wait for those of the others."""

    def __init__(
        self,
        cameras: int,
        slop: float,
        timeout: float,
        report_silent: Callable[[int, float], None],
        report_unmatched: Callable[[int], None],
    ) -> None:
        """
        Wait for the first image of every camera.

        :param slop: s by which the stamps of a frame set may differ.
        :param timeout: s, by the stamps of the others, after which a camera counts as silent.
        :param report_silent: called with a camera that became silent, and for how many seconds.
        :param report_unmatched: called with the camera of each image that matches no frame set.
        """
        self._slop_ns, self._timeout_ns = round(slop * 1e9), round(timeout * 1e9)
        self._report_silent, self._report_unmatched = report_silent, report_unmatched
        self._waiting: list[deque[T]] = [deque() for _ in range(cameras)]
        self._newest_ns: list[int | None] = [None] * cameras
        self._first_ns: int | None = None  # of any camera
        self._silent: set[int] = set()

    def add(self, camera: int, image: T) -> list[dict[int, T]]:
        """
        Add the next image of a camera.

        :returns: the frame sets that are complete now, oldest first: an image by camera.
        """
        before = self._newest_ns[camera]
        if before is not None and image.stamp_ns < before:  # time restarted
            self.clear()
        self._silent.discard(camera)
        self._newest_ns[camera] = image.stamp_ns
        if self._first_ns is None:
            self._first_ns = image.stamp_ns
        self._waiting[camera].append(image)
        self._check_silence(image.stamp_ns)
        frame_sets = []
        while frame_set := self._match():
            frame_sets.append(frame_set)
        return frame_sets

    def clear(self) -> None:
        """Forget all images and the state of the cameras."""
        for waiting in self._waiting:
            waiting.clear()
        self._newest_ns = [None] * len(self._waiting)
        self._first_ns = None
        self._silent.clear()

    def _check_silence(self, now_ns: int) -> None:
        for camera, newest in enumerate(self._newest_ns):
            since = newest if newest is not None else self._first_ns
            assert since is not None  # an image has just come
            if camera not in self._silent and now_ns - since > self._timeout_ns:
                self._silent.add(camera)
                self._report_silent(camera, (now_ns - since) * 1e-9)

    def _match(self) -> dict[int, T] | None:
        """Remove and return the oldest complete frame set; None if there is none."""
        while True:
            needed = [i for i in range(len(self._waiting)) if i not in self._silent]
            heads = {i: waiting[0] for i, waiting in enumerate(self._waiting) if waiting}
            if not needed or any(i not in heads for i in needed):
                return None
            # The latest of the oldest images is the pivot: nothing earlier can be complete.
            pivot = max(heads[i].stamp_ns for i in needed)
            late = False
            for camera in heads:
                late |= not self._drop_older(camera, pivot)
            if late:
                return None
            heads = {i: waiting[0] for i, waiting in enumerate(self._waiting) if waiting}
            close = [i for i in heads if abs(heads[i].stamp_ns - pivot) <= self._slop_ns]
            if set(needed) <= set(close):
                return {i: self._waiting[i].popleft() for i in sorted(close)}

    def _drop_older(self, camera: int, pivot: int) -> bool:
        """
        Drop images of a camera that are older than its image nearest to the pivot.

        :returns: False if the remaining image is too old and the next one has not arrived.
        """
        waiting = self._waiting[camera]
        while len(waiting) > 1 and abs(waiting[1].stamp_ns - pivot) <= abs(
            waiting[0].stamp_ns - pivot
        ):
            waiting.popleft()
            self._report_unmatched(camera)
        if pivot - waiting[0].stamp_ns > self._slop_ns:
            waiting.popleft()
            self._report_unmatched(camera)
            return bool(waiting) or camera in self._silent
        return True
