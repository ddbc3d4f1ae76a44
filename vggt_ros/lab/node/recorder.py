#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Receives what the camera and the node publish, then prints a table and draws one figure.

It stands for any consumer of the node: it has nothing but the messages. When the images have ended
and no more output comes, it prints counts, rates and latencies, compares the estimated trajectory
with the true one (after an alignment by one Sim(3), since monocular geometry has its own frame and
scale) and draws `demo.png`. The messages of the camera can be written to a bag for `reconstruct`.

    python3 -m vggt_ros.lab.node.recorder --output demo.png
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseArray, PoseStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.serialization import serialize_message
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.io import names
from vggt_ros.io.message_reading import decode_image, ns_from_time, read_cloud
from vggt_ros.io.message_types import PoseMessage
from vggt_ros.lab.evaluation.plots import RunFigure, draw_run
from vggt_ros.lab.evaluation.trajectory_errors import TrajectoryErrors, compare_trajectories
from vggt_ros.lab.node.topic_timing import TopicTiming, timing_table
from vggt_ros.msg import WindowReport
from vggt_ros.settings import UNTRAINED_WARNING

Poses = npt.NDArray[np.float64]  # (4, 4) or (S, 4, 4), world_from_camera
Pixels = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Points = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]  # positions and colours, (N, 3)

MAX_IMAGES = 200  # kept until the depth of one comes, seconds later
MAX_POINTS = 200_000
Z_UP_FROM_OPTICAL = Sim3(rotation=np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))


class NothingReceivedError(RuntimeError):
    """A message that the figure needs was not received."""


class BagWriter:
    """A bag (mcap) that is being written, without rosbag2, which may not be installed."""

    def __init__(self, folder: Path) -> None:
        """
        Begin a bag.

        :param folder: to be made; a bag of this name is replaced.
        :raises ValueError: if it exists and is not a bag.
        """
        if folder.exists():
            if not (folder / 'metadata.yaml').exists():
                raise ValueError(f'{folder} exists and is not a bag; expected a new folder')
            shutil.rmtree(folder)
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Connection] = {}

    def write(self, topic: str, message: Any) -> None:
        """Write a message that has a header, at its stamp."""
        if topic not in self._connections:
            package = type(message).__module__.partition('.')[0]
            kind = f'{package}/msg/{type(message).__name__}'
            self._connections[topic] = self._writer.add_connection(
                topic, kind, typestore=self._store
            )
        stamp_ns = ns_from_time(message.header.stamp)
        self._writer.write(self._connections[topic], stamp_ns, serialize_message(message))

    def close(self) -> None:
        """Finish the bag."""
        self._writer.close()


@dataclass
class RecordedRun:
    """The content of the messages that the figure needs. Times are stamps in nanoseconds."""

    truth: dict[int, Poses] = field(default_factory=dict)  # (4, 4) by time
    maps: dict[int, dict[int, Poses]] = field(default_factory=dict)  # map id: (4, 4) by time
    reports: list[WindowReport] = field(default_factory=list)
    images: dict[int, Pixels] = field(default_factory=dict)  # by time, the newest few
    pair: tuple[Pixels, npt.NDArray[np.float32]] | None = None  # image and depth, the latest
    clouds: dict[int, Points] = field(default_factory=dict)  # by time of the frame


class Recorder(Node):
    """Subscribes to all topics of the node, times them and keeps what the figure needs."""

    def __init__(self, target: str, bag: BagWriter | None = None) -> None:
        super().__init__('recorder')
        self._bag = bag  # receives the messages of the camera
        self.recording = RecordedRun()
        self.timing: dict[str, TopicTiming] = {}
        self.last_arrival: float | None = None  # monotonic s, of an image or an output
        self._outputs = [
            names.resolve_private(topic, target)
            for topic in (names.WINDOW, names.POINTS, names.DEPTH)
        ]
        for topic, kind, keep in (
            (names.TRUTH, PoseStamped, self._keep_truth),
            (names.WINDOW, WindowReport, self._keep_report),
            (names.POSES, PoseArray, None),
            (names.ODOMETRY, Odometry, None),
            (names.PATH, PathMessage, None),
            (names.DEPTH, Image, self._keep_depth),
            (names.CONFIDENCE, Image, None),
            (names.DEPTH_CAMERA_INFO, CameraInfo, None),
            (names.POINTS, PointCloud2, self._keep_cloud),
            (names.TF, TFMessage, None),
            (names.DIAGNOSTICS, DiagnosticArray, None),
        ):
            self._subscribe(names.resolve_private(topic, target), kind, keep)

    def wait_for_publishers(self, timeout: float) -> None:
        """
        Wait for the publishers of the node, then subscribe to the images.

        The camera starts when it has its subscribers: so no output is missed.

        :raises NothingReceivedError: if a publisher is missing at the end.
        """
        deadline = time.monotonic() + timeout
        while missing := [name for name in self._outputs if not self.count_publishers(name)]:
            if time.monotonic() > deadline:
                raise NothingReceivedError(
                    f'no publisher of {missing[0]} after {timeout:.0f} s: is the node active?'
                )
            time.sleep(0.05)
        self._subscribe(names.IMAGE, Image, self._keep_image)
        if self._bag is not None:
            write = partial(self._bag.write, f'/{names.CAMERA_INFO}')
            self._subscribe(names.CAMERA_INFO, CameraInfo, write)

    def is_over(self, quiet: float) -> bool:
        """Tell whether outputs have come, and then nothing for so many seconds."""
        if self.last_arrival is None or not self.recording.reports:
            return False
        return time.monotonic() - self.last_arrival > quiet

    def _subscribe(self, topic: str, kind: Any, keep: Callable[[Any], None] | None) -> None:
        name = self.resolve_topic_name(topic)
        self.timing[name] = TopicTiming()
        self.create_subscription(kind, name, partial(self._receive, name, keep), 100)

    def _receive(self, name: str, keep: Callable[[Any], None] | None, message: Any) -> None:
        source = message.transforms[-1] if isinstance(message, TFMessage) else message
        arrival_ns = self.get_clock().now().nanoseconds
        self.timing[name].add(arrival_ns, ns_from_time(source.header.stamp))
        if not isinstance(message, DiagnosticArray):
            self.last_arrival = time.monotonic()
        if keep is not None:
            keep(message)

    def _keep_truth(self, message: PoseStamped) -> None:
        self.recording.truth[ns_from_time(message.header.stamp)] = _pose_matrix(message.pose)
        if self._bag is not None:
            self._bag.write(f'/{names.TRUTH}', message)

    def _keep_image(self, message: Image) -> None:
        images = self.recording.images
        images[ns_from_time(message.header.stamp)] = decode_image(message)
        if self._bag is not None:
            self._bag.write(f'/{names.IMAGE}', message)
        if len(images) > MAX_IMAGES:
            del images[next(iter(images))]

    def _keep_report(self, message: WindowReport) -> None:
        self.recording.reports.append(message)
        cameras = self.recording.maps.setdefault(message.map_id, {})
        for stamp, pose in zip(message.stamps, message.poses, strict=True):
            cameras[ns_from_time(stamp)] = _pose_matrix(pose)

    def _keep_depth(self, message: Image) -> None:
        image = self.recording.images.get(ns_from_time(message.header.stamp))
        if image is not None:
            rows = np.frombuffer(message.data, np.float32).reshape(message.height, -1)
            self.recording.pair = (image, rows[:, : message.width])

    def _keep_cloud(self, message: PointCloud2) -> None:
        xyz, rgb, _ = read_cloud(message)
        self.recording.clouds[ns_from_time(message.header.stamp)] = (xyz, rgb)


def _pose_matrix(pose: PoseMessage) -> Poses:
    """Return (4, 4). In numpy: this process does without torch, whose import takes seconds."""
    t, q = pose.position, pose.orientation
    x, y, z, w = np.array([q.x, q.y, q.z, q.w]) / np.linalg.norm([q.x, q.y, q.z, q.w])
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), t.x],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), t.y],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), t.z],
            [0, 0, 0, 1],
        ]
    )


def write_summary(recorder: Recorder, output: Path) -> None:
    """
    Print the table and the errors, draw the figure.

    :raises NothingReceivedError: if a message that the figure needs was not received.
    """
    recording = recorder.recording
    table = timing_table(recorder.timing)
    print(f'\n{table}\n', flush=True)
    if recording.pair is None:
        raise NothingReceivedError('no depth image of a received image, nothing to draw')
    if not recording.reports or not recording.clouds:
        raise NothingReceivedError('no window report or no point cloud, nothing to draw')
    newest = recording.reports[-1]
    map_id = max(recording.maps, key=lambda key: len(recording.maps[key]))
    cameras = recording.maps[map_id]
    times = sorted(cameras)
    estimate = np.stack([cameras[when] for when in times])
    errors, note = _compare(recording, times, estimate)
    if not newest.model_trained:
        note += '\n(meaningless: the network is untrained)'
    aligned = Z_UP_FROM_OPTICAL if errors is None else errors.truth_from_estimate
    points, colours = _join_clouds(recording, map_id)
    image, depth = recording.pair
    title = (
        f'{len(recording.reports)} window(s) of {len(newest.stamps)} frames through '
        f'{newest.model}: {len(times)} cameras in the largest of {len(recording.maps)} map(s)'
    )
    warning = '' if newest.model_trained else UNTRAINED_WARNING
    truth = [recording.truth[when] for when in sorted(recording.truth)]
    run = RunFigure(
        title=f'vggt_ros: {title}',
        warning=warning,
        trajectory_note=note,
        unit='m' if errors is not None else 'units of the network',
        estimate=aligned.transform_poses(estimate),
        truth=np.stack(truth) if errors is not None else None,
        image=image,
        depth=aligned.scale * depth,
        cloud=aligned.apply(points),
        cloud_colours=colours,
        table=table,
    )
    draw_run(run, output)
    print(title, note.replace('\n', ' '), f'figure: {output}', sep='\n', flush=True)
    if warning:
        print(warning, flush=True)


def _compare(
    recording: RecordedRun, times: list[int], estimate: Poses
) -> tuple[TrajectoryErrors | None, str]:
    """Compare the estimate with the truth of the same stamps, and describe the result."""
    known = [i for i, when in enumerate(times) if when in recording.truth]
    if len(known) < 3:
        return None, f'no comparison: {len(known)} true poses have the stamp of an estimate'
    truth = np.stack([recording.truth[times[i]] for i in known])
    try:
        errors = compare_trajectories(truth, estimate[known])
    except ValueError as error:
        return None, f'no comparison with the truth: {error}'
    return errors, (
        f'errors after alignment by one Sim(3):\n'
        f'position {errors.position_rms:.3f} m rms = {errors.position_percent:.1f} % of '
        f'{errors.length:.2f} m,\nrotation {np.degrees(errors.rotation_median):.1f} deg (median)'
    )


def _join_clouds(recording: RecordedRun, map_id: int) -> Points:
    """Join the clouds of one map and subsample them evenly."""
    stamps = {
        ns_from_time(each.header.stamp) for each in recording.reports if each.map_id == map_id
    }
    chosen = [cloud for when, cloud in recording.clouds.items() if when in stamps]
    if not chosen:
        raise NothingReceivedError('no point cloud has the stamp of a window report')
    xyz = np.concatenate([points for points, _ in chosen])
    rgb = np.concatenate([colours for _, colours in chosen])
    step = max(1, -(-len(xyz) // MAX_POINTS))
    return xyz[::step], rgb[::step]


def main() -> int:
    """Record a run and write its summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=Path('demo.png'), help='the figure')
    parser.add_argument('--bag', type=Path, help='bag for the messages of the camera')
    parser.add_argument('--node', default=f'/{names.NODE}', help='full name of the node')
    parser.add_argument('--quiet', type=float, default=5.0, help='s without a message: the end')
    parser.add_argument('--timeout', type=float, default=120.0, help='s for the whole run')
    options = parser.parse_args()
    rclpy.init(args=[])
    deadline = time.monotonic() + options.timeout
    bag = None
    try:
        bag = None if options.bag is None else BagWriter(options.bag)
        recorder = Recorder(options.node, bag)
        recorder.wait_for_publishers(options.timeout)
        while not recorder.is_over(options.quiet) and time.monotonic() < deadline:
            rclpy.spin_once(recorder, timeout_sec=0.2)
        write_summary(recorder, options.output)
    except (NothingReceivedError, ValueError) as error:
        sys.stderr.write(f'the demo failed: {error}\n')
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        if bag is not None:
            bag.close()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
