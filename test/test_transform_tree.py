# SPDX-License-Identifier: Apache-2.0
"""The tree of /tf: chains, times between poses, memory, and what nothing connects."""

import numpy as np
import pytest

from vggt_ros.geometry.transform_tree import TransformTree

HALF = np.sqrt(0.5)
NO_TURN = [0.0, 0.0, 0.0, 1.0]
LEFT = [0.0, 0.0, HALF, HALF]  # 90 degrees about z


def tree(**values):
    made = TransformTree(**{'largest_gap': 1.0, 'beyond': 0.0, **values})
    made.add('map', 'odom', 0.0, [10.0, 0, 0, *NO_TURN])
    made.add('map', 'odom', 0.5, [10.0, 0, 0, *NO_TURN])
    made.add('map', 'odom', 1.0, [12.0, 0, 0, *NO_TURN])
    made.add('odom', 'base', 0.0, [0.0, 0, 0, *LEFT])
    made.add('odom', 'base', 1.0, [0.0, 2, 0, *LEFT])
    made.add('base', 'camera', 99.0, [1.0, 0, 0, *NO_TURN], static=True)
    made.add('base', 'laser', 0.0, [0.0, 0, 5, *NO_TURN], static=True)
    return made


def test_chains_are_walked_up_and_down():
    found = tree().look_up('map', 'camera', np.array([0.0, 0.25, 0.75, 1.0]))
    assert found[:, :3, 3] == pytest.approx(
        np.array([[10, 1, 0], [10, 1.5, 0], [11, 2.5, 0], [12, 3, 0]])
    )
    assert found[0, :3, :3] == pytest.approx(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]))
    beside = tree().look_up('laser', 'camera', np.array([7.0]))  # static both: at any time
    assert beside[0, :3, 3] == pytest.approx(np.array([1, 0, -5]))
    back = tree().look_up('camera', 'map', np.array([0.25]))
    assert back[0] == pytest.approx(np.linalg.inv(found[1]))


def test_times_without_poses_are_unknown():
    found = tree().look_up('map', 'camera', np.array([-0.1, 0.5, 1.1]))
    assert np.isnan(found[[0, 2]]).any(axis=(1, 2)).all() and np.isfinite(found[1]).all()
    assert np.isfinite(tree(beyond=0.2).look_up('map', 'camera', np.array([-0.1, 1.1]))).all()
    assert np.isnan(tree(largest_gap=0.7).look_up('map', 'base', np.array([0.5]))).any()


def test_old_poses_are_forgotten_and_a_jump_back_starts_again():
    made = tree(memory=0.6)
    assert np.isnan(made.look_up('map', 'odom', np.array([0.2]))).any()
    assert np.isfinite(made.look_up('map', 'odom', np.array([0.7]))).all()
    made.add('map', 'odom', -5.0, [1.0, 0, 0, *NO_TURN])  # a bag is played again
    made.add('map', 'odom', -4.5, [2.0, 0, 0, *NO_TURN])
    found = made.look_up('map', 'odom', np.array([-4.75, 0.7]))
    assert found[0, :3, 3] == pytest.approx(np.array([1.5, 0, 0])) and np.isnan(found[1]).any()


def test_poses_may_arrive_out_of_order():
    made = TransformTree(largest_gap=2.0, beyond=0.0)
    for stamp in (3.0, 1.0, 2.0):
        made.add('map', 'base', stamp, [stamp, 0, 0, *NO_TURN])
    found = made.look_up('map', 'base', np.array([1.5, 2.5]))
    assert found[:, 0, 3] == pytest.approx([1.5, 2.5])


def test_a_new_parent_replaces_the_old_one():
    made = tree()
    made.add('dock', 'base', 2.0, [0.0, 0, 0, *NO_TURN])
    assert made.root('camera') == 'dock'
    with pytest.raises(ValueError, match=r"'map' and 'camera': .* on 'map', the other on 'dock'"):
        made.look_up('map', 'camera', np.array([2.0]))


def test_frames_that_go_round_are_an_error():
    made = tree()
    made.add('camera', 'map', 0.0, [0.0, 0, 0, *NO_TURN])
    with pytest.raises(ValueError, match='the frames go round'):
        made.root('base')


def test_what_moves():
    assert tree().is_static('base', 'camera') and not tree().is_static('map', 'camera')
    with pytest.raises(ValueError, match="'camera' does not hang on 'laser'"):
        tree().is_static('laser', 'camera')
