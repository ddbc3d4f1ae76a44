# SPDX-License-Identifier: Apache-2.0
"""Topics without subscribers cost nothing, and messages carry the content of the update."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='needs ROS')
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from fake_network import FakeNetwork
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.serialization import serialize_message
from ros_domain import Use, own_domain
from rosbags.typesys import Stores, get_typestore

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.poses import matrices_from_poses, pose_from_message
from vggt_ros.io.message_building import MessageBuilder
from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.lab.evaluation.sequences import FRAME_PERIOD_NS, map_sequence, sequence_world
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.mapping.map_update import corrected_registrations
from vggt_ros.mapping.metric_scale import MetricScale
from vggt_ros.ros.diagnostics import Diagnostics
from vggt_ros.ros.faults import Faults
from vggt_ros.ros.messages import builder
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import TOPICS, MapPublishers
from vggt_ros.ros.rclpy_workarounds import sequence_from_array
from vggt_ros.settings import Settings

SIZE = 3


@pytest.fixture
def node():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=own_domain(Use.PUBLISH))
    made = Node('publish', context=context)
    yield made
    made.destroy_node()
    rclpy.shutdown(context=context)


@pytest.fixture
def updates():
    settings = Settings.from_flat({'min_parallax': 0.0, 'window_size': SIZE, 'window_stride': 1})
    engine = StreamingEngine(settings, FakeNetwork(image_width=28))
    image = np.full((24, 32, 3), 50, np.uint8)
    added = [engine.add(Frame(image, 10**12 + i * 10**8, 'camera')) for i in range(SIZE + 4)]
    return [update for update in added if update is not None]


class WatchedUpdate:
    """An update that records whether its depth or points were computed."""

    def __init__(self, update):
        self.update = update
        self.computed = []

    def __getattr__(self, name):
        if name in ('depth', 'point_cloud'):
            self.computed.append(name)
        return getattr(self.update, name)


def listen(node, topic, kind):
    """Subscribe, and wait for the match with the publisher; return the list of the messages."""
    got = []
    node.create_subscription(kind, topic, got.append, 10)
    (publisher,) = [p for p in node.publishers if p.topic_name == node.resolve_topic_name(topic)]
    wait(node, publisher.get_subscription_count)
    return got


def wait(node, condition):
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        executor.spin_once(timeout_sec=0.05)
    executor.remove_node(node)
    executor.shutdown()


def test_nothing_is_computed_for_topics_without_subscribers(node, updates):
    publishers = MapPublishers(node, NodeSettings())
    watched = WatchedUpdate(updates[0])
    publishers.publish(watched, time.monotonic())
    assert not watched.computed
    got = listen(node, '~/points', TOPICS['~/points'])
    publishers.publish(watched, time.monotonic())
    assert watched.computed == ['point_cloud'] * SIZE
    wait(node, lambda: len(got) == SIZE)


def test_the_engine_tracks_points_only_for_subscribers(node):
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    settings = {'window_size': SIZE, 'window_stride': 1, 'min_parallax': 0.0, 'track_points': 5}
    engine = StreamingEngine(Settings.from_flat(settings), FakeNetwork(image_width=28))
    publishers = MapPublishers(node, NodeSettings())

    def add(number):
        frame = Frame(image, number * 10**8, 'camera')
        return engine.add(frame, with_tracks=publishers.has_track_subscribers())

    updates = [add(i) for i in range(SIZE + 1)]
    assert [update.tracks for update in updates[SIZE - 1 :]] == [None, None]
    got = listen(node, '~/tracks', TOPICS['~/tracks'])
    assert publishers.has_track_subscribers()
    update = add(SIZE + 1)
    publishers.publish(update, time.monotonic())
    wait(node, lambda: got)
    tracks, (message,) = update.tracks, got
    assert list(message.ids) == tracks.ids.tolist() and len(message.ids) == 5
    assert len(message.pixels) == 2 * SIZE * 5
    for i, k in ((0, 0), (1, 3), (2, 4)):
        e = i * 5 + k
        assert message.pixels[2 * e : 2 * e + 2].tolist() == tracks.pixels[i, k].tolist()
        assert message.visibility[e] == tracks.visibility[i, k]
        assert message.confidence[e] == tracks.confidence[i, k]
    assert list(message.frame_ids) == list(update.batch.ids)
    assert (message.window_id, message.map_id, message.trained) == (2, 0, True)


@pytest.mark.parametrize('reliability', ['reliable', 'best_effort'])
def test_topics_have_the_reliability_of_the_settings(node, reliability):
    MapPublishers(node, NodeSettings(publish_reliability=reliability))
    for topic in TOPICS:
        (end,) = node.get_publishers_info_by_topic(topic.replace('~', '/publish'))
        assert end.qos_profile.reliability.name.lower() == reliability


def test_the_path_keeps_its_newest_poses_only(node, updates):
    publishers = MapPublishers(node, NodeSettings(max_path=4))
    got = listen(node, '~/path', Path)
    for update in updates:
        publishers.publish(update, time.monotonic())
    wait(node, lambda: len(got) == len(updates))
    path = got[-1].poses
    assert isinstance(path[0], PoseStamped)
    stamps = [ns_from_time(pose.header.stamp) for pose in path]
    assert stamps == [10**12 + i * 10**8 for i in range(SIZE, SIZE + 4)]


def test_a_closed_loop_corrects_the_path(node):
    pytest.importorskip('gtsam', reason='needs GTSAM')
    world = sequence_world(SEQUENCES['rotation'](200))
    images = [world.render_image(i * FRAME_PERIOD_NS, 28, 42) for i in range(200)]
    noise = PredictionNoise(depth=0.01, rotation=0.01, translation=0.01)
    updates = map_sequence(TruthNetwork(world, noise, 42), images, loop_closure=True)
    assert any(update.loop_closure for update in updates)
    publishers = MapPublishers(node, NodeSettings())
    got = listen(node, '~/path', Path)
    reports = listen(node, '~/window', TOPICS['~/window'])
    for count, update in enumerate(updates, 1):
        publishers.publish(replace(update, metric=MetricScale(2.0, 'fixed', True)), 0.0)
        wait(node, lambda n=count: len(got) == len(reports) == n)
    closed = [
        (report.window_id, report.loop_window_id) for report in reports if report.loop_closed
    ]
    assert closed == [(u.window_id, u.loop_closure.with_window) for u in updates if u.loop_closure]
    expected = []
    for update, registration in zip(updates, corrected_registrations(updates)):
        cameras = registration.transform_poses(update.reconstruction.window_from_camera)
        expected += [c for c, is_new in zip(cameras, update.is_new) if is_new]
    poses = [pose_from_message(p.pose.position, p.pose.orientation) for p in got[-1].poses]
    found = matrices_from_poses(np.array(poses))
    assert len(found) == len(expected) == 200
    np.testing.assert_allclose(found[:, :3, :3], np.stack(expected)[:, :3, :3], atol=1e-9)
    np.testing.assert_allclose(found[:, :3, 3], 2 * np.stack(expected)[:, :3, 3], atol=1e-9)


def test_the_path_follows_the_metric_scale(node, updates):
    publishers = MapPublishers(node, NodeSettings())
    got = listen(node, '~/path', Path)
    doubled = replace(updates[1], metric=MetricScale(2.0, 'tf', valid=True, age=0.0))
    for update in (updates[0], doubled):
        publishers.publish(update, time.monotonic())
    wait(node, lambda: len(got) == 2)

    def positions(path):
        return np.array([[getattr(p.pose.position, axis) for axis in 'xyz'] for p in path.poses])

    before, after = map(positions, got)
    assert np.abs(before[-1]).max() > 0
    np.testing.assert_allclose(after[:SIZE], 2 * before)
    np.testing.assert_allclose(after[SIZE:], doubled.world_from_camera[-1:, :3, 3])


def test_diagnostics_begin_with_what_matters_most(node, updates):
    clock = SimpleNamespace(now=100.0)
    faults = Faults(node.get_logger(), clock=lambda: clock.now)
    faults.report('old', 'a fault before the node was active')
    diagnostics = Diagnostics(node, FakeNetwork(image_width=28), faults, lambda: clock.now)
    got = listen(node, '/diagnostics', DiagnosticArray)

    def summary(received=0, publishers=1):
        before = len(got)
        diagnostics.publish({'received': received}, publishers, SIZE)
        wait(node, lambda: len(got) > before)
        (status,) = got[-1].status
        return status.level, status.message

    assert summary() == (DiagnosticStatus.OK, 'waiting for the first window')
    clock.now += 6
    assert summary() == (DiagnosticStatus.WARN, 'no image for 6 s')
    assert summary(received=1) == (DiagnosticStatus.OK, 'waiting for the first window')
    faults.report('broken', 'something broke')
    assert summary(received=2) == (DiagnosticStatus.ERROR, 'something broke')
    clock.now += 1
    diagnostics.record_output(updates[0], arrived=clock.now - 0.25)
    unknown = 'the metric scale is unknown: lengths are not metres'
    assert summary(received=3) == (DiagnosticStatus.WARN, unknown)
    values = {pair.key: pair.value for pair in got[-1].status[0].values}
    assert (values['last_error'], values['latency_seconds']) == ('something broke', '0.25')
    several = f'2 publishers of images, expected one; {unknown}'
    assert summary(received=4, publishers=2) == (DiagnosticStatus.WARN, several)
    for age, warning in ((7.0, 'the metric scale was last measured 7 s ago'), (4.0, '')):
        metric = MetricScale(2.0, 'tf', valid=True, age=age)
        diagnostics.record_output(replace(updates[0], metric=metric), arrived=clock.now)
        assert summary(received=5)[1] == (warning or 'mapping')


@pytest.mark.parametrize('stamp_ns', [0, 1, 999_999_999, 1_700_000_000_123_456_789])
def test_stamps_survive_to_the_nanosecond(stamp_ns):
    assert ns_from_time(builder.time(stamp_ns)) == stamp_ns


def test_an_empty_cloud_is_a_valid_message():
    message = builder.point_cloud(
        builder.header('map', 1),
        np.empty((0, 3), np.float32),
        np.empty((0, 3), np.uint8),
        np.empty(0, np.float32),
    )
    assert (message.width, message.row_step, len(message.data)) == (0, 0, 0)


def build_everything(build):
    """Build one message of each type that the builder knows, with all of its fields."""
    generator = np.random.default_rng(0)
    header = build.header('map', 1_700_000_000_123_456_789)
    poses = build.poses(np.tile(np.eye(4), (2, 1, 1)))
    intrinsics = np.array([[500.0, 0, 31.5], [0, 500.0, 23.5], [0, 0, 1]])
    xyz, confidence = (generator.random(shape, np.float32) for shape in ((5, 3), 5))
    rgb = generator.integers(0, 256, (5, 3), np.uint8)
    return {
        'geometry_msgs/msg/PoseArray': build.pose_array(header, poses),
        'nav_msgs/msg/Path': build.path(header, [build.stamped_pose(header, poses[1])]),
        'nav_msgs/msg/Odometry': build.odometry(header, 'camera', poses[0], np.eye(6)),
        'tf2_msgs/msg/TFMessage': build.transforms([build.transform(header, 'child', poses[1])]),
        'sensor_msgs/msg/Image': build.float_image(header, generator.random((4, 6), np.float32)),
        'sensor_msgs/msg/CompressedImage': build.compressed_image(header, 'jpeg', b'abcde'),
        'sensor_msgs/msg/CameraInfo': build.camera_info(header, intrinsics, 48, 64),
        'sensor_msgs/msg/PointCloud2': build.point_cloud(header, xyz, rgb, confidence),
    }


def test_messages_of_rclpy_and_of_rosbags_are_the_same():
    store = get_typestore(Stores.ROS2_JAZZY)
    for_bags = build_everything(MessageBuilder(store.types, lambda values: values))
    for kind, message in build_everything(builder).items():
        read = store.deserialize_cdr(serialize_message(message), kind)
        # as bytes, since padding of rclpy's is arbitrary and arrays have no equality
        expected = bytes(store.serialize_cdr(for_bags[kind], kind))
        assert bytes(store.serialize_cdr(read, kind)) == expected, kind


@pytest.mark.parametrize('kind', [np.uint8, np.uint64, np.float32, np.float64])
def test_sequences_of_messages_hold_the_values_of_the_array(kind):
    values = np.arange(12, dtype=kind).reshape(3, 4)
    for array in (values, values.T, values[:, 1:3], values[:0]):
        sequence = sequence_from_array(array)
        assert sequence.itemsize == np.dtype(kind).itemsize
        assert sequence.tolist() == array.ravel().tolist()
