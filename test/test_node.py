# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, over DDS, with a network that returns the truth."""

from __future__ import annotations

import array
import math
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='needs ROS')
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from fake_network import ROOM, Failure, cast_rays, true_cameras, true_depth
from nav_msgs.msg import Odometry
from node_process import (
    BASE_NS,
    COLOUR,
    SIZE,
    STRIDE,
    Driver,
    NodeProcess,
    by_stamp,
    make_image,
    stamp_of,
)
from rclpy.qos import DurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from ros_domain import Use, own_domain
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from soak import run_soak
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.poses import matrices_from_poses, pose_from_message
from vggt_ros.geometry.rotation import matrix_from_quaternion
from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.io.names import resolve_private
from vggt_ros.lab.evaluation.truth_network import World, true_intrinsics
from vggt_ros.ros.messages import builder
from vggt_ros.ros.publish import TOPICS

HEIGHT, WIDTH = 42, 56  # of the depth image: 64x48 pixels at the fake network's width
DOMAIN = own_domain(Use.NODE)
LIMIT = 1e-3


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    node = NodeProcess(DOMAIN, tmp_path_factory.mktemp('node') / 'log')
    driver = Driver(node, DOMAIN)
    yield node, driver
    driver.close()
    code, seconds = node.leave()
    node.kill()
    assert code == 0, node.output()
    assert seconds < 2


@pytest.fixture
def node(running):
    """The node process, unconfigured and with the parameters it was started with."""
    yield running[0]
    driver = running[1]
    if driver.state() == 'active':
        driver.change('deactivate')
    if driver.state() == 'inactive':
        driver.change('cleanup')


@pytest.fixture
def idle(running, node):  # noqa: ARG001 - the node is cleaned up afterwards
    """The driver of an unconfigured node."""
    return running[1]


@pytest.fixture
def driver(idle):
    """The driver of an active node without images yet."""
    assert idle.change('configure', 'activate')
    idle.settle()
    return idle


def pose_matrix(pose):
    q, t = pose.orientation, pose.position
    matrix = np.eye(4)
    matrix[:3, :3] = matrix_from_quaternion(torch.tensor([q.x, q.y, q.z, q.w])).numpy()
    matrix[:3, 3] = t.x, t.y, t.z
    return matrix


def read_floats(message):
    assert (message.encoding, message.step) == ('32FC1', 4 * message.width)
    return np.frombuffer(message.data, '<f4').reshape(message.height, message.width)


class Truth:
    """The content of a map anchored at a stamp; its scale is that of one depth image."""

    def __init__(self, anchor_ns, depth_message):
        stamp = ns_from_time(depth_message.header.stamp)
        self.scale = np.nanmedian(read_floats(depth_message) / true_depth(stamp, HEIGHT, WIDTH))
        self.map_from_room = np.linalg.inv(true_cameras([anchor_ns])[0])

    def camera(self, stamp_ns):
        camera = self.map_from_room @ true_cameras([stamp_ns])[0]
        camera[:3, 3] *= self.scale
        return camera

    def depth(self, stamp_ns):
        return self.scale * true_depth(stamp_ns, HEIGHT, WIDTH)

    def points(self, stamp_ns):
        points = cast_rays(stamp_ns, HEIGHT, WIDTH)[1]
        return self.scale * (points @ self.map_from_room[:3, :3].T + self.map_from_room[:3, 3])


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=LIMIT)


# --- the map is the truth


@pytest.fixture(scope='module')
def mapped(running):
    """All messages of three windows."""
    driver = running[1]
    assert driver.change('configure', 'activate')
    driver.settle()
    count = SIZE + 2 * STRIDE
    driver.send(range(count))
    driver.wait_windows(3)
    driver.spin_until(lambda: len(driver.got['points']) == count, what='all clouds')
    driver.spin_until(lambda: len(driver.got['tf']) == 3, what='all transforms')
    driver.spin_for(0.3)  # time for surplus messages
    got = {name: list(messages) for name, messages in driver.got.items()}
    driver.change('deactivate', 'cleanup')
    stamps = [stamp_of(number) for number in range(count)]
    return got, stamps, Truth(stamps[0], by_stamp(got['depth/image_rect'])[stamps[0]])


def test_each_new_frame_is_published_once_with_its_own_stamp(mapped):
    got, stamps, _ = mapped
    for name in ('depth/image_rect', 'depth/confidence', 'depth/camera_info'):
        assert [ns_from_time(message.header.stamp) for message in got[name]] == stamps
        assert {message.header.frame_id for message in got[name]} == {'camera'}
    for name in ('points', 'odometry'):
        assert [ns_from_time(message.header.stamp) for message in got[name]] == stamps
        assert {message.header.frame_id for message in got[name]} == {'vggt_world'}
    for name in ('poses', 'path', 'window', 'tf'):
        assert len(got[name]) == 3


def test_published_poses_are_the_true_cameras(mapped):
    got, stamps, truth = mapped
    for number, message in enumerate(got['poses']):
        first = number * STRIDE
        expected = [truth.camera(stamp) for stamp in stamps[first : first + SIZE]]
        assert message.header.frame_id == 'vggt_world'
        assert ns_from_time(message.header.stamp) == stamps[first + SIZE - 1]
        assert_close([pose_matrix(pose) for pose in message.poses], expected)


def test_odometry_and_path_follow_the_true_camera(mapped):
    got, stamps, truth = mapped
    expected = [truth.camera(stamp) for stamp in stamps]
    assert {message.child_frame_id for message in got['odometry']} == {'vggt_camera'}
    assert_close([pose_matrix(message.pose.pose) for message in got['odometry']], expected)
    path = got['path'][-1].poses
    assert [ns_from_time(pose.header.stamp) for pose in path] == stamps
    assert_close([pose_matrix(pose.pose) for pose in path], expected)


def test_depth_is_true_and_nan_where_it_is_not_valid(mapped):
    got, stamps, truth = mapped
    depths, confidences = by_stamp(got['depth/image_rect']), by_stamp(got['depth/confidence'])
    for stamp in stamps:
        depth = read_floats(depths[stamp])
        assert np.isnan(depth[:, 0]).all()
        assert_close(depth[:, 1:], truth.depth(stamp)[:, 1:])
        assert read_floats(confidences[stamp])[0, :2].tolist() == [1, 5]


def test_camera_info_describes_the_depth_image(mapped):
    got, _, _ = mapped
    for info in got['depth/camera_info']:
        assert (info.height, info.width) == (HEIGHT, WIDTH)
        assert_close(info.k, true_intrinsics(HEIGHT, WIDTH).ravel())
        assert_close(np.reshape(info.p, (3, 4))[:, :3].ravel(), info.k)
        assert list(info.r) == np.eye(3).ravel().tolist()
        assert (list(info.d), info.distortion_model) == ([0.0] * 5, 'plumb_bob')


def test_the_cloud_lies_on_the_walls_in_the_colours_of_the_image(mapped):
    got, stamps, truth = mapped
    clouds = by_stamp(got['points'])
    for stamp in stamps:
        cloud = clouds[stamp]
        assert [field.name for field in cloud.fields] == ['x', 'y', 'z', 'rgb', 'confidence']
        assert [field.offset for field in cloud.fields] == [0, 4, 8, 12, 16]
        assert (cloud.point_step, cloud.is_dense) == (20, True)
        values = np.frombuffer(cloud.data, '<f4').reshape(-1, 5)
        assert_close(values[:, :3], truth.points(stamp)[:, 1:].reshape(-1, 3))
        packed = np.frombuffer(cloud.data, '<u4').reshape(-1, 5)[:, 3]
        assert set(packed.tolist()) == {COLOUR[0] << 16 | COLOUR[1] << 8 | COLOUR[2]}
        assert set(values[:, 4].tolist()) == {5.0}


def test_tf_has_one_child_for_each_frame_of_the_window(mapped):
    got, stamps, truth = mapped
    for number, message in enumerate(got['tf']):
        window = stamps[number * STRIDE : number * STRIDE + SIZE]
        children = [transform.child_frame_id for transform in message.transforms]
        assert children == [f'vggt_camera_{i}' for i in range(SIZE)]
        for stamp, transform in zip(window, message.transforms):
            assert transform.header.frame_id == 'vggt_world'
            assert ns_from_time(transform.header.stamp) == stamp
            q, t = transform.transform.rotation, transform.transform.translation
            rotation = matrix_from_quaternion(torch.tensor([q.x, q.y, q.z, q.w])).numpy()
            assert_close(rotation, truth.camera(stamp)[:3, :3])
            assert_close([t.x, t.y, t.z], truth.camera(stamp)[:3, 3])


def test_the_window_report_is_complete(mapped):
    got, stamps, truth = mapped
    for number, report in enumerate(got['window']):
        first = number * STRIDE
        assert (report.window_id, report.map_id) == (number, 0)
        assert report.map_start_reason == ('first window' if number == 0 else '')
        assert [ns_from_time(t) for t in report.stamps] == stamps[first : first + SIZE]
        assert list(report.frame_ids) == list(range(first, first + SIZE))
        overlap = 0 if number == 0 else SIZE - STRIDE
        assert list(report.is_new) == [False] * overlap + [True] * (SIZE - overlap)
        assert report.overlap == overlap
        assert set(report.camera_frames) == {'camera'}
        assert_close(pose_matrix(report.poses[-1]), truth.camera(stamps[first + SIZE - 1]))
        assert_close(
            np.reshape(report.intrinsics, (SIZE, 3, 3)),
            np.tile(true_intrinsics(HEIGHT, WIDTH), (SIZE, 1, 1)),
        )
        assert (report.height, report.width) == (HEIGHT, WIDTH)
        assert (report.scale_source, report.scale_valid) == ('none', False)
        assert report.registered and report.registration_residual < LIMIT
        assert (report.model, report.model_trained) == ('fake', True)
        assert report.total_seconds >= report.inference_seconds > 0
        assert report.frames_dropped == 0


# --- bad input


def test_unusable_images_are_counted_and_nothing_else_is_lost(driver):
    def bad(**change):
        message = make_image(3)
        for name, value in change.items():
            setattr(message, name, value)
        driver.images.publish(message)

    driver.send(range(4))
    bad(width=0)
    bad(height=0)
    bad(encoding='64FC4')
    bad(step=100)
    bad(data=message_bytes(100))
    driver.images.publish(make_image(3))  # the stamp of the last image
    driver.wait_health(received=4 + 6)
    driver.send(range(4, SIZE))
    report = driver.wait_windows(1)[0]
    assert list(report.frame_ids) == list(range(SIZE))
    driver.wait_health(
        received=SIZE + 6,
        bad_image_empty=2,
        bad_image_unknown_encoding=1,
        bad_image_short_row=1,
        bad_image_short_data=1,
        bad_image_duplicate_stamp=1,
        windows=1,
    )


def message_bytes(count):
    return make_image(0).data[:count]


def test_an_interruption_of_the_stream_starts_a_new_map_with_the_reason(driver):
    segments = [
        (range(SIZE), {}, 'first window'),
        (range(SIZE, 2 * SIZE), {'width': 80}, '64x48 to 80x48'),
        (range(2 * SIZE, 3 * SIZE), {'width': 80, 'frame': 'other'}, "to 'other'"),
        (range(SIZE), {'width': 80, 'frame': 'other'}, 'backwards'),
        (range(1000, 1000 + SIZE), {'width': 80, 'frame': 'other'}, 'jumped'),
    ]
    for number, (numbers, how, words) in enumerate(segments):
        driver.send(numbers, **how)
        report = driver.wait_windows(number + 1)[number]
        assert report.map_id == number
        assert words in report.map_start_reason
        assert pose_matrix(report.poses[0]) == pytest.approx(np.eye(4), abs=1e-6)
    assert len(driver.got['path'][-1].poses) == SIZE


@pytest.mark.parametrize(
    ('failure', 'count'),
    [
        (Failure.NAN, {'rejected_windows': 1}),
        (Failure.ABSURD, {'rejected_windows': 1}),
        (Failure.SURPRISE, {'failure_RuntimeError': 1}),
    ],
)
def test_a_failed_window_is_counted_and_the_next_one_is_computed(driver, failure, count):
    driver.send(range(SIZE + STRIDE - 1))
    driver.send([SIZE + STRIDE - 1], red=int(failure))
    status, values = driver.wait_health(windows=2, **count)
    assert status.level == DiagnosticStatus.ERROR
    assert values['last_error'] and values['last_error'] in status.message
    driver.send(range(SIZE + STRIDE, SIZE + 3 * STRIDE))
    reports = driver.wait_windows(3)
    assert [report.window_id for report in reports] == [0, 2, 3]
    # window 2 shares no frame with window 0: a new map starts
    assert [report.map_id for report in reports] == [0, 1, 1]
    status, _ = driver.health()
    assert status.level == DiagnosticStatus.WARN  # the scale is unknown


def test_out_of_memory_halves_the_window(driver, node):
    driver.send(range(SIZE + STRIDE - 1))
    driver.send([SIZE + STRIDE - 1], red=int(Failure.OUT_OF_MEMORY))
    reports = driver.wait_windows(2)
    assert len(reports[1].poses) == SIZE // 2
    driver.wait_health(window_size=SIZE // 2)
    assert 'out of memory' in node.output()


def test_several_publishers_are_a_warning(driver):
    other = driver.node.create_publisher(Image, 'image_raw', 1)
    status, _ = driver.wait_health(image_publishers=2)
    assert status.level == DiagnosticStatus.WARN
    assert '2 publishers' in status.message
    driver.node.destroy_publisher(other)
    driver.wait_health(image_publishers=1)


def test_camera_info_of_another_size_is_counted_and_an_uncalibrated_one_ignored(driver):
    info = CameraInfo(width=320, height=240, header=builder.header('camera', BASE_NS))
    driver.spin_until(lambda: driver.infos.get_subscription_count() > 0)
    driver.infos.publish(info)
    driver.spin_for(0.3)
    driver.send(range(3))
    info.k = [300.0, 0.0, 160.0, 0.0, 300.0, 120.0, 0.0, 0.0, 1.0]
    driver.infos.publish(info)
    driver.spin_for(0.3)
    driver.send(range(3, SIZE))
    driver.wait_windows(1)
    driver.wait_health(camera_info_mismatch=SIZE - 3)


def calibrate(driver, model, d, focal=20.0, projected=0.0):
    """Publish the calibration of images of 64x48 pixels and wait until the node received it."""
    info = CameraInfo(width=64, height=48, distortion_model=model, d=d)
    info.header = builder.header('camera', BASE_NS)
    info.k = [focal, 0.0, 32.0, 0.0, focal, 24.0, 0.0, 0.0, 1.0]
    info.p = [projected, 0.0, 32.0, 0.0, 0.0, projected, 24.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    driver.settle(driver.infos)
    driver.infos.publish(info)
    driver.spin_for(0.3)


@pytest.mark.parametrize(
    ('model', 'd', 'error'),
    [
        ('plumb_bob', [0.1, 0.1, 0.1], 'plumb_bob has 3 distortion coefficients, expected 4 or 5'),
        ('double_sphere', [0.1], "the distortion model is 'double_sphere', expected one of"),
    ],
)
def test_an_invalid_calibration_is_reported_and_mapping_continues(driver, model, d, error):
    before = driver.node_process.output().count(error)
    calibrate(driver, model, d)
    driver.wait_health(bad_camera_info=1)
    assert driver.node_process.output().count(error) == before + 1
    driver.send(range(SIZE))
    driver.wait_windows(1)


@pytest.mark.parametrize(
    ('rectify', 'model', 'd', 'focal'),
    [
        # a fisheye becomes a pinhole camera of 100 degrees, independent of its K
        (True, 'equidistant', [0.0] * 4, 32 / math.tan(math.radians(50))),
        (True, 'plumb_bob', [], 20.0),
        (False, 'plumb_bob', [0.1, 0.0, 0.0, 0.0, 0.0], 25.0),  # rectified already: P applies
    ],
)
def test_known_intrinsics_are_those_of_the_rectified_image(idle, rectify, model, d, focal):
    idle.set(rectify=rectify, use_known_intrinsics=True)
    try:
        assert idle.change('configure', 'activate')
        idle.settle()
        calibrate(idle, model, d, projected=25.0)
        idle.send(range(SIZE))
        idle.wait_windows(1)
        idle.spin_until(lambda: idle.got['depth/camera_info'], what='camera_info')
        matrix = idle.got['depth/camera_info'][-1].k.reshape(3, 3)
        found = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        scaled = focal * WIDTH / 64
        assert found == pytest.approx([scaled, scaled, WIDTH / 2, HEIGHT / 2], rel=0.02)
    finally:
        idle.change('deactivate', 'cleanup')
        idle.set(rectify=True, use_known_intrinsics=False)


# --- what users rely on


def test_reset_starts_a_new_map_at_the_next_image(driver):
    driver.send(range(SIZE + 2))
    driver.wait_windows(1)
    assert driver.call('reset', Trigger.Request()).success
    driver.send(range(SIZE + 2, 2 * SIZE + 2))
    report = driver.wait_windows(2)[1]
    assert report.map_id == 1
    assert 'reset' in report.map_start_reason
    assert ns_from_time(report.stamps[0]) == stamp_of(SIZE + 2)


def make_noise(number):
    """Make an image of the size of the others, with corners everywhere."""
    message = make_image(number)
    pixels = np.random.default_rng(number).integers(0, 200, len(message.data), np.uint8)
    message.data = array.array('B', pixels.tobytes())
    return message


def test_tracks_keep_their_ids_and_cost_nothing_without_subscribers(idle, node):
    idle.set(track_points=12)
    kind = TOPICS['~/tracks']
    subscriptions = [each for each in idle.node.subscriptions if each.msg_type is kind]
    for subscription in subscriptions:
        idle.node.destroy_subscription(subscription)
    try:
        assert idle.change('configure', 'activate')
        idle.settle()
        idle.send(range(SIZE), make_noise)
        idle.wait_windows(1)
        assert 'follows points' not in node.output()
        idle.listen(kind, '/vggt/tracks', 'tracks', QoSProfile(depth=100))
        idle.spin_until(lambda: idle.node.count_publishers('/vggt/tracks'), what='the publisher')
        idle.spin_for(0.5)
        idle.send(range(SIZE, SIZE + 2 * STRIDE), make_noise)
        idle.wait_windows(3)
        idle.spin_until(lambda: len(idle.got['tracks']) == 2, what='tracks')
    finally:
        idle.change('deactivate', 'cleanup')
        idle.set(track_points=0)
    assert 'follows points' in node.output()
    first, second = idle.got['tracks']
    seen_from = {}
    for message in (first, second):
        window = message.window_id * STRIDE
        assert [ns_from_time(t) for t in message.stamps] == [
            stamp_of(number) for number in range(window, window + SIZE)
        ]
        assert message.header.frame_id == 'camera' and message.header.stamp == message.stamps[-1]
        pixels = np.reshape(message.pixels, (SIZE, 12, 2))
        visible = np.reshape(message.visibility, (SIZE, 12)) > 0.5
        for k, number in enumerate(message.ids):
            for i in np.flatnonzero(visible[:, k]):
                seen_from.setdefault(number, []).append((message.stamps[i], pixels[i, k]))
    assert set(first.ids) & set(second.ids)
    for observations in seen_from.values():
        walls = [wall_at(ns_from_time(stamp), pixel) for stamp, pixel in observations]
        assert_close(walls, np.tile(walls[0], (len(walls), 1)))


def wall_at(stamp_ns, pixel):
    """Return the point of the wall at a pixel of our 64x48 image; the network's has 56x42."""
    small = (pixel[None].astype(float) + 0.5) * WIDTH / 64 - 0.5
    return World(ROOM, true_cameras).cast_rays_at(stamp_ns, small, HEIGHT, WIDTH)[1][0]


def test_diagnostics_warn_that_lengths_are_not_metres(driver):
    assert driver.health()[1]['map_id'] == 'none'
    started = time.monotonic()
    driver.send(range(SIZE))
    driver.wait_windows(1)
    waited = time.monotonic() - started
    status, values = driver.wait_health(map_id=0, received=SIZE)
    assert status.level == DiagnosticStatus.WARN
    assert 'not metres' in status.message
    assert (values['model'], values['device'], values['scale_valid']) == ('fake', 'cpu', 'false')
    assert 0 < float(values['latency_seconds']) < waited
    assert status.name == 'vggt: pipeline'


# --- metres


class Robot:
    """Metric scale sources of a robot: a base with a camera on it, odometry, a depth sensor."""

    def __init__(self, driver):
        self.node = driver.node
        qos = QoSProfile(depth=100)
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.publishers = {
            'tf': self.node.create_publisher(TFMessage, '/tf', qos),
            'tf_static': self.node.create_publisher(TFMessage, '/tf_static', latched),
            'odometry': self.node.create_publisher(Odometry, 'odometry', qos),
            'depth': self.node.create_publisher(Image, 'sensor_depth', qos),
        }
        self.base_from_camera = np.eye(4)  # half a metre in front of the base, looking ahead
        self.base_from_camera[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
        self.base_from_camera[:3, 3] = 0.5, 0, 0.3

    def close(self):
        for publisher in self.publishers.values():
            self.node.destroy_publisher(publisher)

    def send_transform(self, parent, child, stamp, matrix, topic):
        pose = builder.poses(matrix[None])[0]
        stamped = builder.transform(builder.header(parent, stamp), child, pose)
        self.publishers[topic].publish(builder.transforms([stamped]))

    def send(self, kind, numbers, drift=None):
        """
        Publish what `scale_source` needs for the images of these numbers.

        :param drift: (4, 4), of the odometry; None: it is exact.
        """
        self.send_transform('base', 'camera', BASE_NS, self.base_from_camera, 'tf_static')
        for stamp in map(stamp_of, numbers):
            base = true_cameras([stamp])[0] @ np.linalg.inv(self.base_from_camera)
            if kind == 'tf':
                odom_from_base = base if drift is None else drift @ base
                self.send_transform('odom', 'base', stamp, odom_from_base, 'tf')
            if kind == 'odometry':
                pose = builder.poses(base[None])[0]
                message = builder.odometry(builder.header('odom', stamp), 'base', pose)
                self.publishers['odometry'].publish(message)
            if kind == 'depth':
                millimetres = np.round(1000 * true_depth(stamp, 96, 128)).astype('<u2')
                self.publishers['depth'].publish(
                    Image(
                        header=builder.header('camera', stamp),
                        height=96,
                        width=128,
                        encoding='16UC1',
                        step=256,
                        data=array.array('B', millimetres.tobytes()),
                    )
                )


@pytest.fixture
def robot(idle):
    made = Robot(idle)
    yield made
    made.close()
    idle.change('deactivate', 'cleanup')
    idle.set(scale_source='none', tf_mode='cameras')


@pytest.mark.parametrize('kind', ['tf', 'odometry', 'depth'])
def test_lengths_are_metres_with_a_scale_source(idle, robot, kind):
    assert idle.set(scale_source=kind).successful
    assert idle.change('configure', 'activate')
    idle.settle()
    count = robot.publishers[kind].get_subscription_count
    idle.spin_until(lambda: count() > (kind == 'tf'), what=kind)  # the driver subscribes /tf too
    robot.send(kind, range(SIZE + 2 * STRIDE))
    idle.send(range(SIZE + 2 * STRIDE))
    report = idle.wait_windows(3)[2]
    assert (report.scale_source, report.scale_valid) == (kind, True)
    assert report.scale_spread < 0.02 and report.scale_age == 0
    newest = stamp_of(SIZE + 2 * STRIDE - 1)
    idle.spin_until(lambda: newest in by_stamp(idle.got['depth/image_rect']), what='depth')
    depth = read_floats(by_stamp(idle.got['depth/image_rect'])[newest])
    assert np.nanmedian(depth / true_depth(newest, HEIGHT, WIDTH)) == pytest.approx(1, abs=0.02)
    idle.spin_until(lambda: len(idle.got['path']) == 3, what='paths')
    path = idle.got['path'][-1].poses  # the poses of earlier windows too
    travelled = np.linalg.norm(pose_matrix(path[-1].pose)[:3, 3])
    first, last = true_cameras([stamp_of(0), newest])[:, :3, 3]
    assert travelled == pytest.approx(np.linalg.norm(last - first), rel=0.02)
    status, values = idle.wait_health(map_id=0, scale_valid='true')
    assert values['scale_source'] == kind and 'metres' not in status.message


@pytest.mark.parametrize(
    ('kind', 'sent', 'error'),
    [
        ('tf', None, "'odom' and 'camera' are not connected"),
        ('odometry', None, 'no odometry received'),
        ('odometry', 'odometry', "no scale from odometry of 'base': 'base' and 'camera' are not"),
        ('depth', None, 'no depth image received'),
    ],
)
def test_a_missing_scale_source_is_reported_and_mapping_continues(idle, kind, sent, error):
    robot = Robot(idle)
    try:
        idle.set(scale_source=kind)
        assert idle.change('configure', 'activate')
        idle.settle()
        if sent:
            idle.settle(robot.publishers[sent])
            for stamp in map(stamp_of, range(SIZE)):
                message = Odometry(header=builder.header('odom', stamp), child_frame_id='base')
                robot.publishers[sent].publish(message)
            idle.spin_for(0.5)
        before = idle.node_process.output().count(error)
        idle.send(range(SIZE + STRIDE))
        report = idle.wait_windows(2)[1]
        assert (report.scale_source, report.scale_valid) == (kind, False)
        assert np.isnan(report.scale_age)
        _, values = idle.health()
        assert int(values[f'scale_{kind}']) >= 2
        assert idle.node_process.output().count(error) > before
    finally:
        robot.close()
        idle.change('deactivate', 'cleanup')
        idle.set(scale_source='none')


def test_a_static_camera_gives_no_scale(idle, robot):
    idle.set(scale_source='tf')
    assert idle.change('configure', 'activate')
    idle.settle()
    count = robot.publishers['tf_static'].get_subscription_count
    idle.spin_until(lambda: count() > 0, what='tf_static')
    robot.send_transform('base', 'camera', BASE_NS, robot.base_from_camera, 'tf_static')
    robot.send_transform('odom', 'base', BASE_NS, np.eye(4), 'tf_static')
    idle.spin_for(0.3)
    idle.send(range(SIZE))
    assert not idle.wait_windows(1)[0].scale_valid
    idle.wait_health(scale_tf=1)
    error = "all transforms from 'odom' to 'camera' are static"
    assert error in idle.node_process.output()


def start_map_to_odom(idle, robot, **settings):
    idle.set(tf_mode='map_to_odom', **settings)
    assert idle.change('configure', 'activate')
    idle.settle()
    count = robot.publishers['tf'].get_subscription_count
    idle.spin_until(lambda: count() > 1, what='tf')  # the driver subscribes /tf too


def transforms_in_map(idle, child):
    return [
        each
        for message in idle.got['tf']
        for each in message.transforms
        if (each.header.frame_id, each.child_frame_id) == ('map', child)
    ]


def map_from(idle, child):
    """Return map_from_child: of `odom` from now on, of the world frame by the newest window."""
    idle.spin_for(0.3)  # the transform of the last window may be on its way
    before = len(transforms_in_map(idle, child)) if child == 'odom' else 0
    idle.spin_until(lambda: len(transforms_in_map(idle, child)) > before, what=f'map -> {child}')
    newest = transforms_in_map(idle, child)[-1]
    pose = pose_from_message(newest.transform.translation, newest.transform.rotation)
    return matrices_from_poses(np.array([pose]))[0]


def test_map_to_odom_corrects_the_drift_of_the_odometry(idle, robot):
    drift = np.eye(4)  # the error of the odometry after a slip
    drift[:2, :2] = [[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]
    drift[:3, 3] = 1, -2, 0.1
    start_map_to_odom(idle, robot, scale_source='tf')
    robot.send('tf', range(SIZE))
    idle.send(range(SIZE))
    idle.wait_windows(1)
    np.testing.assert_allclose(map_from(idle, 'odom'), np.eye(4), atol=1e-6)
    # The world frame is beside it, at the first camera.
    np.testing.assert_allclose(
        map_from(idle, 'vggt_world'), true_cameras([stamp_of(0)])[0], atol=0.02
    )
    later = range(SIZE, SIZE + STRIDE)
    robot.send('tf', later, drift)
    idle.send(later)
    idle.wait_windows(2)
    corrected = map_from(idle, 'odom')
    np.testing.assert_allclose(corrected, np.linalg.inv(drift), atol=0.03)
    # The world frame has the stamps of the images, odom is ahead of the present of their clock.
    stamps = [ns_from_time(each.header.stamp) for each in transforms_in_map(idle, 'vggt_world')]
    assert stamps == [stamp_of(i) for i in (0, SIZE - 1, SIZE + STRIDE - 1)]
    ahead = ns_from_time(transforms_in_map(idle, 'odom')[-1].header.stamp) - stamps[-1]
    assert 0 < ahead < 30e9
    # A new map does not move the robot.
    idle.call('reset', Trigger.Request())
    later = range(SIZE + STRIDE, 2 * SIZE + STRIDE)
    robot.send('tf', later, drift)
    idle.send(later)
    assert idle.wait_windows(3)[2].map_id == 1
    np.testing.assert_allclose(map_from(idle, 'odom'), corrected, atol=1e-6)
    # Nor does a node that was inactive.
    assert idle.change('deactivate', 'activate')
    count = robot.publishers['tf'].get_subscription_count
    idle.spin_until(lambda: count() > 1, what='tf')
    later = range(2 * SIZE + STRIDE, 3 * SIZE + STRIDE)
    robot.send('tf', later, drift)
    idle.settle()
    idle.send(later)
    assert idle.wait_windows(1)[0].map_id == 2
    np.testing.assert_allclose(map_from(idle, 'odom'), corrected, atol=1e-6)
    frames = {(t.header.frame_id, t.child_frame_id) for m in idle.got['tf'] for t in m.transforms}
    assert frames <= {('map', 'odom'), ('map', 'vggt_world'), ('odom', 'base')}


@pytest.mark.parametrize(
    ('scale', 'parent', 'kind', 'error'),
    [
        ('none', None, 'map_to_odom_scale', "'map' -> 'odom' is not published: the map has no"),
        ('tf', 'elsewhere', 'map_to_odom_taken', "'odom' has the parent 'elsewhere'"),
        ('tf', 'map', 'map_to_odom_taken', "'odom' has the parent 'map'"),
        ('fixed', None, 'map_to_odom_tf', "'odom' and 'camera' are not connected"),
    ],
)
def test_map_to_odom_is_not_published_without_its_inputs(idle, robot, scale, parent, kind, error):
    start_map_to_odom(idle, robot, scale_source=scale)
    if scale != 'fixed':
        robot.send('tf', range(SIZE))
    if parent:
        robot.send_transform(parent, 'odom', BASE_NS, np.eye(4), 'tf_static')
    idle.spin_for(0.3)
    before = idle.node_process.output().count(error)
    idle.send(range(SIZE))
    idle.wait_windows(1)
    idle.wait_health(**{kind: 1})
    assert idle.node_process.output().count(error) > before
    idle.spin_for(0.3)
    assert not any(t.header.frame_id == 'map' for m in idle.got['tf'] for t in m.transforms)


def test_map_to_odom_stops_when_another_node_publishes_it(idle, robot):
    start_map_to_odom(idle, robot, scale_source='tf')
    robot.send('tf', range(SIZE))
    idle.send(range(SIZE))
    idle.wait_windows(1)
    map_from(idle, 'odom')
    robot.send_transform('elsewhere', 'odom', BASE_NS, np.eye(4), 'tf_static')
    idle.spin_for(0.3)
    later = range(SIZE, SIZE + STRIDE)
    robot.send('tf', later)
    idle.send(later)
    idle.wait_windows(2)
    idle.wait_health(map_to_odom_taken=1)
    idle.spin_for(0.3)
    idle.got['tf'].clear()
    idle.spin_for(0.5)
    assert not transforms_in_map(idle, 'odom')


RIGHT = 0.07  # delay of the right camera, periods


class Pair:
    """Two cameras on topics of their own, and the depth of the right one."""

    def __init__(self, driver):
        self.node = driver.node
        qos = QoSProfile(depth=100)
        self.publishers = {
            side: self.node.create_publisher(Image, f'/{side}/image', qos)
            for side in ('left', 'right')
        }
        self.depth = []
        self.subscription = self.node.create_subscription(
            Image, '/vggt/camera_1/depth/image_rect', self.depth.append, qos
        )

    def close(self):
        for publisher in self.publishers.values():
            self.node.destroy_publisher(publisher)
        self.node.destroy_subscription(self.subscription)

    def send(self, driver, numbers, sides=('left', 'right')):
        for number in numbers:
            for side in sides:
                late = RIGHT if side == 'right' else 0.0
                self.publishers[side].publish(make_image(number + late, frame=side))
            driver.spin_for(0.02)


@pytest.fixture
def pair(idle):
    made = Pair(idle)
    idle.set(image_topics='/left/image /right/image', camera_timeout=0.45)
    assert idle.change('configure', 'activate')
    for publisher in made.publishers.values():
        idle.settle(publisher)
    yield made
    made.close()
    idle.change('deactivate', 'cleanup')
    idle.set(image_topics='', camera_timeout=1.0)


def test_two_cameras_make_joint_windows(idle, pair):
    pair.send(idle, range(SIZE))
    report = idle.wait_windows(1)[0]
    assert report.camera_frames == ['left', 'right'] * SIZE
    stamps = [stamp_of(number + late) for number in range(SIZE) for late in (0, RIGHT)]
    assert [ns_from_time(stamp) for stamp in report.stamps] == stamps
    truth = true_cameras(stamps)
    expected = np.linalg.inv(truth[0]) @ truth
    found = np.stack([pose_matrix(pose) for pose in report.poses])
    found[:, :3, 3] *= np.linalg.norm(expected[-1, :3, 3]) / np.linalg.norm(found[-1, :3, 3])
    np.testing.assert_allclose(found, expected, atol=LIMIT)
    idle.spin_until(lambda: len(pair.depth) == SIZE, what='depth of the right camera')
    assert [ns_from_time(image.header.stamp) for image in pair.depth] == stamps[1::2]
    assert {image.header.frame_id for image in pair.depth} == {'right'}
    assert idle.got['depth/image_rect'] == []
    idle.spin_until(lambda: len(idle.got['odometry']) == SIZE, what='odometry')
    assert sorted(by_stamp(idle.got['odometry'])) == stamps[::2]
    idle.spin_until(lambda: idle.got['tf'], what='transforms')
    children = {t.child_frame_id for message in idle.got['tf'] for t in message.transforms}
    assert children == {f'vggt_camera_{k}_{i}' for k in (0, 1) for i in range(SIZE)}


def test_a_silent_camera_is_left_out_until_its_next_image(idle, pair):
    pair.send(idle, range(SIZE))
    idle.wait_windows(1)
    error = "no image on '/right/image' for 0."
    before = idle.node_process.output().count(error)
    pair.send(idle, range(SIZE, SIZE + STRIDE), sides=('left',))
    report = idle.wait_windows(2)[1]
    assert report.map_id == 0
    assert report.camera_frames == ['left', 'right'] * (SIZE - STRIDE) + ['left'] * STRIDE
    assert idle.node_process.output().count(error) == before + 1
    idle.wait_health(silent_camera=1)
    pair.send(idle, range(SIZE + STRIDE, SIZE + 2 * STRIDE))
    report = idle.wait_windows(3)[2]
    assert report.map_id == 0
    assert report.camera_frames[-2 * (STRIDE - 1) :] == ['left', 'right'] * (STRIDE - 1)


def test_publishers_are_reliable_and_image_subscriptions_best_effort(idle):
    idle.set(image_reliability='best_effort')
    assert idle.change('configure', 'activate')
    idle.settle()
    for topic in TOPICS:
        info = idle.node.get_publishers_info_by_topic(resolve_private(topic))
        assert [end.qos_profile.reliability for end in info] == [QoSReliabilityPolicy.RELIABLE]
    ends = idle.node.get_subscriptions_info_by_topic('/image_raw')
    assert [end.qos_profile.reliability for end in ends] == [QoSReliabilityPolicy.BEST_EFFORT]
    idle.change('deactivate', 'cleanup')
    idle.set(image_reliability='reliable')


def test_compressed_images_are_an_option(idle):
    idle.set(image_transport='compressed')
    assert idle.change('configure', 'activate')
    idle.settle(idle.jpegs)
    image = np.zeros((48, 64, 3), np.uint8)
    image[:] = COLOUR[::-1]
    data = cv2.imencode('.png', image)[1].tobytes()
    for number in range(SIZE):
        header = builder.header('camera', stamp_of(number))
        idle.jpegs.publish(CompressedImage(header=header, format='png', data=data))
        if number == 3:
            header = builder.header('camera', stamp_of(number) + 1)
            idle.jpegs.publish(CompressedImage(header=header, format='png', data=data[:40]))
        idle.spin_for(0.02)
    idle.wait_windows(1)
    idle.spin_until(lambda: idle.got['points'], what='a cloud')
    colour = np.frombuffer(idle.got['points'][0].data, '<u4')[3]
    assert colour == COLOUR[0] << 16 | COLOUR[1] << 8 | COLOUR[2]
    idle.wait_health(bad_image_undecodable=1)
    idle.change('deactivate', 'cleanup')
    idle.set(image_transport='raw')


def test_a_frame_of_the_robot_is_not_given_a_second_parent(driver, node):
    driver.send(range(SIZE), frame='vggt_camera_2')
    driver.wait_windows(1)
    driver.spin_until(lambda: driver.got['tf'], what='transforms')
    children = [transform.child_frame_id for transform in driver.got['tf'][0].transforms]
    assert children == [f'vggt_camera_{i}' for i in range(SIZE) if i != 2]
    assert "transform to 'vggt_camera_2' is not published" in node.output()


def test_tf_can_be_the_newest_camera_only_or_nothing(idle):
    idle.set(tf_mode='newest')
    assert idle.change('configure', 'activate')
    idle.settle()
    idle.send(range(SIZE))
    idle.wait_windows(1)
    idle.spin_until(lambda: idle.got['tf'], what='a transform')
    (transform,) = idle.got['tf'][0].transforms
    assert transform.child_frame_id == 'vggt_camera'
    assert ns_from_time(transform.header.stamp) == stamp_of(SIZE - 1)
    idle.change('deactivate', 'cleanup')
    idle.set(tf_mode='off')
    assert idle.change('configure', 'activate')
    idle.settle()
    assert idle.node.count_publishers('/tf') == 0
    idle.change('deactivate', 'cleanup')
    idle.set(tf_mode='cameras')


# --- lifecycle


@pytest.mark.parametrize(
    ('bad', 'good', 'words'),
    [
        ({'checkpoint': 'missing'}, {'checkpoint': 'untrained'}, 'no such file'),
        ({'window_stride': SIZE}, {'window_stride': STRIDE}, 'less than window_size'),
        ({'resolution': 500}, {'resolution': 0}, 'multiple of 14'),
    ],
)
def test_configure_fails_with_one_line_and_the_node_stays_unconfigured(
    running, node, bad, good, words
):
    driver = running[1]
    assert driver.set(**bad).successful
    assert not driver.change('configure')
    assert driver.state() == 'unconfigured'
    (line,) = [line for line in node.output().splitlines() if words in line]
    assert 'configuration failed' in line
    assert driver.set(**good).successful
    assert driver.change('configure')


def test_settings_cannot_be_changed_while_they_are_in_use(driver):
    result = driver.set(window_size=12)
    assert not result.successful
    assert 'unconfigured' in result.reason


def test_twenty_cycles_leak_no_thread_and_no_memory(running, node):
    driver = running[1]
    threads, memory = [], []
    for cycle in range(20):
        assert driver.change('configure', 'activate')
        if cycle % 3 == 0:
            driver.settle()
            driver.send(range(SIZE))
            driver.wait_windows(1)
        assert driver.change('deactivate')
        if cycle % 4 == 0:
            assert driver.change('activate', 'deactivate')
        assert driver.change('cleanup')
        threads.append(node.status('Threads'))
        memory.append(node.status('VmRSS'))
    assert max(threads[4:]) <= min(threads[:4])
    assert memory[-1] - memory[4] < 10 * 1024, memory  # KiB


def test_a_slow_network_drops_images_and_no_window(tmp_path):
    with slow_node(tmp_path, 1.2) as (node, driver):
        figures = run_soak(node, driver, minutes=0.25)
    assert figures.windows >= 3
    assert figures.dropped > figures.sent / 4


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_node_in_the_middle_of_a_window(tmp_path, number):
    with slow_node(tmp_path, 30) as (node, driver):
        assert driver.change('configure', 'activate')
        driver.settle()
        driver.send(range(SIZE))
        driver.spin_for(0.2)
        code, seconds = node.leave(number)
        assert code == 0, node.output()
        assert seconds < 2
        assert 'exiting without the result' in node.output()
        assert 'Traceback' not in node.output()


def test_a_node_that_ends_leaves_no_shared_memory(tmp_path):
    """No other process is in its domain, so all of it is the node's."""
    node = NodeProcess(own_domain(Use.SLOW_NODE), tmp_path / 'log')
    try:
        deadline = time.monotonic() + 60
        while not node.shared_memory():
            assert time.monotonic() < deadline, node.output()
            time.sleep(0.05)
        time.sleep(1)  # until it spins
        used = node.shared_memory()
        assert node.leave()[0] == 0, node.output()
    finally:
        node.kill()
    assert not [name for name in used if Path(name).exists()]


@contextmanager
def slow_node(folder, seconds):
    domain = own_domain(Use.SLOW_NODE)
    node = NodeProcess(domain, folder / 'log', seconds=seconds)
    driver = Driver(node, domain, topics=('~/window', '~/poses'))
    try:
        yield node, driver
    finally:
        driver.close()
        node.kill()
