# SPDX-License-Identifier: Apache-2.0
"""
A finished map as a bag (mcap) of the topics that the node publishes, for RViz and Foxglove.

All poses are the final ones: loop closures are applied from the first message on. One message per
frame on `odometry`, `depth/image_rect`, `depth/camera_info`, `points`, `image/compressed` and /tf;
`path` is written a hundred times. Needs no ROS: `rosbags` has the messages.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vggt_ros.geometry.poses import Array
from vggt_ros.io import names
from vggt_ros.io.message_building import MessageBuilder
from vggt_ros.io.message_types import HeaderMessage

_PATHS = 100
_IMAGE = names.compressed_topic('~/image')
_TOPICS = {
    names.ODOMETRY: 'nav_msgs/msg/Odometry',
    names.PATH: 'nav_msgs/msg/Path',
    names.DEPTH: 'sensor_msgs/msg/Image',
    names.DEPTH_CAMERA_INFO: 'sensor_msgs/msg/CameraInfo',
    names.POINTS: 'sensor_msgs/msg/PointCloud2',
    _IMAGE: 'sensor_msgs/msg/CompressedImage',
    names.TF: 'tf2_msgs/msg/TFMessage',
}


class MapBag:
    """A bag that is being written; use it in a `with` statement."""

    def __init__(self, folder: Path, stamps_ns: list[int], world_from_camera: Array) -> None:
        """
        Prepare a bag.

        :param folder: to be made; it must not exist.
        :param stamps_ns: of the S frames, in order.
        :param world_from_camera: (S, 4, 4).
        """
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._build = MessageBuilder(self._store.types, lambda values: values)
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._stamps_ns = stamps_ns
        self._poses = self._build.poses(world_from_camera)
        self._path_stride = max(1, len(stamps_ns) // _PATHS)
        self._open = ExitStack()

    def __enter__(self) -> MapBag:
        self._open.enter_context(self._writer)
        self._connections = {
            topic: self._writer.add_connection(
                names.resolve_private(topic), kind, typestore=self._store
            )
            for topic, kind in _TOPICS.items()
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def write_frame(
        self,
        i: int,
        camera_frame: str,
        image: bytes,
        depth: npt.NDArray[np.float32],
        intrinsics: Array,
    ) -> None:
        """
        Write all messages of a frame but its points.

        :param image: JPEG, b'' for none.
        :param depth: (H, W), NaN where it is not valid.
        :param intrinsics: (3, 3), pixels of the depth image.
        """
        build, pose = self._build, self._poses[i]
        in_world = self._world_header(i)
        in_camera = build.header(camera_frame, self._stamps_ns[i])
        self._write(names.ODOMETRY, i, build.odometry(in_world, names.CAMERA_FRAME, pose))
        transform = build.transform(in_world, names.CAMERA_FRAME, pose)
        self._write(names.TF, i, build.transforms([transform]))
        if image:
            self._write(_IMAGE, i, build.compressed_image(in_camera, 'jpeg', image))
        self._write(names.DEPTH, i, build.float_image(in_camera, depth))
        info = build.camera_info(in_camera, intrinsics, *depth.shape)
        self._write(names.DEPTH_CAMERA_INFO, i, info)
        if i % self._path_stride == 0 or i == len(self._stamps_ns) - 1:
            poses = [
                build.stamped_pose(self._world_header(j), self._poses[j])
                for j in range(0, i + 1, self._path_stride)
            ]
            self._write(names.PATH, i, build.path(in_world, poses))

    def write_points(
        self,
        i: int,
        xyz: npt.NDArray[np.float32],
        rgb: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
    ) -> None:
        """Write the points (N, 3) of a frame, in the world frame."""
        cloud = self._build.point_cloud(self._world_header(i), xyz, rgb, confidence)
        self._write(names.POINTS, i, cloud)

    def _world_header(self, i: int) -> HeaderMessage:
        return self._build.header(names.WORLD_FRAME, self._stamps_ns[i])

    def _write(self, topic: str, i: int, message: Any) -> None:
        data = self._store.serialize_cdr(message, _TOPICS[topic])
        self._writer.write(self._connections[topic], self._stamps_ns[i], data)
