# SPDX-License-Identifier: Apache-2.0
"""Which frames form a window, which are dropped, and what interrupts a stream."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.sliding_window import SlidingWindow, Window
from vggt_ros.settings import WindowSettings

SECOND = 1_000_000_000
NOISE = np.random.default_rng(0).integers(0, 255, (30, 90, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def frame(seconds: float, offset: int = 0, size: tuple[int, int] = (240, 320)) -> Frame:
    """Return a view of a noise wall, moved sideways by some pixels."""
    height, width = size
    image = np.ascontiguousarray(NOISE[:height, offset : offset + width])
    return Frame(image, round(seconds * SECOND), 'camera')


def windows_of(sliding: SlidingWindow, frames: list[Frame]) -> list[Window]:
    return [window for f in frames if (window := sliding.add(f)) is not None]


def every_frame(size: int = 4, stride: int = 2) -> SlidingWindow:
    return SlidingWindow(WindowSettings(size, stride, min_parallax=0.0))


def test_windows_overlap_by_size_minus_stride() -> None:
    windows = windows_of(every_frame(), [frame(0.1 * i) for i in range(9)])
    assert [w.ids for w in windows] == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)]
    assert [w.window_id for w in windows] == [0, 1, 2]
    assert [w.map_start_reason for w in windows] == ['first window', '', '']


def test_an_anchor_is_kept_for_some_windows_and_then_replaced_by_the_oldest_frame() -> None:
    sliding = SlidingWindow(WindowSettings(4, 1, anchor_windows=3, min_parallax=0.0))
    windows = windows_of(sliding, [frame(0.1 * i) for i in range(9)])
    expected = [(0, 1, 2, 3), (0, 2, 3, 4), (0, 3, 4, 5), (3, 4, 5, 6), (3, 5, 6, 7), (3, 6, 7, 8)]
    assert [w.ids for w in windows] == expected
    assert [w.anchor for w in windows] == [(0,)] * 3 + [(3,)] * 3
    sliding.reset('a test')
    windows = windows_of(sliding, [frame(10 + 0.1 * i) for i in range(4)])
    assert [w.ids for w in windows] == [(9, 10, 11, 12)]


def test_a_stationary_camera_completes_no_window() -> None:
    sliding = SlidingWindow(WindowSettings(2, 1, min_parallax=0.02))
    assert windows_of(sliding, [frame(0.1 * i) for i in range(10)]) == []
    assert sliding.state.counts['no_parallax'] == 9
    window = sliding.add(frame(1.0, offset=20))
    assert window is not None
    assert window.dropped == 9


def test_parallax_is_measured_from_the_last_accepted_frame() -> None:
    sliding = SlidingWindow(WindowSettings(2, 1, min_parallax=0.02))
    windows = windows_of(sliding, [frame(0.1 * i, offset=2 * i) for i in range(13)])
    stamps = [w.frames[-1].stamp_ns * 1e-8 for w in windows]
    assert stamps == pytest.approx([4, 8, 12], abs=1)  # 6.4 of 320 pixels: every 4th frame


def test_a_stationary_camera_in_front_of_a_bare_wall_completes_no_window() -> None:
    sliding = SlidingWindow(WindowSettings(2, 1, min_parallax=0.02))
    bare = np.full((240, 320, 3), 128, np.uint8)
    assert windows_of(sliding, [Frame(bare, i, 'camera') for i in range(5)]) == []


def test_a_duplicate_stamp_is_dropped_and_counted() -> None:
    sliding = every_frame()
    frames = [frame(0.1 * i) for i in (0, 1, 1, 2, 2, 3)]
    (window,) = windows_of(sliding, frames)
    assert window.ids == (0, 1, 2, 3)
    assert window.dropped == 2
    assert sliding.state.counts['duplicate_stamp'] == 2


@pytest.mark.parametrize(
    ('interruption', 'reason'),
    [
        (frame(0.05), 'stamps ran backwards by 0.350 s'),
        (frame(9.0), 'stamps jumped forwards by 8.600 s'),
        (frame(0.5, size=(120, 160)), 'images changed from 320x240 to 160x120 pixels'),
        (Frame(frame(0).image, SECOND // 2, 'other'), "camera frame changed from 'camera' to "),
    ],
)
def test_an_interruption_of_the_stream_starts_a_new_map(interruption: Frame, reason: str) -> None:
    sliding = every_frame()
    windows_of(sliding, [frame(0.1 * i) for i in range(5)])
    after = [interruption]
    for i in range(1, 4):
        stamp = interruption.stamp_ns + i * SECOND // 10
        after.append(Frame(interruption.image, stamp, interruption.camera_frame))
    (window,) = windows_of(sliding, after)
    assert window.map_start_reason.startswith(reason)
    assert window.frames == tuple(after)


def test_dropped_images_bridge_a_gap_and_are_counted() -> None:
    sliding = every_frame()
    sliding.add(frame(0.0))
    between = [round(SECOND * t) for t in (3.0, 6.0, 9.0)]
    for i in range(3):
        window = sliding.add(frame(10.0 + i), between if i == 0 else ())
    assert window is not None
    assert window.map_start_reason == 'first window'
    assert window.dropped == 3
    assert sliding.state.counts['received'] == 7


def test_a_jump_of_stamps_among_dropped_images_starts_a_new_map() -> None:
    sliding = every_frame(2, 1)
    windows_of(sliding, [frame(0.0), frame(1.0)])
    sliding.add(frame(12.0), [11 * SECOND])
    window = sliding.add(frame(13.0))
    assert window is not None
    assert window.map_start_reason == 'stamps jumped forwards by 10.000 s'


def test_reset_starts_a_map_with_new_frames_only() -> None:
    sliding = every_frame()
    windows_of(sliding, [frame(0.1 * i) for i in range(5)])
    sliding.reset('requested')
    (window,) = windows_of(sliding, [frame(0.5 + 0.1 * i) for i in range(4)])
    assert window.map_start_reason == 'requested'
    assert window.ids == (5, 6, 7, 8)


def test_smaller_windows_continue_with_the_newest_frames() -> None:
    sliding = every_frame(8, 6)
    windows_of(sliding, [frame(0.1 * i) for i in range(8)])
    sliding.shrink(4)
    (window,) = windows_of(sliding, [frame(0.8 + 0.1 * i) for i in range(3)])
    assert window.ids == (7, 8, 9, 10)
    assert window.map_start_reason == ''


def frame_set(
    seconds: float, offsets: tuple[int, int] = (0, 0), right: bool = True
) -> list[Frame]:
    """Return the frames of two cameras with images of different sizes, or of the left one."""
    left, other = frame(seconds, offsets[0]), frame(seconds + 0.01, offsets[1], size=(200, 200))
    return [left, replace(other, camera_frame='right', camera=1)] if right else [left]


def test_frames_of_several_cameras_stay_together() -> None:
    sliding = every_frame(size=2, stride=1)
    assert sliding.add(frame_set(0.0)) is None
    first = sliding.add(frame_set(0.1))
    alone = sliding.add(frame_set(0.2, right=False))
    assert first is not None and alone is not None
    assert first.ids == (0, 1, 2, 3) and [f.camera for f in first.frames] == [0, 1, 0, 1]
    assert alone.ids == (2, 3, 4) and alone.map_start_reason == ''
    again = sliding.add(frame_set(0.3))
    assert again is not None and again.ids == (4, 5, 6) and again.map_start_reason == ''


def test_a_frame_set_is_accepted_if_any_camera_has_moved() -> None:
    sliding = SlidingWindow(WindowSettings(2, 1, min_parallax=0.02))
    assert sliding.add(frame_set(0.0)) is None
    assert sliding.add(frame_set(0.1)) is None and sliding.state.counts['no_parallax'] == 1
    assert sliding.add(frame_set(0.2, offsets=(0, 20))) is not None


def test_a_change_of_one_camera_interrupts_the_stream() -> None:
    sliding = every_frame(size=2, stride=1)
    sliding.add(frame_set(0.0)), sliding.add(frame_set(0.1))
    small = replace(frame(0.2, size=(100, 100)), camera_frame='right', camera=1)
    sliding.add([frame(0.2), small])
    window = sliding.add([frame(0.3), replace(small, stamp_ns=3 * 10**8)])
    assert window is not None
    assert window.map_start_reason == 'images changed from 200x200 to 100x100 pixels'


def test_shrinking_to_a_number_of_frames_counts_those_of_all_cameras() -> None:
    sliding = every_frame(size=6, stride=4)
    for i in range(6):
        sliding.add(frame_set(0.1 * i))
    sliding.shrink(6)
    assert (sliding.state.size, sliding.state.stride) == (3, 2)
