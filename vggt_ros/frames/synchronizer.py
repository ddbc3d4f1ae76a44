# SPDX-License-Identifier: Apache-2.0
"""
Images of several cameras become moments: those that were taken at nearly the same time.

As the approximate policy of ROS's message_filters, images are matched by their stamps, each is
used once, and cameras need no common trigger. Beyond that a camera that falls silent holds nobody
up: after a while the others go on without it, and it takes part again with its next image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Stamped(Protocol):
    """Anything with a time of acquisition."""

    @property
    def stamp_ns(self) -> int:
        """Nanoseconds."""
        ...


T = TypeVar('T', bound=Stamped)


class Synchronizer(Generic[T]):
    """The images that wait for their companions, camera by camera."""

    def __init__(
        self,
        cameras: int,
        slop: float,
        patience: float,
        report_silent: Callable[[int, float], None],
        report_unmatched: Callable[[int], None],
    ) -> None:
        """
        Begin with cameras of which nothing is known yet; each is waited for.

        :param slop: s by which stamps of one moment may differ.
        :param patience: s, by the stamps of the others, after which a camera counts as silent.
        :param report_silent: takes a camera that fell silent and for how many seconds it has been.
        :param report_unmatched: takes the camera of each image that no moment has a use for.
        """
        self._slop_ns, self._patience_ns = round(slop * 1e9), round(patience * 1e9)
        self._say_silent, self._say_unmatched = report_silent, report_unmatched
        self._waiting: list[deque[T]] = [deque() for _ in range(cameras)]
        self._newest_ns: list[int | None] = [None] * cameras
        self._first_ns: int | None = None  # of any camera
        self._silent: set[int] = set()

    def add(self, camera: int, image: T) -> list[dict[int, T]]:
        """
        Take the next image of a camera.

        :returns: the moments that are complete now, oldest first: an image by camera.
        """
        before = self._newest_ns[camera]
        if before is not None and image.stamp_ns < before:  # time began anew
            self.clear()
        self._silent.discard(camera)
        self._newest_ns[camera] = image.stamp_ns
        if self._first_ns is None:
            self._first_ns = image.stamp_ns
        self._waiting[camera].append(image)
        self._find_silent(image.stamp_ns)
        moments = []
        while moment := self._match():
            moments.append(moment)
        return moments

    def clear(self) -> None:
        """Forget all images, and when the cameras were heard."""
        for waiting in self._waiting:
            waiting.clear()
        self._newest_ns = [None] * len(self._waiting)
        self._first_ns = None
        self._silent.clear()

    def _find_silent(self, now_ns: int) -> None:
        for camera, newest in enumerate(self._newest_ns):
            since = newest if newest is not None else self._first_ns
            assert since is not None  # an image has just come
            if camera not in self._silent and now_ns - since > self._patience_ns:
                self._silent.add(camera)
                self._say_silent(camera, (now_ns - since) * 1e-9)

    def _match(self) -> dict[int, T] | None:
        """Take the oldest moment out of what waits; None if it is not complete."""
        while True:
            needed = [i for i in range(len(self._waiting)) if i not in self._silent]
            heads = {i: waiting[0] for i, waiting in enumerate(self._waiting) if waiting}
            if not needed or any(i not in heads for i in needed):
                return None
            # The latest of the oldest images decides: nothing earlier can be complete.
            pivot = max(heads[i].stamp_ns for i in needed)
            late = False
            for camera in heads:
                late |= not self._advance(camera, pivot)
            if late:
                return None
            heads = {i: waiting[0] for i, waiting in enumerate(self._waiting) if waiting}
            close = [i for i in heads if abs(heads[i].stamp_ns - pivot) <= self._slop_ns]
            if set(needed) <= set(close):
                return {i: self._waiting[i].popleft() for i in sorted(close)}

    def _advance(self, camera: int, pivot: int) -> bool:
        """
        Drop images of a camera that are older than another one which is nearer to the pivot.

        :returns: False if what is left is too old and the next one has not come.
        """
        waiting = self._waiting[camera]
        while len(waiting) > 1 and abs(waiting[1].stamp_ns - pivot) <= abs(
            waiting[0].stamp_ns - pivot
        ):
            waiting.popleft()
            self._say_unmatched(camera)
        if pivot - waiting[0].stamp_ns > self._slop_ns:
            waiting.popleft()
            self._say_unmatched(camera)
            return bool(waiting) or camera in self._silent
        return True
