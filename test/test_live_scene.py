# SPDX-License-Identifier: Apache-2.0
"""The published map of a node becomes a bounded scene."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='needs ROS')
import rclpy
from fake_network import FakeNetwork
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from ros_domain import Use, own_domain
from sensor_msgs.msg import Image
from vggt_ros.msg import WindowReport

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.io.message_reading import read_cloud
from vggt_ros.ros.messages import builder
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import MapPublishers
from vggt_ros.settings import Settings
from vggt_ros.viewer.live_scene import LiveScene, SceneListener

STEP = 10**8
LENS = [50.0, 0, 28, 0, 50, 21, 0, 0, 1]
COUNT = 40  # points of a frame


def report(window, numbers, **changes):
    """Report a window of frames at x = their number."""
    poses = np.tile(np.eye(4), (len(numbers), 1, 1))
    poses[:, 0, 3] = numbers
    parts = {
        'window_id': window,
        'map_id': 3,
        'stamps': [builder.time(number * STEP) for number in numbers],
        'frame_ids': list(numbers),
        'poses': builder.poses(poses),
        'intrinsics': LENS * len(numbers),
        'width': 56,
        'height': 42,
        'registered': True,
        'model': 'a model',
        'model_trained': True,
    }
    return WindowReport(**{**parts, **changes})


def cloud(number, count=COUNT):
    values = np.arange(count, dtype=np.float32)
    xyz = np.stack([values, values, np.full_like(values, number)], axis=-1)
    rgb = np.tile(np.array([number, 20, 30], np.uint8), (count, 1))
    return builder.point_cloud(builder.header('world', number * STEP), xyz, rgb, 1 + values)


def image(number):
    header = builder.header('camera', number * STEP)
    pixels = np.full((240, 320, 3), (number, 100, 200), np.uint8)
    return Image(
        header=header, height=240, width=320, encoding='rgb8', step=960, data=pixels.tobytes()
    )


def test_a_cloud_is_read_back_with_its_confidence():
    xyz, rgb, confidence = read_cloud(cloud(7))
    assert np.array_equal(xyz[:, 2], np.full(COUNT, 7))
    assert rgb[0].tolist() == [7, 20, 30]
    assert np.array_equal(confidence, 1 + np.arange(COUNT))
    without = cloud(7)
    without.fields = without.fields[:4]
    with pytest.raises(ValueError, match=r'fields x, y, z, rgb, expected .*confidence'):
        read_cloud(without)


def test_points_and_images_are_matched_to_cameras_by_stamp():
    live = LiveScene('/vggt')
    assert live.snapshot_if_changed() is None
    for number in (1, 2):
        live.add_image(image(number))
    live.add_points(cloud(1))
    assert live.snapshot_if_changed() is None  # the map of the points is not known yet
    live.add_window(report(0, [1, 2, 5]))
    live.add_points(cloud(2))  # comes after its report
    scene = live.snapshot_if_changed()
    assert live.snapshot_if_changed() is None
    assert [camera.stamp_ns for camera in scene.cameras] == [STEP, 2 * STEP, 5 * STEP]
    assert [camera.world_from_camera[0, 3] for camera in scene.cameras] == [1, 2, 5]
    assert np.array_equal(scene.frame, np.repeat([0, 1], COUNT))
    assert np.array_equal(scene.xyz[:, 2], np.repeat([1, 2], COUNT))
    assert np.array_equal(scene.confidence[:COUNT], 1 + np.arange(COUNT))
    seen, blank = scene.cameras[0], scene.cameras[2]
    assert seen.image.shape == (120, 160, 3) and seen.image[0, 0].tolist() == [1, 100, 200]
    assert np.allclose(
        seen.intrinsics, np.diag([160 / 56, 120 / 42, 1]) @ np.reshape(LENS, (3, 3))
    )
    assert blank.image.shape == (120, 160, 3) and np.ptp(blank.image) == 0
    assert (scene.title, scene.unit) == ('/vggt: a model, map 3', 'units of the network')


def test_a_later_report_updates_poses_and_warnings():
    live = LiveScene('/vggt')
    live.add_window(report(0, [1, 2]))
    later = report(1, [2, 3], registered=False, rejection_reason='too few points')
    later.poses[0].position.x = 2.5
    later.model_trained, later.scale_valid = False, True
    live.add_window(later)
    scene = live.snapshot_if_changed()
    assert [camera.world_from_camera[0, 3] for camera in scene.cameras] == [1, 2.5, 3]
    assert 'UNTRAINED' in scene.warning and 'too few points' in scene.warning
    assert scene.unit == 'm'


@pytest.mark.parametrize('change', [{'map_id': 4}, {'window_id': 0}])
def test_another_map_or_a_new_run_replaces_the_scene(change):
    live = LiveScene('/vggt')
    live.add_points(cloud(1))
    live.add_window(report(0, [1, 2]))
    live.add_points(cloud(8))  # of the new map, before its report
    live.add_window(report(1, [7, 8], **change))
    scene = live.snapshot_if_changed()
    assert [camera.stamp_ns for camera in scene.cameras] == [7 * STEP, 8 * STEP]
    assert np.array_equal(scene.xyz[:, 2], np.full(COUNT, 8))
    assert np.array_equal(scene.frame, np.ones(COUNT))


def test_memory_is_bounded_and_the_newest_is_kept():
    live = LiveScene('/vggt', max_points=200, max_cameras=10)
    for number in range(1, 41):
        live.add_image(image(number))
        live.add_points(cloud(number))
        live.add_window(report(number, [number]))
    scene = live.snapshot_if_changed()
    assert [camera.stamp_ns // STEP for camera in scene.cameras] == list(range(31, 41))
    assert 100 <= len(scene.xyz) <= 200
    assert np.ptp(np.bincount(scene.frame)) == 0  # evenly
    assert set(scene.xyz[:, 2]) == set(range(31, 41))


def test_a_listener_collects_the_published_map():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=own_domain(Use.VIEWER))
    sender = Node('vggt', context=context)
    listener = SceneListener('/vggt', 'image_raw', context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(listener)
    executor.add_node(sender)

    def spin(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            executor.spin_once(timeout_sec=0.05)

    try:
        publishers = MapPublishers(sender, NodeSettings())
        images = sender.create_publisher(Image, 'image_raw', 10)
        topics = {'/image_raw', '/vggt/points', '/vggt/window'}
        found = [each for each in sender.publishers if each.topic_name in topics]
        assert len(found) == len(topics)
        spin(lambda: all(publisher.get_subscription_count() for publisher in found))
        settings = Settings.from_flat({'min_parallax': 0, 'window_size': 3, 'window_stride': 1})
        engine = StreamingEngine(settings, FakeNetwork(image_width=28))
        for number in range(1, 6):
            images.publish(image(number))
            blank = np.full((240, 320, 3), 50, np.uint8)
            update = engine.add(Frame(blank, number * STEP, 'camera'))
            spin(lambda number=number: listener.scene.image_count == number)
            if update is not None:
                publishers.publish(update, time.monotonic())
                each = len(update.point_cloud(2).xyz)
        spin(lambda: listener.scene.point_count == 5 * each)
        scene = listener.scene.snapshot_if_changed()
    finally:
        executor.shutdown()
        listener.destroy_node()
        sender.destroy_node()
        rclpy.shutdown(context=context)
    assert [camera.stamp_ns for camera in scene.cameras] == [i * STEP for i in range(1, 6)]
    assert [camera.image[0, 0, 0] for camera in scene.cameras] == [1, 2, 3, 4, 5]
    assert np.allclose(scene.cameras[0].world_from_camera, np.eye(4), atol=1e-6)
    assert np.array_equal(np.bincount(scene.frame), np.full(5, each))
