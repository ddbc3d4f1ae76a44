# SPDX-License-Identifier: Apache-2.0
"""
The published map of a running node, collected into a scene for the viewer.

Points stay where they were published, also if the node later corrects its windows (a closed loop)
or measures another scale; cameras have the poses of the latest report. Only the latest map is
kept. Memory is bounded: beyond the limits, every second point of all frames is removed, and the
oldest cameras with their points.
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
from vggt_ros.io import names
from vggt_ros.io.message_reading import (
    ImageError,
    decode_compressed,
    decode_image,
    ns_from_time,
    read_cloud,
)
from vggt_ros.msg import WindowReport
from vggt_ros.ros.qos import make_qos
from vggt_ros.settings import UNTRAINED_WARNING
from vggt_ros.viewer.scene import (
    MAX_CAMERAS,
    MAX_POINTS,
    THUMBNAIL_WIDTH,
    Array,
    Pixels,
    SceneCamera,
    ViewerScene,
    make_thumbnail,
)
from vggt_ros.viewer.viewer import Viewer, follow

_MAX_IMAGES = 600  # thumbnails that wait for their window
_MAX_CLOUDS = 200  # that wait for their window
_BLANK = 215  # grey level of a camera without an image
_NO_POINTS = (
    np.zeros((0, 3), np.float32),
    np.zeros((0, 3), np.uint8),
    np.zeros(0, np.float32),
)

Cloud = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]


@dataclass
class _MappedFrame:
    """A frame of the map."""

    camera: SceneCamera
    clouds: list[Cloud] = field(default_factory=list)


class LiveScene:
    """
    The scene so far; for one thread.

    :param name: of the node, for the title.
    """

    def __init__(
        self, name: str, max_points: int = MAX_POINTS, max_cameras: int = MAX_CAMERAS
    ) -> None:
        self._name = name
        self._max_points, self._max_cameras = max_points, max_cameras
        self._images: dict[int, Pixels] = {}  # by stamp
        self._early: dict[int, list[Cloud]] = defaultdict(list)  # by stamp, before their window
        self._report: WindowReport | None = None
        self._frames: dict[int, _MappedFrame] = {}  # by id, oldest first
        self._point_stride = 1  # one of so many points is kept
        self._changed = False

    @property
    def image_count(self) -> int:
        """Number of thumbnails that are kept."""
        return len(self._images)

    @property
    def point_count(self) -> int:
        """Number of points in the scene."""
        return sum(len(cloud[0]) for frame in self._frames.values() for cloud in frame.clouds)

    def add_image(self, message: Image | CompressedImage) -> None:
        """
        Keep a thumbnail until its window comes.

        :raises ImageError: if the image cannot be decoded.
        """
        decode = decode_compressed if isinstance(message, CompressedImage) else decode_image
        image, _ = make_thumbnail(decode(message), np.eye(3))
        self._images[ns_from_time(message.header.stamp)] = image
        if len(self._images) > _MAX_IMAGES:
            del self._images[next(iter(self._images))]

    def add_points(self, message: PointCloud2) -> None:
        """
        Add a cloud to the frame of its stamp; it may come before the report.

        :raises ValueError: if it is not a cloud of the node.
        """
        stamp_ns = ns_from_time(message.header.stamp)
        xyz, rgb, confidence = read_cloud(message)
        stride = self._point_stride
        cloud = (xyz[::stride], rgb[::stride], confidence[::stride])
        for frame in self._frames.values():
            if frame.camera.stamp_ns == stamp_ns:
                frame.clouds.append(cloud)
                self._changed = True
                self._subsample()
                return
        self._early[stamp_ns].append(cloud)
        if len(self._early) > _MAX_CLOUDS:
            del self._early[next(iter(self._early))]

    def add_window(self, report: WindowReport) -> None:
        """Add the cameras of a window; another map, or another run, replaces the scene."""
        before = self._report
        if before and (report.map_id != before.map_id or report.window_id <= before.window_id):
            self._frames.clear()
            self._point_stride = 1
        self._report = report
        poses = matrices_from_poses(
            np.array([pose_from_message(pose.position, pose.orientation) for pose in report.poses])
        )
        intrinsics = np.array(report.intrinsics, np.float64).reshape(-1, 3, 3)
        size = (report.height, report.width)
        for i, frame_id in enumerate(report.frame_ids):
            stamp_ns = ns_from_time(report.stamps[i])
            self._add_camera(frame_id, stamp_ns, poses[i], intrinsics[i], size)
        while len(self._frames) > self._max_cameras:
            del self._frames[next(iter(self._frames))]
        self._changed = True
        self._subsample()

    def snapshot_if_changed(self) -> ViewerScene | None:
        """Return the scene, or None if it has not changed since the last call."""
        if not self._changed or self._report is None:
            return None
        self._changed = False
        report = self._report
        frames = sorted(self._frames.values(), key=lambda frame: frame.camera.stamp_ns)
        clouds = [(i, cloud) for i, frame in enumerate(frames) for cloud in frame.clouds]
        parts = [cloud for _, cloud in clouds] or [_NO_POINTS]
        xyz, rgb, confidence = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ViewerScene(
            title=f'{self._name}: {report.model}, map {report.map_id}',
            warning=_describe_problems(report),
            unit='m' if report.scale_valid else 'units of the network',
            cameras=tuple(frame.camera for frame in frames),
            xyz=xyz,
            rgb=rgb,
            confidence=confidence,
            frame=np.repeat(
                np.array([i for i, _ in clouds], np.int32),
                [len(cloud[0]) for _, cloud in clouds],
            ),
        )

    def _add_camera(
        self, frame_id: int, stamp_ns: int, pose: Array, intrinsics: Array, size: tuple[int, int]
    ) -> None:
        """Add a camera, or update its pose."""
        frame = self._frames.get(frame_id)
        if frame is not None:
            camera = frame.camera
            frame.camera = SceneCamera(stamp_ns, pose, camera.intrinsics, camera.image)
            return
        image, scaled = _crop_thumbnail(self._images.get(stamp_ns), intrinsics, *size)
        camera = SceneCamera(stamp_ns, pose, scaled, image)
        self._frames[frame_id] = _MappedFrame(camera, self._early.pop(stamp_ns, []))

    def _subsample(self) -> None:
        while self.point_count > self._max_points:
            self._point_stride *= 2
            for frame in self._frames.values():
                frame.clouds = [(a[::2], b[::2], c[::2]) for a, b, c in frame.clouds]


def _crop_thumbnail(
    image: Pixels | None, intrinsics: Array, height: int, width: int
) -> tuple[Pixels, Array]:
    """
    Crop a thumbnail to the aspect ratio of the depth image; a blank one if there is no image.

    The image is not rectified: it only has to be recognised.

    :param intrinsics: (3, 3), of the depth image, whose size is `height` x `width`.
    :returns: the thumbnail and its intrinsics.
    """
    if image is None:
        rows = max(round(THUMBNAIL_WIDTH * height / width), 1)
        image = np.full((rows, THUMBNAIL_WIDTH, 3), _BLANK, np.uint8)
    rows, columns = image.shape[:2]
    kept_rows = min(rows, max(round(columns * height / width), 1))
    kept_columns = min(columns, max(round(rows * width / height), 1))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    cropped = image[top : top + kept_rows, left : left + kept_columns]
    return cropped, np.diag([kept_columns / width, kept_rows / height, 1.0]) @ intrinsics


def _describe_problems(report: WindowReport) -> str:
    problems = []
    if not report.model_trained:
        problems.append(UNTRAINED_WARNING)
    if not report.registered:
        problems.append(f'the latest window is not registered: {report.rejection_reason}')
    return '; '.join(problems)


class SceneListener(Node):
    """
    Subscribes to a running node and fills a live scene.

    :param target: full name of the node, such as `/vggt`.
    :param image_topic: of the camera, for the thumbnails; with the suffix `/compressed` it carries
        JPEG or PNG. '': no thumbnails.
    :param arguments: of rclpy's node.
    """

    def __init__(self, target: str, image_topic: str = '', **arguments: Any) -> None:
        super().__init__('viewer', **arguments)
        self.scene = LiveScene(target)
        qos = make_qos('reliable', 100)
        points, window = (
            names.resolve_private(topic, target) for topic in (names.POINTS, names.WINDOW)
        )
        self.create_subscription(PointCloud2, points, self._receive_points, qos)
        self.create_subscription(WindowReport, window, self.scene.add_window, qos)
        if image_topic:
            compressed = image_topic.endswith(names.compressed_topic(''))
            kind = CompressedImage if compressed else Image
            self.create_subscription(
                kind, image_topic, self._receive_image, qos_profile_sensor_data
            )

    def _receive_points(self, message: PointCloud2) -> None:
        try:
            self.scene.add_points(message)
        except ValueError as error:
            self.get_logger().warning(f'cloud ignored: {error}', once=True)

    def _receive_image(self, message: Image | CompressedImage) -> None:
        try:
            self.scene.add_image(message)
        except ImageError as error:
            self.get_logger().warning(f'image ignored: {error}', once=True)


def watch_node(target: str, image_topic: str, viewer: Viewer, period: float = 1.0) -> None:
    """
    Show the map of a running node until Ctrl-C or the shutdown of ROS.

    :param period: s between two updates of the viewer.
    """
    rclpy.init(args=[])
    try:
        listener = SceneListener(target, image_topic)

        def read() -> ViewerScene | None:
            deadline = time.monotonic() + period
            while (left := deadline - time.monotonic()) > 0:
                rclpy.spin_once(listener, timeout_sec=left)
            return listener.scene.snapshot_if_changed()

        follow(read, viewer, period=0.0)
    except ExternalShutdownException:
        pass
    finally:
        rclpy.try_shutdown()
