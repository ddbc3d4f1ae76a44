# SPDX-License-Identifier: Apache-2.0
"""Which images of several cameras belong together, and what happens when one is missing."""

from dataclasses import dataclass

import pytest

from vggt_ros.frames.synchronizer import Synchronizer


@dataclass(frozen=True)
class Shot:
    stamp_ns: int


class Case:
    """A synchroniser and what it says."""

    def __init__(self, cameras=2, slop=0.02, patience=1.0):
        self.silent, self.unmatched, self.moments = [], [], []
        self.sync = Synchronizer(
            cameras,
            slop,
            patience,
            lambda camera, seconds: self.silent.append((camera, round(seconds, 2))),
            self.unmatched.append,
        )

    def take(self, camera, seconds):
        made = self.sync.add(camera, Shot(round(seconds * 1e9)))
        found = [{i: round(s.stamp_ns * 1e-9, 3) for i, s in each.items()} for each in made]
        self.moments += found
        return found


def test_images_of_nearly_the_same_time_are_one_moment():
    case = Case()
    assert case.take(0, 1.0) == []
    assert case.take(1, 1.015) == [{0: 1.0, 1: 1.015}]
    assert case.take(1, 1.115) == []
    assert case.take(0, 1.1) == [{0: 1.1, 1: 1.115}]
    assert case.unmatched == [] and case.silent == []


@pytest.mark.parametrize('offset', [0.0, 0.015, -0.015])
def test_cameras_without_a_common_trigger_are_matched_one_to_one(offset):
    case = Case(cameras=3)
    shots = sorted(
        (0.1 * i + shift, camera)
        for i in range(20)
        for camera, shift in ((0, 0.0), (1, offset), (2, offset / 2))
    )
    for seconds, camera in shots:
        case.take(camera, 10 + seconds)
    assert len(case.moments) == 20 and case.unmatched == []
    assert all(max(m.values()) - min(m.values()) <= 0.0151 for m in case.moments)


def test_a_faster_camera_is_matched_with_its_nearest_image():
    case = Case()
    shots = sorted([(0.1 * i, 0) for i in range(10)] + [(0.033 * i, 1) for i in range(30)])
    for seconds, camera in shots:
        case.take(camera, seconds)
    used = [moment[0] for moment in case.moments]
    assert len(used) >= 8 and used == sorted(set(used))
    assert all(abs(moment[1] - moment[0]) <= 0.02 for moment in case.moments)
    assert case.unmatched.count(1) >= 15


def test_what_never_belongs_together_makes_no_moment_and_is_told():
    case = Case()
    for i in range(10):
        case.take(0, i * 0.1)
        case.take(1, i * 0.1 + 0.05)
    assert case.moments == []
    assert len(case.unmatched) >= 18
    assert case.silent == []


def test_a_silent_camera_holds_nobody_up_and_comes_back():
    case = Case(patience=0.5)
    for i in range(5):
        case.take(0, 0.1 * i)
        case.take(1, 0.1 * i)
    for i in range(5, 15):
        case.take(0, 0.1 * i)
    assert case.silent == [(1, 0.6)]
    alone = [moment[0] for moment in case.moments if 1 not in moment]
    assert alone == pytest.approx([0.1 * i for i in range(5, 15)])
    case.take(1, 1.5)
    assert case.take(0, 1.5) == [{0: 1.5, 1: 1.5}]
    assert case.silent == [(1, 0.6)]


def test_a_camera_that_never_came_is_given_up():
    case = Case(patience=0.3)
    for i in range(6):
        case.take(0, 5 + 0.1 * i)
    assert case.silent == [(1, 0.4)]
    assert case.moments[-1] == {0: 5.5}


def test_time_that_begins_anew_is_not_waited_for():
    case = Case()
    case.take(0, 100.0), case.take(1, 100.0)
    case.take(0, 100.1)
    case.take(0, 1.0)
    assert case.take(1, 1.0) == [{0: 1.0, 1: 1.0}]
