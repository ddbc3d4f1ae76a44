# SPDX-License-Identifier: Apache-2.0
"""Frames become overlapping windows.

`SlidingWindow` takes frames in the order of their arrival, leaves out copies (a standing camera)
and hands out a `Window` whenever `window_stride` new frames have come and the window is full.
With `anchor_windows` the first moment of a window, the anchor, stays first in the next ones.
Where several cameras look at the same time, their frames come together, as one moment, and sizes
count moments; a camera may be missing in some. It judges whether the stream continues: where it
does not, the next window starts a new map and says why. It never drops a frame that belongs to a
window; thinning under load happens before (`ros/worker.py`), and is told to it by the stamps of
the frames left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Frame
from vggt_ros.settings import WindowSettings

# pixels; at 320 it costs four times as much, and the median differs by up to 15 %: frames near
# the limit may be judged otherwise
_FLOW_WIDTH = 160
_CORNERS, _SPACING = 64, 8  # at most so many, at least so many pixels apart
_FLOW_PATCH = (11, 11)  # pixels, that is followed of each
_FLOW_ENDS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 10, 0.03)  # steps, pixels
_SAME_PICTURE = 1.0  # mean difference of two views of the same thing by sensor noise, grey levels
_MIN_CORNERS = 8  # with fewer corners followed, the flow says nothing


_Moments = list[list[tuple[int, Frame]]]  # each of some numbered frames


@dataclass(frozen=True, slots=True)
class Window:
    """The frames that the network sees together, oldest moment first, there the first camera."""

    window_id: int  # counts the windows handed out
    frames: tuple[Frame, ...]  # S frames
    ids: tuple[int, ...]  # S numbers, one for each accepted frame, rising over the whole stream
    skipped: int  # moments received since the last window that did not become part of one
    starts_map: str  # why a new map begins with this window, '' if the old one goes on
    anchor: tuple[int, ...] = ()  # of `ids`: the moment that windows keep, () without anchors


class SlidingWindow:
    """The frames waiting to become a window."""

    def __init__(self, settings: WindowSettings) -> None:
        self.size = settings.window_size
        self.stride = settings.window_stride
        self.counts: Counter[str] = Counter()  # images received, and left out by cause
        self._anchor_windows = settings.anchor_windows
        self._min_parallax = settings.min_parallax
        self._max_gap_ns = round(settings.max_stamp_gap * 1e9)
        self._moments: _Moments = []
        self._anchor: list[tuple[int, Frame]] = []  # a moment, [] before the first window
        self._anchored = 0  # windows that began with it
        self._waiting = 0  # how many of the newest moments have not been in a window
        self._next_id = 0
        self._next_window = 0
        self._last_stamp_ns: int | None = None
        self._skipped = 0
        self._starts_map = 'first window'
        # The last accepted frame of each camera, small and grey.
        self._views: dict[int, npt.NDArray[np.uint8]] = {}

    @property
    def candidates(self) -> dict[int, Frame]:
        """Frames that came already of the next window, by number, if the stream goes on."""
        kept = max(self.size - self._missing, 0)
        moments = [self._anchor, *self._moments[max(len(self._moments) - kept, 0) :]]
        return {number: frame for moment in moments for number, frame in moment}

    def add(
        self, moment: Frame | Sequence[Frame], dropped_stamps_ns: Sequence[int] = ()
    ) -> Window | None:
        """
        Take the next frame, or those that several cameras took together.

        :param moment: of several frames, the stamp of the first is that of all.
        :param dropped_stamps_ns: stamps of moments that were received after the last one but
            left out before they got here; the stream is judged with them.
        :returns: a window if this moment completes one.
        """
        frames = (moment,) if isinstance(moment, Frame) else tuple(moment)
        frame = frames[0]
        self.counts['received'] += 1 + len(dropped_stamps_ns)
        self.counts['dropped'] += len(dropped_stamps_ns)
        self._skipped += len(dropped_stamps_ns)
        if self._last_stamp_ns == frame.stamp_ns or frame.stamp_ns in dropped_stamps_ns:
            self._leave_out('duplicate_stamp')
            return None
        broken = self._find_break(frames, dropped_stamps_ns)
        if broken:
            self.reset(broken)
        self._last_stamp_ns = frame.stamp_ns
        if self._min_parallax > 0:
            views = {each.camera: _shrink(each.image) for each in frames}
            if not self._has_moved(views):
                self._leave_out('no_parallax')
                return None
            self._views.update(views)
        numbers = range(self._next_id, self._next_id + len(frames))
        self._moments.append(list(zip(numbers, frames)))
        self._next_id += len(frames)
        self._waiting += 1
        del self._moments[: -self.size]
        return self._complete()

    def _has_moved(self, views: dict[int, npt.NDArray[np.uint8]]) -> bool:
        """Say whether any camera sees something else than in its last accepted frame."""
        return any(
            camera not in self._views
            or median_flow(self._views[camera], view) >= self._min_parallax
            for camera, view in views.items()
        )

    def reset(self, reason: str) -> None:
        """Forget the frames; the next window starts a new map for this reason."""
        self._moments.clear()
        self._anchor = []
        self._waiting = 0
        self._views.clear()
        self._last_stamp_ns = None
        self._starts_map = reason

    def finish(self) -> Window | None:
        """Hand out what waits when nothing more will come, if two moments are there."""
        if not self._waiting or len(self._moments) < 2:
            return None
        return self._hand_out()

    def shrink(self, size: int) -> None:
        """
        Go on with smaller windows, after the device ran out of memory.

        :param size: frames, of all cameras; at least two moments are kept.
        """
        self.size = max(size // max(map(len, self._moments), default=1), 2)
        self.stride = min(self.stride, self.size - 1)
        del self._moments[: -self.size]

    def _leave_out(self, cause: str) -> None:
        self.counts[cause] += 1
        self._skipped += 1

    def _find_break(self, frames: tuple[Frame, ...], dropped_stamps_ns: Sequence[int]) -> str:
        """Say why this moment does not continue the stream, '' if it does."""
        if self._last_stamp_ns is None:
            return ''
        stamps = (self._last_stamp_ns, *dropped_stamps_ns, frames[0].stamp_ns)
        steps = [later - earlier for earlier, later in pairwise(stamps)]
        if min(steps) < 0:
            return f'stamps ran backwards by {-min(steps) * 1e-9:.3f} s'
        if max(steps) > self._max_gap_ns:
            return f'stamps jumped forwards by {max(steps) * 1e-9:.3f} s'
        before = {frame.camera: frame for moment in self._moments for _, frame in moment}
        changes = (_find_change(before.get(frame.camera, frame), frame) for frame in frames)
        return next((change for change in changes if change), '')

    @property
    def _missing(self) -> int:
        """Moments that must come until the next window is complete."""
        fresh = bool(self._starts_map)  # a new map begins with a whole window of new frames
        wanted = self.size if fresh else self.stride
        return max(self.size - len(self._moments), wanted - self._waiting, 0)

    def _complete(self) -> Window | None:
        return None if self._missing else self._hand_out()

    def _hand_out(self) -> Window:
        moments = self._keep_anchor(self._moments)
        ids, frames = zip(*(numbered for moment in moments for numbered in moment))
        window = Window(
            window_id=self._next_window,
            frames=frames,
            ids=ids,
            skipped=self._skipped,
            starts_map=self._starts_map,
            anchor=tuple(number for number, _ in self._anchor),
        )
        self._next_window += 1
        self._waiting = 0
        self._skipped = 0
        self._starts_map = ''
        return window

    def _keep_anchor(self, moments: _Moments) -> _Moments:
        """Put the anchor in the place of the oldest moment; that one becomes it after its time."""
        if self._anchor_windows < 2:
            return moments
        if not self._anchor or self._anchored >= self._anchor_windows:
            self._anchor, self._anchored = moments[0], 0
        self._anchored += 1
        return [self._anchor, *moments[1:]]


def _find_change(last: Frame, frame: Frame) -> str:
    """Say how the images of a camera have changed, '' if they have not."""
    if frame.image.shape != last.image.shape:
        (height, width), (was_height, was_width) = frame.image.shape[:2], last.image.shape[:2]
        return f'images changed from {was_width}x{was_height} to {width}x{height} pixels'
    if frame.camera_frame != last.camera_frame:
        return f"camera frame changed from '{last.camera_frame}' to '{frame.camera_frame}'"
    return ''


def _shrink(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = image.shape[:2]
    small = (_FLOW_WIDTH, max(round(height * _FLOW_WIDTH / width), 1))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # first: one channel is resized faster
    return cv2.resize(grey, small, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def median_flow(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> float:
    """
    Measure how far the picture moved: the median length of sparse Lucas-Kanade flow.

    :param before: (h, w) grey image.
    :param after: (h, w) grey image.
    :returns: the length as a share of the width; infinity where too little can be followed (a
        bare wall, a sudden change), so that such a frame is taken rather than lost.
    """
    if cv2.norm(before, after, cv2.NORM_L1) < _SAME_PICTURE * before.size:
        return 0.0
    corners = cv2.goodFeaturesToTrack(before, _CORNERS, 0.01, _SPACING)
    if corners is None or len(corners) < _MIN_CORNERS:
        return float('inf')
    moved, found, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]
        before, after, corners, None, winSize=_FLOW_PATCH, criteria=_FLOW_ENDS
    )
    followed = found.ravel() == 1
    if followed.sum() < _MIN_CORNERS:
        return float('inf')
    lengths = np.linalg.norm(moved[followed] - corners[followed], axis=-1)
    return float(np.median(lengths)) / before.shape[1]
