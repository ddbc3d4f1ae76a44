# SPDX-License-Identifier: Apache-2.0
"""Frames become overlapping windows.

`SlidingWindow` takes frames in order of arrival, drops those without parallax (a stationary
camera) and returns a `Window` whenever `window_stride` new frames have come and the window is
full. With `anchor_windows` the first frame of a window, the anchor, stays first in the next ones.
The synchronized frames of several cameras come together, as one frame set; sizes count frame
sets, and a camera may be missing in some. `SlidingWindow` decides whether the stream continues:
after a break the next window starts a new map and says why. It never drops a frame that belongs
to a window; frames are dropped under load before they get here (`ros/worker.py`), and their
stamps are passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
_FLOW_PATCH = (11, 11)  # pixels, tracked around each corner
_FLOW_CRITERIA = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 10, 0.03)  # steps, pixels
_SENSOR_NOISE = 1.0  # mean absolute difference of two views of a static scene, grey levels
_MIN_CORNERS = 8  # with fewer tracked corners the flow is meaningless
_MIN_FRAME_SETS = 2  # of a window; a single one has no parallax to estimate depth from

GreyImage = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class NumberedFrame:
    """A frame that was accepted into the stream."""

    frame_id: int  # counts the accepted frames of the whole stream
    frame: Frame


FrameSet = tuple[NumberedFrame, ...]  # synchronized frames, one of each camera, first camera first


@dataclass(frozen=True, slots=True)
class Window:
    """The frames of one forward pass: oldest frame set first, in each the first camera first."""

    window_id: int  # counts the windows
    frames: tuple[Frame, ...]  # S frames
    ids: tuple[int, ...]  # S frame ids, one for each accepted frame, rising over the whole stream
    dropped: int  # frame sets received since the last window that are part of none
    map_start_reason: str  # why a new map starts with this window, '' if the map continues
    anchor: tuple[int, ...] = ()  # ids of the anchor's frames, () without anchors


@dataclass(slots=True)
class SlidingWindowState:
    """All of a sliding window that changes from frame to frame."""

    size: int  # frame sets in a window
    stride: int  # new frame sets between two windows
    frame_sets: list[FrameSet] = field(default_factory=list)  # the newest, oldest first
    anchor: FrameSet = ()  # () before the first window
    anchor_age: int = 0  # windows that began with the anchor
    new: int = 0  # how many of the newest frame sets have not been in a window
    next_frame_id: int = 0
    next_window_id: int = 0
    last_stamp_ns: int | None = None
    dropped: int = 0  # since the last window
    map_start_reason: str = 'first window'
    # The last accepted image of each camera, small and grey, to measure the flow from.
    views: dict[int, GreyImage] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # images received, and dropped by cause

    def __post_init__(self) -> None:
        ids = [each.frame_id for frame_set in self.frame_sets for each in frame_set]
        if not all(self.frame_sets) or ids != sorted(set(ids)) or min(ids, default=0) < 0:
            raise ValueError(f'frame ids {ids} of the window, expected rising ones in each set')
        newest, count = max(ids, default=-1), len(self.frame_sets)
        if newest >= self.next_frame_id or not 0 <= self.new <= count:
            raise ValueError(
                f'{count} frame sets up to id {newest}, {self.new} of them new, the next id '
                f'{self.next_frame_id}: they contradict each other'
            )


class SlidingWindow:
    """The frames waiting to become a window."""

    def __init__(self, settings: WindowSettings) -> None:
        self.state = SlidingWindowState(settings.window_size, settings.window_stride)
        self._anchor_windows = settings.anchor_windows
        self._min_parallax = settings.min_parallax
        self._max_gap_ns = round(settings.max_stamp_gap * 1e9)

    @property
    def next_frames(self) -> dict[int, Frame]:
        """The frames received so far of the next window, by id, if the stream continues."""
        state = self.state
        kept = max(state.size - self._missing(), 0)
        frame_sets = [state.anchor, *state.frame_sets[max(len(state.frame_sets) - kept, 0) :]]
        return {each.frame_id: each.frame for frame_set in frame_sets for each in frame_set}

    def add(
        self, frames: Frame | Sequence[Frame], dropped_stamps_ns: Sequence[int] = ()
    ) -> Window | None:
        """
        Add the next frame, or the synchronized frames of several cameras.

        :param frames: of several, the stamp of the first is that of all.
        :param dropped_stamps_ns: stamps of frame sets that were received after the last one but
            dropped before they got here; gaps in the stream are judged with them.
        :returns: a window if this frame set completes one.
        """
        state = self.state
        frames = (frames,) if isinstance(frames, Frame) else tuple(frames)
        stamp_ns = frames[0].stamp_ns
        self._count('received', 1 + len(dropped_stamps_ns))
        self._count('dropped', len(dropped_stamps_ns))
        state.dropped += len(dropped_stamps_ns)
        if state.last_stamp_ns == stamp_ns or stamp_ns in dropped_stamps_ns:
            self._drop('duplicate_stamp')
            return None
        interruption = self._find_interruption(frames, dropped_stamps_ns)
        if interruption:
            self.reset(interruption)
        state.last_stamp_ns = stamp_ns
        if self._min_parallax > 0:
            views = {frame.camera: _shrink(frame.image) for frame in frames}
            if not self._has_parallax(views):
                self._drop('no_parallax')
                return None
            state.views.update(views)
        state.frame_sets.append(
            tuple(NumberedFrame(state.next_frame_id + i, frame) for i, frame in enumerate(frames))
        )
        state.next_frame_id += len(frames)
        state.new += 1
        del state.frame_sets[: -state.size]
        return None if self._missing() else self._make_window()

    def reset(self, reason: str) -> None:
        """Forget the frames; the next window starts a new map for this reason."""
        state = self.state
        state.frame_sets.clear()
        state.anchor = ()
        state.new = 0
        state.views.clear()
        state.last_stamp_ns = None
        state.map_start_reason = reason

    def finish(self) -> Window | None:
        """Return the last, incomplete window at the end of the stream, if two frame sets exist."""
        if not self.state.new or len(self.state.frame_sets) < _MIN_FRAME_SETS:
            return None
        return self._make_window()

    def shrink(self, size: int) -> None:
        """
        Continue with smaller windows, after the device ran out of memory.

        :param size: frames, of all cameras; at least two frame sets are kept.
        """
        state = self.state
        cameras = max(map(len, state.frame_sets), default=1)
        state.size = max(size // cameras, _MIN_FRAME_SETS)
        state.stride = min(state.stride, state.size - 1)
        del state.frame_sets[: -state.size]

    def _has_parallax(self, views: dict[int, GreyImage]) -> bool:
        """Check whether the image of any camera moved since its last accepted frame."""
        before = self.state.views
        return any(
            camera not in before or median_flow(before[camera], view) >= self._min_parallax
            for camera, view in views.items()
        )

    def _drop(self, cause: str) -> None:
        self._count(cause, 1)
        self.state.dropped += 1

    def _count(self, key: str, images: int) -> None:
        counts = self.state.counts
        counts[key] = counts.get(key, 0) + images

    def _find_interruption(
        self, frames: tuple[Frame, ...], dropped_stamps_ns: Sequence[int]
    ) -> str:
        """Return why this frame set does not continue the stream, '' if it does."""
        if self.state.last_stamp_ns is None:
            return ''
        stamps = (self.state.last_stamp_ns, *dropped_stamps_ns, frames[0].stamp_ns)
        steps = [later - earlier for earlier, later in pairwise(stamps)]
        if min(steps) < 0:
            return f'stamps ran backwards by {-min(steps) * 1e-9:.3f} s'
        if max(steps) > self._max_gap_ns:
            return f'stamps jumped forwards by {max(steps) * 1e-9:.3f} s'
        before = {
            each.frame.camera: each.frame
            for frame_set in self.state.frame_sets
            for each in frame_set
        }
        changes = (_find_change(before.get(frame.camera, frame), frame) for frame in frames)
        return next((change for change in changes if change), '')

    def _missing(self) -> int:
        """Count the frame sets that must come until the next window is complete."""
        state = self.state
        # a new map starts with a whole window of new frames
        wanted = state.size if state.map_start_reason else state.stride
        return max(state.size - len(state.frame_sets), wanted - state.new, 0)

    def _make_window(self) -> Window:
        state = self.state
        numbered = [each for frame_set in self._with_anchor() for each in frame_set]
        window = Window(
            window_id=state.next_window_id,
            frames=tuple(each.frame for each in numbered),
            ids=tuple(each.frame_id for each in numbered),
            dropped=state.dropped,
            map_start_reason=state.map_start_reason,
            anchor=tuple(each.frame_id for each in state.anchor),
        )
        state.next_window_id += 1
        state.new = 0
        state.dropped = 0
        state.map_start_reason = ''
        return window

    def _with_anchor(self) -> list[FrameSet]:
        """Replace the oldest frame set by the anchor; when its time is up, by a new anchor."""
        state = self.state
        if self._anchor_windows < 2:
            return state.frame_sets
        if not state.anchor or state.anchor_age >= self._anchor_windows:
            state.anchor, state.anchor_age = state.frame_sets[0], 0
        state.anchor_age += 1
        return [state.anchor, *state.frame_sets[1:]]


def _find_change(last: Frame, frame: Frame) -> str:
    """Return how the images of a camera have changed, '' if they have not."""
    if frame.image.shape != last.image.shape:
        (height, width), (was_height, was_width) = frame.image.shape[:2], last.image.shape[:2]
        return f'images changed from {was_width}x{was_height} to {width}x{height} pixels'
    if frame.camera_frame != last.camera_frame:
        return f"camera frame changed from '{last.camera_frame}' to '{frame.camera_frame}'"
    return ''


def _shrink(image: npt.NDArray[np.uint8]) -> GreyImage:
    height, width = image.shape[:2]
    small = (_FLOW_WIDTH, max(round(height * _FLOW_WIDTH / width), 1))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)  # first: one channel is resized faster
    return cv2.resize(grey, small, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def median_flow(before: GreyImage, after: GreyImage) -> float:
    """
    Measure the parallax between two images: the median length of sparse Lucas-Kanade flow.

    :param before: (h, w) grey image.
    :param after: (h, w) grey image.
    :returns: the length as a share of the width; infinity where too few corners can be tracked
        (a bare wall, a sudden change), so that such a frame is kept rather than lost.
    """
    if cv2.norm(before, after, cv2.NORM_L1) < _SENSOR_NOISE * before.size:
        return 0.0
    corners = cv2.goodFeaturesToTrack(before, _CORNERS, 0.01, _SPACING)
    if corners is None or len(corners) < _MIN_CORNERS:
        return float('inf')
    moved, found, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]
        before, after, corners, None, winSize=_FLOW_PATCH, criteria=_FLOW_CRITERIA
    )
    tracked = found.ravel() == 1
    if tracked.sum() < _MIN_CORNERS:
        return float('inf')
    lengths = np.linalg.norm(moved[tracked] - corners[tracked], axis=-1)
    return float(np.median(lengths)) / before.shape[1]
