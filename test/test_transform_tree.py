# SPDX-License-Identifier: Apache-2.0
"""The tree of /tf: chains, interpolation, expiry, and frames that are not connected."""

import numpy as np
import pytest

from vggt_ros.geometry.transform_tree import TransformTree

HALF = np.sqrt(0.5)
IDENTITY = [0.0, 0.0, 0.0, 1.0]
LEFT = [0.0, 0.0, HALF, HALF]  # 90 degrees about z


def tree(**values):
    made = TransformTree(**{'max_gap': 1.0, 'max_extrapolation': 0.0, **values})
    made.set_transform('map', 'odom', 0.0, [10.0, 0, 0, *IDENTITY])
    made.set_transform('map', 'odom', 0.5, [10.0, 0, 0, *IDENTITY])
    made.set_transform('map', 'odom', 1.0, [12.0, 0, 0, *IDENTITY])
    made.set_transform('odom', 'base', 0.0, [0.0, 0, 0, *LEFT])
    made.set_transform('odom', 'base', 1.0, [0.0, 2, 0, *LEFT])
    made.set_transform('base', 'camera', 99.0, [1.0, 0, 0, *IDENTITY], static=True)
    made.set_transform('base', 'laser', 0.0, [0.0, 0, 5, *IDENTITY], static=True)
    return made


def test_chains_are_walked_up_and_down():
    found = tree().lookup_transforms('map', 'camera', np.array([0.0, 0.25, 0.75, 1.0]))
    assert found[:, :3, 3] == pytest.approx(
        np.array([[10, 1, 0], [10, 1.5, 0], [11, 2.5, 0], [12, 3, 0]])
    )
    assert found[0, :3, :3] == pytest.approx(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]))
    beside = tree().lookup_transforms(
        'laser', 'camera', np.array([7.0])
    )  # both static: valid at any time
    assert beside[0, :3, 3] == pytest.approx(np.array([1, 0, -5]))
    back = tree().lookup_transforms('camera', 'map', np.array([0.25]))
    assert back[0] == pytest.approx(np.linalg.inv(found[1]))


def test_transforms_are_unknown_outside_of_the_limits():
    found = tree().lookup_transforms('map', 'camera', np.array([-0.1, 0.5, 1.1]))
    assert np.isnan(found[[0, 2]]).any(axis=(1, 2)).all() and np.isfinite(found[1]).all()
    assert np.isfinite(
        tree(max_extrapolation=0.2).lookup_transforms('map', 'camera', np.array([-0.1, 1.1]))
    ).all()
    assert np.isnan(tree(max_gap=0.7).lookup_transforms('map', 'base', np.array([0.5]))).any()


def test_old_transforms_expire_and_a_jump_back_in_time_clears_them():
    made = tree(cache_time=0.6)
    assert np.isnan(made.lookup_transforms('map', 'odom', np.array([0.2]))).any()
    assert np.isfinite(made.lookup_transforms('map', 'odom', np.array([0.7]))).all()
    made.set_transform('map', 'odom', -5.0, [1.0, 0, 0, *IDENTITY])  # a bag is restarted
    made.set_transform('map', 'odom', -4.5, [2.0, 0, 0, *IDENTITY])
    found = made.lookup_transforms('map', 'odom', np.array([-4.75, 0.7]))
    assert found[0, :3, 3] == pytest.approx(np.array([1.5, 0, 0])) and np.isnan(found[1]).any()


def test_transforms_may_arrive_out_of_order():
    made = TransformTree(max_gap=2.0, max_extrapolation=0.0)
    for stamp in (3.0, 1.0, 2.0):
        made.set_transform('map', 'base', stamp, [stamp, 0, 0, *IDENTITY])
    found = made.lookup_transforms('map', 'base', np.array([1.5, 2.5]))
    assert found[:, 0, 3] == pytest.approx([1.5, 2.5])


def test_a_new_parent_replaces_the_old_one():
    made = tree()
    made.set_transform('dock', 'base', 2.0, [0.0, 0, 0, *IDENTITY])
    assert made.root('camera') == 'dock'
    with pytest.raises(ValueError, match=r"'map' and 'camera' are not .* 'map' and 'dock'"):
        made.lookup_transforms('map', 'camera', np.array([2.0]))


def test_a_loop_of_frames_is_an_error():
    made = tree()
    made.set_transform('camera', 'map', 0.0, [0.0, 0, 0, *IDENTITY])
    with pytest.raises(ValueError, match='the frames form a loop'):
        made.root('base')


def test_chains_of_static_transforms_are_static():
    assert tree().is_static('base', 'camera') and not tree().is_static('map', 'camera')
    with pytest.raises(ValueError, match="'laser' is not an ancestor of 'camera'"):
        tree().is_static('laser', 'camera')
