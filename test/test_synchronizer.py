# SPDX-License-Identifier: Apache-2.0
"""Which images of several cameras form a frame set, and what happens when one is missing."""

from dataclasses import dataclass

import pytest

from vggt_ros.frames.synchronizer import Synchronizer


@dataclass(frozen=True)
class Image:
    stamp_ns: int


class RecordingSynchronizer:
    """A synchronizer; records its frame sets, stamps by camera, and its reports."""

    def __init__(self, cameras=2, slop=0.02, timeout=1.0):
        self.silent, self.unmatched, self.frame_sets = [], [], []
        self._synchronizer = Synchronizer(
            cameras,
            slop,
            timeout,
            lambda camera, seconds: self.silent.append((camera, round(seconds, 2))),
            self.unmatched.append,
        )

    def add(self, camera, seconds):
        complete = self._synchronizer.add(camera, Image(round(seconds * 1e9)))
        stamps = [
            {i: round(image.stamp_ns * 1e-9, 3) for i, image in frame_set.items()}
            for frame_set in complete
        ]
        self.frame_sets += stamps
        return stamps


def test_images_with_nearly_equal_stamps_form_a_frame_set():
    synchronizer = RecordingSynchronizer()
    assert synchronizer.add(0, 1.0) == []
    assert synchronizer.add(1, 1.015) == [{0: 1.0, 1: 1.015}]
    assert synchronizer.add(1, 1.115) == []
    assert synchronizer.add(0, 1.1) == [{0: 1.1, 1: 1.115}]
    assert synchronizer.unmatched == [] and synchronizer.silent == []


@pytest.mark.parametrize('offset', [0.0, 0.015, -0.015])
def test_cameras_without_a_common_trigger_are_matched_one_to_one(offset):
    synchronizer = RecordingSynchronizer(cameras=3)
    images = sorted(
        (0.1 * i + camera_offset, camera)
        for i in range(20)
        for camera, camera_offset in ((0, 0.0), (1, offset), (2, offset / 2))
    )
    for seconds, camera in images:
        synchronizer.add(camera, 10 + seconds)
    assert len(synchronizer.frame_sets) == 20 and synchronizer.unmatched == []
    assert all(max(s.values()) - min(s.values()) <= 0.0151 for s in synchronizer.frame_sets)


def test_a_faster_camera_is_matched_with_its_nearest_image():
    synchronizer = RecordingSynchronizer()
    images = sorted([(0.1 * i, 0) for i in range(10)] + [(0.033 * i, 1) for i in range(30)])
    for seconds, camera in images:
        synchronizer.add(camera, seconds)
    used = [frame_set[0] for frame_set in synchronizer.frame_sets]
    assert len(used) >= 8 and used == sorted(set(used))
    assert all(abs(frame_set[1] - frame_set[0]) <= 0.02 for frame_set in synchronizer.frame_sets)
    assert synchronizer.unmatched.count(1) >= 15


def test_images_with_different_stamps_form_no_frame_set_and_are_reported():
    synchronizer = RecordingSynchronizer()
    for i in range(10):
        synchronizer.add(0, i * 0.1)
        synchronizer.add(1, i * 0.1 + 0.05)
    assert synchronizer.frame_sets == []
    assert len(synchronizer.unmatched) >= 18
    assert synchronizer.silent == []


def test_a_silent_camera_does_not_block_the_others_and_is_used_again():
    synchronizer = RecordingSynchronizer(timeout=0.5)
    for i in range(5):
        synchronizer.add(0, 0.1 * i)
        synchronizer.add(1, 0.1 * i)
    for i in range(5, 15):
        synchronizer.add(0, 0.1 * i)
    assert synchronizer.silent == [(1, 0.6)]
    alone = [frame_set[0] for frame_set in synchronizer.frame_sets if 1 not in frame_set]
    assert alone == pytest.approx([0.1 * i for i in range(5, 15)])
    synchronizer.add(1, 1.5)
    assert synchronizer.add(0, 1.5) == [{0: 1.5, 1: 1.5}]
    assert synchronizer.silent == [(1, 0.6)]


def test_a_camera_without_any_image_is_reported_as_silent():
    synchronizer = RecordingSynchronizer(timeout=0.3)
    for i in range(6):
        synchronizer.add(0, 5 + 0.1 * i)
    assert synchronizer.silent == [(1, 0.4)]
    assert synchronizer.frame_sets[-1] == {0: 5.5}


def test_restarted_time_clears_the_synchronizer():
    synchronizer = RecordingSynchronizer()
    synchronizer.add(0, 100.0), synchronizer.add(1, 100.0)
    synchronizer.add(0, 100.1)
    synchronizer.add(0, 1.0)
    assert synchronizer.add(1, 1.0) == [{0: 1.0, 1: 1.0}]
