# SPDX-License-Identifier: Apache-2.0
"""
A finished map as a bag (mcap) of the topics that the node publishes, for RViz and Foxglove.

Everything is said by its final place, so what a loop has moved is right from the beginning. Per
frame: `odometry`, `depth/image_rect`, `depth/camera_info`, `points`, `/tf` and the picture;
`path` a hundred times. Needs no ROS: `rosbags` knows the messages.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import quaternion_from_matrix

WORLD, CAMERA = 'vggt_world', 'vggt_camera'
_PATHS = 100
_UNKNOWN = -1.0  # in covariance[0], as sensor_msgs/Imu has it
_KINDS = {
    '/vggt/odometry': 'nav_msgs/msg/Odometry',
    '/vggt/path': 'nav_msgs/msg/Path',
    '/vggt/depth/image_rect': 'sensor_msgs/msg/Image',
    '/vggt/depth/camera_info': 'sensor_msgs/msg/CameraInfo',
    '/vggt/points': 'sensor_msgs/msg/PointCloud2',
    '/vggt/image/compressed': 'sensor_msgs/msg/CompressedImage',
    '/tf': 'tf2_msgs/msg/TFMessage',
}
_POINT = np.dtype(
    [('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('rgb', '<u4'), ('confidence', '<f4')]
)
_FLOAT32 = 7  # sensor_msgs/PointField


class MapBag:
    """A bag that is being written; use it in a `with` statement."""

    def __init__(self, folder: Path, stamps_ns: list[int], world_from_camera: Array) -> None:
        """
        Say which cameras there are.

        :param folder: to be made; it must not be there.
        :param world_from_camera: (S, 4, 4), of the frames in the order of their stamps.
        """
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._stamps = stamps_ns
        turns = quaternion_from_matrix(torch.from_numpy(world_from_camera[:, :3, :3])).tolist()
        self._poses = list(zip(world_from_camera[:, :3, 3].tolist(), turns, strict=True))
        self._every = max(1, len(stamps_ns) // _PATHS)
        self._open = ExitStack()

    def __enter__(self) -> MapBag:
        self._open.enter_context(self._writer)
        self._topics = {
            topic: self._writer.add_connection(topic, kind, typestore=self._store)
            for topic, kind in _KINDS.items()
        }
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def write_frame(
        self,
        i: int,
        camera_frame: str,
        picture: bytes,
        depth: npt.NDArray[np.float32],
        intrinsics: Array,
    ) -> None:
        """
        Write what there is of a frame but its points.

        :param picture: JPEG, b'' for none.
        :param depth: (H, W), NaN where it is not trusted.
        :param intrinsics: (3, 3), pixels of the depth.
        """
        stamp = self._stamps[i]
        in_world, in_image = self._header(stamp, WORLD), self._header(stamp, camera_frame)
        pose = self._pose(i)
        unknown = np.zeros(36)
        unknown[0] = _UNKNOWN
        twist = self._make(
            'geometry_msgs/msg/Twist', linear=self._vector(), angular=self._vector()
        )
        self._write(
            '/vggt/odometry',
            stamp,
            header=in_world,
            child_frame_id=CAMERA,
            pose=self._make('geometry_msgs/msg/PoseWithCovariance', pose=pose, covariance=unknown),
            twist=self._make(
                'geometry_msgs/msg/TwistWithCovariance', twist=twist, covariance=unknown
            ),
        )
        x, y, z = self._poses[i][0]
        placed = self._make(
            'geometry_msgs/msg/TransformStamped',
            header=in_world,
            child_frame_id=CAMERA,
            transform=self._make(
                'geometry_msgs/msg/Transform',
                translation=self._vector(x, y, z),
                rotation=pose.orientation,
            ),
        )
        self._write('/tf', stamp, transforms=[placed])
        if picture:
            data = np.frombuffer(picture, np.uint8)
            self._write('/vggt/image/compressed', stamp, header=in_image, format='jpeg', data=data)
        self._write_depth(stamp, in_image, depth, intrinsics)
        if i % self._every == 0 or i == len(self._stamps) - 1:
            self._write_path(i)

    def write_points(
        self,
        i: int,
        xyz: npt.NDArray[np.float32],
        rgb: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
    ) -> None:
        """Write the points (N, 3) that a frame added, in the world."""
        points = np.empty(len(xyz), _POINT)
        points['x'], points['y'], points['z'] = xyz.T
        red, green, blue = rgb.astype(np.uint32).T
        points['rgb'] = red << 16 | green << 8 | blue
        points['confidence'] = confidence
        self._write(
            '/vggt/points',
            self._stamps[i],
            header=self._header(self._stamps[i], WORLD),
            height=1,
            width=len(points),
            fields=[
                self._make(
                    'sensor_msgs/msg/PointField',
                    name=name,
                    offset=4 * at,
                    datatype=_FLOAT32,
                    count=1,
                )
                for at, name in enumerate(_POINT.names or ())
            ],
            is_bigendian=False,
            point_step=_POINT.itemsize,
            row_step=points.nbytes,
            data=points.view(np.uint8),
            is_dense=True,
        )

    def _write_depth(
        self, stamp: int, header: Any, depth: npt.NDArray[np.float32], intrinsics: Array
    ) -> None:
        height, width = depth.shape
        self._write(
            '/vggt/depth/image_rect',
            stamp,
            header=header,
            height=height,
            width=width,
            encoding='32FC1',
            is_bigendian=0,
            step=4 * width,
            data=np.ascontiguousarray(depth, '<f4').view(np.uint8).ravel(),
        )
        region = self._make(
            'sensor_msgs/msg/RegionOfInterest',
            x_offset=0,
            y_offset=0,
            height=0,
            width=0,
            do_rectify=False,
        )
        self._write(
            '/vggt/depth/camera_info',
            stamp,
            header=header,
            height=height,
            width=width,
            distortion_model='plumb_bob',
            d=np.zeros(5),
            k=intrinsics.ravel(),
            r=np.eye(3).ravel(),
            p=np.hstack([intrinsics, np.zeros((3, 1))]).ravel(),
            binning_x=0,
            binning_y=0,
            roi=region,
        )

    def _write_path(self, newest: int) -> None:
        poses = [
            self._make(
                'geometry_msgs/msg/PoseStamped',
                header=self._header(self._stamps[i], WORLD),
                pose=self._pose(i),
            )
            for i in range(0, newest + 1, self._every)
        ]
        stamp = self._stamps[newest]
        self._write('/vggt/path', stamp, header=self._header(stamp, WORLD), poses=poses)

    def _pose(self, i: int) -> Any:
        (x, y, z), (qx, qy, qz, qw) = self._poses[i]
        return self._make(
            'geometry_msgs/msg/Pose',
            position=self._make('geometry_msgs/msg/Point', x=x, y=y, z=z),
            orientation=self._make('geometry_msgs/msg/Quaternion', x=qx, y=qy, z=qz, w=qw),
        )

    def _vector(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Any:
        return self._make('geometry_msgs/msg/Vector3', x=x, y=y, z=z)

    def _header(self, stamp_ns: int, frame: str) -> Any:
        seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
        stamp = self._make('builtin_interfaces/msg/Time', sec=seconds, nanosec=nanoseconds)
        return self._make('std_msgs/msg/Header', stamp=stamp, frame_id=frame)

    def _make(self, kind: str, **values: Any) -> Any:
        return self._store.types[kind](**values)

    def _write(self, topic: str, stamp_ns: int, **values: Any) -> None:
        kind = _KINDS[topic]
        message = self._make(kind, **values)
        self._writer.write(self._topics[topic], stamp_ns, self._store.serialize_cdr(message, kind))
