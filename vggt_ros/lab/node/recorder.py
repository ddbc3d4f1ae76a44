#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Receives what the camera and the node publish, then prints a table and draws one picture.

It stands for any consumer of the node: it sees nothing but messages. It ends when the images
have ended and no more output comes, prints counts, rates and latencies, compares the estimated
path with the camera's truth (after a fit by one similarity transform, since monocular geometry
has a frame and a unit of its own) and draws `demo.png`. What the camera sent it keeps as a bag, if
asked, for `reconstruct`.

    python3 -m vggt_ros.lab.node.recorder --output demo.png
"""

from __future__ import annotations

import argparse
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
from geometry_msgs.msg import Pose, PoseArray, PoseStamped
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.io.message_reading import decode_image, read_cloud
from vggt_ros.lab.benchmarks.timing import TopicTiming, timing_table
from vggt_ros.lab.evaluation.plots import RunPicture, draw_run
from vggt_ros.lab.evaluation.trajectory import PathErrors, compare_paths
from vggt_ros.lab.node.bag_writer import BagWriter
from vggt_ros.msg import WindowReport

UNTRAINED = (
    'geometry is from an UNTRAINED network: the picture shows the pipeline, not a reconstruction'
)
IMAGES_KEPT = 200  # to find the image of a depth that comes seconds later
POINTS_KEPT = 200_000
Z_UP_FROM_OPTICAL = Sim3(rotation=np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))


class NothingReceivedError(RuntimeError):
    """A run without the messages that there must be."""


@dataclass
class RecordedRun:
    """What the picture and the errors need of all messages. Times are stamps in nanoseconds."""

    truth: dict[int, Any] = field(default_factory=dict)  # (4, 4) by time
    maps: dict[int, dict[int, Any]] = field(default_factory=dict)  # map id: (4, 4) by time
    reports: list[Any] = field(default_factory=list)
    images: dict[int, Any] = field(default_factory=dict)  # (H, W, 3) by time, the newest few
    pair: tuple[Any, Any] | None = None  # image and its depth, the latest
    clouds: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # by time of the window


class Recorder(Node):
    """Subscribes to everything, counts it and keeps what is needed."""

    def __init__(self, target: str, bag: BagWriter | None = None) -> None:
        super().__init__('recorder')
        self._bag = bag  # takes what comes from the camera
        self.recording = RecordedRun()
        self.timing: dict[str, TopicTiming] = {}
        self.last_arrival: float | None = None  # monotonic s, of an image or a result
        self._outputs = [f'{target}/window', f'{target}/points', f'{target}/depth/image_rect']
        for topic, kind, keep in (
            ('truth', PoseStamped, self._keep_truth),
            (f'{target}/window', WindowReport, self._keep_report),
            (f'{target}/poses', PoseArray, None),
            (f'{target}/odometry', Odometry, None),
            (f'{target}/path', PathMessage, None),
            (f'{target}/depth/image_rect', Image, self._keep_depth),
            (f'{target}/depth/confidence', Image, None),
            (f'{target}/depth/camera_info', CameraInfo, None),
            (f'{target}/points', PointCloud2, self._keep_cloud),
            ('/tf', TFMessage, None),
            ('/diagnostics', DiagnosticArray, None),
        ):
            self._subscribe(topic, kind, keep)

    def wait_for_node(self, timeout: float) -> None:
        """
        Subscribe to the images only when the node's publishers are there.

        The camera starts when it has its subscribers: so nothing is missed at the start.
        """
        deadline = time.monotonic() + timeout
        while missing := [name for name in self._outputs if not self.count_publishers(name)]:
            if time.monotonic() > deadline:
                raise NothingReceivedError(
                    f'nobody publishes {missing[0]} after {timeout:.0f} s: is the node active?'
                )
            time.sleep(0.05)
        self._subscribe('image_raw', Image, self._keep_image)
        if self._bag is not None:
            self._subscribe('camera_info', CameraInfo, partial(self._bag.write, '/camera_info'))

    def is_over(self, quiet: float) -> bool:
        """Say whether results have come, and then nothing at all for some seconds."""
        if self.last_arrival is None or not self.recording.reports:
            return False
        return time.monotonic() - self.last_arrival > quiet

    def _subscribe(self, topic: str, kind: Any, keep: Callable[[Any], None] | None) -> None:
        name = self.resolve_topic_name(topic)
        self.timing[name] = TopicTiming()
        self.create_subscription(kind, name, partial(self._receive, name, keep), 100)

    def _receive(self, name: str, keep: Callable[[Any], None] | None, message: Any) -> None:
        source = message.transforms[-1] if isinstance(message, TFMessage) else message
        self.timing[name].add(self.get_clock().now().nanoseconds, _ns(source.header.stamp))
        if not isinstance(message, DiagnosticArray):
            self.last_arrival = time.monotonic()
        if keep is not None:
            keep(message)

    def _keep_truth(self, message: PoseStamped) -> None:
        self.recording.truth[_ns(message.header.stamp)] = _pose_matrix(message.pose)
        if self._bag is not None:
            self._bag.write('/truth', message)

    def _keep_image(self, message: Image) -> None:
        images = self.recording.images
        images[_ns(message.header.stamp)] = decode_image(message)
        if self._bag is not None:
            self._bag.write('/image_raw', message)
        if len(images) > IMAGES_KEPT:
            del images[next(iter(images))]

    def _keep_report(self, message: WindowReport) -> None:
        self.recording.reports.append(message)
        cameras = self.recording.maps.setdefault(message.map_id, {})
        for stamp, pose in zip(message.stamps, message.poses, strict=True):
            cameras[_ns(stamp)] = _pose_matrix(pose)

    def _keep_depth(self, message: Image) -> None:
        image = self.recording.images.get(_ns(message.header.stamp))
        if image is not None:
            rows = np.frombuffer(message.data, np.float32).reshape(message.height, -1)
            self.recording.pair = (image, rows[:, : message.width])

    def _keep_cloud(self, message: PointCloud2) -> None:
        xyz, rgb, _ = read_cloud(message)
        self.recording.clouds[_ns(message.header.stamp)] = (xyz, rgb)


def _ns(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def _pose_matrix(pose: Pose) -> npt.NDArray[np.float64]:
    """Return (4, 4). In numpy: this process needs no torch, whose import takes seconds."""
    turn, place = pose.orientation, pose.position
    x, y, z, w = np.array([turn.x, turn.y, turn.z, turn.w]) / np.linalg.norm(
        [turn.x, turn.y, turn.z, turn.w]
    )
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), place.x],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), place.y],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), place.z],
            [0, 0, 0, 1],
        ]
    )


def report(recorder: Recorder, output: Path) -> None:
    """
    Print the table and the errors, draw the picture.

    :raises NothingReceivedError: if a part of it did not come.
    """
    recording = recorder.recording
    table = timing_table(recorder.timing)
    print(f'\n{table}\n', flush=True)
    for name, found in (
        ('window report', recording.reports),
        ('depth image of an image that was received', recording.pair),
        ('point cloud', recording.clouds),
    ):
        if not found:
            raise NothingReceivedError(f'no {name} arrived: there is nothing to draw')
    newest = recording.reports[-1]
    map_id = max(recording.maps, key=lambda key: len(recording.maps[key]))
    cameras = recording.maps[map_id]
    times = sorted(cameras)
    estimate = np.stack([cameras[when] for when in times])
    errors, note = _compare(recording, times, estimate)
    if not newest.model_trained:
        note += '\n(meaningless: the network is untrained)'
    moved = Z_UP_FROM_OPTICAL if errors is None else errors.truth_from_estimate
    points, colours = _join_clouds(recording, map_id)
    image, depth = recording.pair
    title = (
        f'{len(recording.reports)} window(s) of {len(newest.stamps)} frames through '
        f'{newest.model}: {len(times)} cameras in the largest of {len(recording.maps)} map(s)'
    )
    warning = '' if newest.model_trained else UNTRAINED
    truths = [recording.truth[when] for when in sorted(recording.truth)]
    run = RunPicture(
        title=f'vggt_ros: {title}',
        warning=warning,
        path_note=note,
        unit='m' if errors is not None else 'units of the network',
        estimate=moved.transform_poses(estimate),
        truth=np.stack(truths) if errors is not None else None,
        image=image,
        depth=moved.scale * depth,
        cloud=moved.apply(points),
        cloud_colours=colours,
        table=table,
    )
    draw_run(run, output)
    print(title, note.replace('\n', ' '), f'picture: {output}', sep='\n', flush=True)
    if warning:
        print(warning, flush=True)


def _compare(
    recording: RecordedRun, times: list[int], estimate: npt.NDArray[np.float64]
) -> tuple[PathErrors | None, str]:
    """Fit the estimate to the truth of the same stamps and put the result into words."""
    known = [i for i, when in enumerate(times) if when in recording.truth]
    if len(known) < 3:
        return None, f'no comparison: {len(known)} true poses have the stamp of an estimate'
    truth = np.stack([recording.truth[times[i]] for i in known])
    try:
        errors = compare_paths(truth, estimate[known])
    except ValueError as error:
        return None, f'no comparison with the truth: {error}'
    return errors, (
        f'estimate fitted to the truth by one Sim(3); what remains:\n'
        f'position {errors.position_rms:.3f} m rms = {errors.position_percent:.1f} % of '
        f'{errors.length:.2f} m,\nrotation {np.degrees(errors.rotation_median):.1f} deg (median)'
    )


def _join_clouds(recording: RecordedRun, map_id: int) -> tuple[Any, Any]:
    """Join the clouds of one map, dropped evenly."""
    stamps = {_ns(one.header.stamp) for one in recording.reports if one.map_id == map_id}
    chosen = [cloud for when, cloud in recording.clouds.items() if when in stamps]
    if not chosen:
        raise NothingReceivedError('no point cloud has the stamp of a window report')
    points, colours = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
    step = max(1, -(-len(points) // POINTS_KEPT))
    return points[::step], colours[::step]


def main() -> int:
    """Record a run, then report it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=Path('demo.png'), help='the picture')
    parser.add_argument('--bag', type=Path, help="bag to make of the camera's messages")
    parser.add_argument('--node', default='/vggt', help='full name of the node')
    parser.add_argument('--quiet', type=float, default=5.0, help='s without a message: the end')
    parser.add_argument('--timeout', type=float, default=120.0, help='s for everything')
    options = parser.parse_args()
    rclpy.init(args=[])
    deadline = time.monotonic() + options.timeout
    bag = None
    try:
        bag = None if options.bag is None else BagWriter(options.bag)
        recorder = Recorder(options.node, bag)
        recorder.wait_for_node(options.timeout)
        while not recorder.is_over(options.quiet) and time.monotonic() < deadline:
            rclpy.spin_once(recorder, timeout_sec=0.2)
        report(recorder, options.output)
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
