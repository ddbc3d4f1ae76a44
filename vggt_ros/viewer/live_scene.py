# SPDX-License-Identifier: Apache-2.0
"""
What a running node publishes, gathered into a scene for the viewer.

Points lie where they were published, also if the node later moves its windows (a loop closed) or
finds another scale; cameras are where the newest report that has them says. Only one map is kept,
the newest. Memory is bounded: beyond the limits, every second point of all frames is given up, and
the oldest cameras with their points.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, PointCloud2

from vggt_ros.geometry.poses import matrices_from_poses, pose_from_message
from vggt_ros.io.message_reading import (
    ImageError,
    decode_compressed,
    decode_image,
    ns_from_time,
    read_cloud,
)
from vggt_ros.msg import WindowReport
from vggt_ros.ros.publish import make_qos
from vggt_ros.viewer.scene import (
    MOST_CAMERAS,
    MOST_POINTS,
    THUMBNAIL_WIDTH,
    Array,
    Pixels,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)
from vggt_ros.viewer.viewer import Viewer, follow

_IMAGES_KEPT = 600  # thumbnails that wait for the window that has them
_CLOUDS_KEPT = 200  # that wait for their window
_BLANK = 215  # grey of a camera without a picture
_NOTHING = (
    np.zeros((0, 3), np.float32),
    np.zeros((0, 3), np.uint8),
    np.zeros(0, np.float32),
)

Cloud = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]


@dataclass
class _Seen:
    """A frame of the map."""

    camera: SceneCamera
    clouds: list[Cloud] = field(default_factory=list)


class LiveScene:
    """
    The scene so far. One thread feeds and asks it.

    :param name: of the node, for the title.
    """

    def __init__(
        self, name: str, most_points: int = MOST_POINTS, most_cameras: int = MOST_CAMERAS
    ) -> None:
        self._name = name
        self._most_points, self._most_cameras = most_points, most_cameras
        self._images: dict[int, Pixels] = {}  # by stamp
        self._early: dict[int, list[Cloud]] = defaultdict(list)  # by stamp, before their window
        self._report: WindowReport | None = None
        self._frames: dict[int, _Seen] = {}  # by id, oldest first
        self._every = 1  # so many points of a cloud become one
        self._changed = False

    def take_image(self, message: Image | CompressedImage) -> None:
        """
        Keep a thumbnail until its window comes.

        :raises ImageError: if the image cannot be decoded.
        """
        decode = decode_compressed if isinstance(message, CompressedImage) else decode_image
        image, _ = make_thumbnail(decode(message), np.eye(3))
        self._images[ns_from_time(message.header.stamp)] = image
        if len(self._images) > _IMAGES_KEPT:
            del self._images[next(iter(self._images))]

    def take_points(self, message: PointCloud2) -> None:
        """Keep a cloud with the frame of its stamp; it may come before the report does."""
        stamp_ns = ns_from_time(message.header.stamp)
        xyz, rgb, confidence = read_cloud(message)
        cloud = (xyz[:: self._every], rgb[:: self._every], confidence[:: self._every])
        for seen in self._frames.values():
            if seen.camera.stamp_ns == stamp_ns:
                seen.clouds.append(cloud)
                self._changed = True
                self._thin()
                return
        self._early[stamp_ns].append(cloud)
        if len(self._early) > _CLOUDS_KEPT:
            del self._early[next(iter(self._early))]

    def take_window(self, report: WindowReport) -> None:
        """Place the cameras of a window; that of another map, or of a new run, starts anew."""
        before = self._report
        if before and (report.map_id != before.map_id or report.window_id <= before.window_id):
            self._frames.clear()
            self._every = 1
        self._report = report
        poses = matrices_from_poses(
            np.array([pose_from_message(pose.position, pose.orientation) for pose in report.poses])
        )
        lenses = np.array(report.intrinsics, np.float64).reshape(-1, 3, 3)
        for i, number in enumerate(report.frame_ids):
            self._place(number, ns_from_time(report.stamps[i]), poses[i], lenses[i])
        while len(self._frames) > self._most_cameras:
            del self._frames[next(iter(self._frames))]
        self._changed = True
        self._thin()

    def newest(self) -> ViewerScene | None:
        """Return the scene, or None if nothing has come since it was asked for."""
        if not self._changed or self._report is None:
            return None
        self._changed = False
        report = self._report
        order = sorted(self._frames.values(), key=lambda seen: seen.camera.stamp_ns)
        clouds = [(i, cloud) for i, seen in enumerate(order) for cloud in seen.clouds]
        parts = [cloud for _, cloud in clouds] or [_NOTHING]
        xyz, rgb, confidence = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ViewerScene(
            title=f'{self._name}: {report.model}, map {report.map_id}',
            warning=_warning(report),
            unit='m' if report.scale_valid else 'units of the network',
            cameras=tuple(seen.camera for seen in order),
            xyz=xyz,
            rgb=rgb,
            confidence=confidence,
            frame=np.repeat(
                np.array([i for i, _ in clouds], np.int32),
                [len(cloud[0]) for _, cloud in clouds],
            ),
        )

    def _place(self, number: int, stamp_ns: int, pose: Array, lens: Array) -> None:
        assert self._report is not None
        size = (self._report.height, self._report.width)
        there = self._frames.get(number)
        if there is not None:
            old = there.camera
            there.camera = SceneCamera(stamp_ns, pose, old.intrinsics, old.image)
            return
        image, intrinsics = _picture(self._images.get(stamp_ns), lens, *size)
        camera = SceneCamera(stamp_ns, pose, intrinsics, image)
        self._frames[number] = _Seen(camera, self._early.pop(stamp_ns, []))

    def _thin(self) -> None:
        while self._count() > self._most_points:
            self._every *= 2
            for seen in self._frames.values():
                seen.clouds = [(a[::2], b[::2], c[::2]) for a, b, c in seen.clouds]

    def _count(self) -> int:
        return sum(len(cloud[0]) for seen in self._frames.values() for cloud in seen.clouds)


def _picture(image: Pixels | None, lens: Array, height: int, width: int) -> tuple[Pixels, Array]:
    """
    Cut a thumbnail to the shape of the depth image, whose camera is known; grey if there is none.

    The camera's picture is taken as it comes, not rectified: it is there to be recognised.
    """
    if image is None:
        rows = max(round(THUMBNAIL_WIDTH * height / width), 1)
        image = np.full((rows, THUMBNAIL_WIDTH, 3), _BLANK, np.uint8)
    rows, columns = image.shape[:2]
    kept_rows = min(rows, max(round(columns * height / width), 1))
    kept_columns = min(columns, max(round(rows * width / height), 1))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    cut = image[top : top + kept_rows, left : left + kept_columns]
    return cut, np.diag([kept_columns / width, kept_rows / height, 1.0]) @ lens


def _warning(report: WindowReport) -> str:
    parts = []
    if not report.model_trained:
        parts.append('the network is untrained: what is seen here means nothing')
    if not report.aligned:
        parts.append(f'the newest window does not fit the map: {report.rejection_reason}')
    return '; '.join(parts)


class SceneListener(Node):
    """
    Subscribes to a running node and feeds a live scene.

    :param target: full name of the node, such as `/vggt`.
    :param image_topic: of the camera, for the pictures; one that ends in `/compressed` carries
        JPEG or PNG. '': no pictures.
    """

    def __init__(self, target: str, image_topic: str = '', **how: Any) -> None:
        super().__init__('viewer', **how)
        self.scene = LiveScene(target)
        qos = make_qos('reliable', 100)
        self.create_subscription(PointCloud2, f'{target}/points', self._take_points, qos)
        self.create_subscription(WindowReport, f'{target}/window', self.scene.take_window, qos)
        if image_topic:
            kind = CompressedImage if image_topic.endswith('/compressed') else Image
            self.create_subscription(kind, image_topic, self._take_image, qos_profile_sensor_data)

    def _take_points(self, message: PointCloud2) -> None:
        try:
            self.scene.take_points(message)
        except ValueError as error:
            self.get_logger().warning(f'a cloud is left out: {error}', once=True)

    def _take_image(self, message: Image | CompressedImage) -> None:
        try:
            self.scene.take_image(message)
        except ImageError as error:
            self.get_logger().warning(f'an image is left out: {error}', once=True)


def watch_node(target: str, image_topic: str, viewer: Viewer, period: float = 1.0) -> None:
    """
    Show what a node publishes until Ctrl-C or the end of ROS.

    :param period: s between two pictures.
    """
    rclpy.init(args=[])
    try:
        listener = SceneListener(target, image_topic)

        def read() -> ViewerScene | None:
            deadline = time.monotonic() + period
            while (left := deadline - time.monotonic()) > 0:
                rclpy.spin_once(listener, timeout_sec=left)
            return listener.scene.newest()

        follow(read, viewer, period=0.0)
    except ExternalShutdownException:
        pass
    finally:
        rclpy.try_shutdown()
