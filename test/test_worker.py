# SPDX-License-Identifier: Apache-2.0
"""The worker drops evenly under load, loses no window, survives every failure and stops."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='needs ROS')
from fake_network import Failure, FakeNetwork, warm_up

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.io.message_reading import ImageError
from vggt_ros.ros.faults import Faults
from vggt_ros.ros.worker import (
    InferenceWorker,
    ReceivedFrameSet,
    ReceivedImage,
    choose_dropped,
)
from vggt_ros.settings import Settings

PERIOD_NS = 10_000_000
SIZE, STRIDE = 6, 3


class Lines:
    """A logger that keeps its lines."""

    def __init__(self):
        self.lines = []

    def warning(self, message):
        self.lines.append(message)


class WatchedEngine(StreamingEngine):
    """An engine that reports when it encodes ahead."""

    ahead = None  # a callable that replaces the work

    def encode_ahead(self):
        if self.ahead is None:
            super().encode_ahead()
        else:
            self.ahead()


class Bench:
    """A worker on the real engine with the fake network; images are arrays."""

    def __init__(self, seconds=0.0):
        settings = Settings.from_flat(
            {'min_parallax': 0.0, 'window_size': SIZE, 'window_stride': STRIDE}
        )
        self.decoded = 0
        self.updates = []
        self.arrived = []
        self.published = []
        self.counts = Counter()
        self.log = Lines()
        self.faults = Faults(self.log)
        self.engine = WatchedEngine(settings, FakeNetwork(seconds, image_width=28))
        self.worker = InferenceWorker(
            self.engine,
            self.decode,
            self.publish,
            lambda: True,
            STRIDE,
            self.counts,
            self.faults,
        )
        self.worker.start()

    def decode(self, image):
        self.decoded += 1
        if image.message is None:
            raise ImageError('undecodable', 'no pixels')
        return Frame(image.message, image.stamp_ns, 'camera', camera=image.camera)

    def publish(self, update, newest):
        self.updates.append(update)
        self.arrived.append(newest.arrived)
        self.published.append(time.monotonic())

    def push(self, number, *values):
        """Push an image of a grey value, or one of each camera; None cannot be decoded."""
        stamp_ns = 10**12 + number * PERIOD_NS
        now = time.monotonic()
        images = [
            ReceivedImage(
                None if value is None else np.full((24, 32, 3), value, np.uint8),
                stamp_ns,
                now,
                None,
                camera,
            )
            for camera, value in enumerate(values or (100,))
        ]
        self.worker.push(ReceivedFrameSet(tuple(images)))

    def push_slowly(self, numbers, *values):
        """Push frame sets one by one, each when the one before has been decoded."""
        for number in numbers:
            goal = self.decoded + max(len(values), 1)
            self.push(number, *values)
            wait_for(lambda goal=goal: self.decoded == goal)


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'timeout'
        time.sleep(0.001)


@pytest.fixture(scope='module', autouse=True)
def warm():
    warm_up()


@pytest.fixture
def bench():
    made = []

    def make(seconds=0.0):
        made.append(Bench(seconds))
        return made[-1]

    yield make
    for each in made:
        assert each.worker.stop(30.0)


@pytest.mark.parametrize(
    ('before', 'stamps', 'chosen'),
    [
        (0, [1, 2, 3, 10], 0),  # three close together: one of them is dropped, the far one stays
        (0, [10, 11, 20, 30], 1),
        (0, [10, 20, 30, 31], 2),
        (0, [10, 20, 40, 41], 0),
        (0, [20, 40, 60, 61], 2),
        (0, [9, 10], 0),  # the newest always stays
        (None, [1, 2, 3, 10], 1),  # the very first stays: nothing is before it
    ],
)
def test_the_image_whose_absence_leaves_the_smallest_gap_is_dropped(before, stamps, chosen):
    assert choose_dropped(before, stamps) == chosen


def test_waiting_images_stay_spread_over_the_whole_time_of_waiting():
    before, waiting = 0, []
    for stamp in range(1, 601):  # 20 s at 30 Hz while one window is computed
        waiting.append(stamp)
        if len(waiting) > 8:
            waiting.pop(choose_dropped(before, waiting))
    gaps = np.diff([before, *waiting])
    assert waiting[-1] == 600
    assert gaps.max() <= 2 * 600 / 8


def test_no_window_is_lost_under_load_and_every_image_is_counted(bench):
    run = bench(seconds=0.1)
    pushed = 150
    for number in range(pushed):
        run.push(number)
        time.sleep(0.01)
    wait_for(lambda: run.decoded + run.counts['dropped'] == pushed)
    wait_for(lambda: run.worker.engine_counts['received'] == pushed)
    assert run.counts['dropped'] > pushed / 2
    ids = [update.window_id for update in run.updates]
    assert ids == list(range(len(ids))) and len(ids) > 3
    assert {update.map_id for update in run.updates} == {0}
    assert all(update.registration.shared == SIZE - STRIDE for update in run.updates[1:])
    # the images of a window arrived while the previous one was computed, or later
    for arrived, two_before in zip(run.arrived[2:], run.published):
        assert arrived > two_before
    stamps = [frame.stamp_ns for frame in run.updates[-1].batch.frames]
    assert (np.diff(stamps) > 0).all()


def test_work_is_done_ahead_while_no_image_waits(bench):
    run = bench(seconds=1.0)
    ahead = []
    run.engine.ahead = lambda: ahead.append(run.decoded)
    for number in range(SIZE - 1):
        run.push(number)
        wait_for(lambda number=number: ahead == list(range(1, number + 2)))
    del ahead[:]
    run.push_slowly([SIZE - 1])  # the network computes for a while now
    run.push(SIZE)
    run.push(SIZE + 1)
    wait_for(lambda: ahead)
    assert ahead == [SIZE + 2]  # not after the window, nor between the two


def test_pushing_never_waits_for_the_network(bench):
    run = bench(seconds=3.0)
    run.push_slowly(range(SIZE))
    for number in range(SIZE, SIZE + 100):
        run.push(number)
    assert run.published == []  # the network still computes


@pytest.mark.parametrize(
    ('failure', 'kind'),
    [
        (Failure.NAN, 'rejected_windows'),
        (Failure.ABSURD, 'rejected_windows'),
        (Failure.SURPRISE, 'failure_RuntimeError'),
    ],
)
def test_a_failed_window_is_reported_and_the_next_one_is_computed(bench, failure, kind):
    run = bench()
    run.push_slowly(range(SIZE))
    run.push_slowly([SIZE], int(failure))
    run.push_slowly(range(SIZE + 1, SIZE + 3 * STRIDE))
    wait_for(lambda: len(run.updates) == 3)
    assert run.faults.counts == {kind: 1}
    assert run.log.lines == [run.faults.latest.text]
    # the window after it shares no frame with the one before it: a new map starts
    assert [update.map_id for update in run.updates] == [0, 1, 1]
    assert run.updates[1].map_start_reason


def test_an_undecodable_image_costs_nothing_else(bench):
    run = bench()
    run.push_slowly(range(3))
    run.push_slowly([3], None)
    run.push_slowly(range(4, SIZE + 1))
    wait_for(lambda: len(run.updates) == 1)
    assert run.faults.counts == {'bad_image_undecodable': 1}


def test_a_frame_set_goes_on_without_the_images_that_cannot_be_decoded(bench):
    run = bench()
    run.push_slowly(range(SIZE - 1), 100, 120)
    run.push_slowly([SIZE - 1], 100, None)
    wait_for(lambda: len(run.updates) == 1)
    assert [frame.camera for frame in run.updates[0].batch.frames] == [0, 1] * (SIZE - 1) + [0]
    assert run.faults.counts == {'bad_image_undecodable': 1}


def test_reset_starts_a_new_map_with_the_next_image(bench):
    run = bench()
    run.push_slowly(range(SIZE))
    wait_for(lambda: len(run.updates) == 1)
    run.worker.reset('a test')
    run.push_slowly(range(SIZE, 2 * SIZE))
    wait_for(lambda: len(run.updates) == 2)
    assert run.updates[1].map_start_reason == 'a test'
    assert run.updates[1].batch.ids[0] > run.updates[0].batch.ids[-1]


def test_stop_ends_the_thread_and_publishes_nothing_more(bench):
    run = bench(seconds=0.3)
    run.push_slowly(range(SIZE))
    assert not run.worker.stop(0.05)  # inside the network
    assert run.worker.stop(30.0)
    assert not run.updates
    assert not [thread for thread in threading.enumerate() if thread.name == 'vggt_worker']


def test_a_repeated_fault_is_counted_each_time_and_logged_once_in_a_while():
    log, now = Lines(), [0.0]
    faults = Faults(log, period=10.0, clock=lambda: now[0])
    assert faults.latest is None
    for _ in range(300):
        faults.report('bad', 'an image is bad')
        now[0] += 1 / 31
    now[0] = 10.0
    faults.report('other', 'something else')
    faults.report('bad', 'an image is bad')
    assert log.lines == [
        'an image is bad',
        'something else',
        'an image is bad (299 more since the last line)',
    ]
    assert faults.counts == {'bad': 301, 'other': 1}
    assert (faults.latest.time, faults.latest.text) == (10.0, 'an image is bad')
