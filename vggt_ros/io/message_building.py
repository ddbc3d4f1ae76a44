# SPDX-License-Identifier: Apache-2.0
"""
Arrays become ROS messages, of rclpy or of rosbags.

Both libraries have the same messages, made from keyword arguments. They differ in the classes and
in the type of sequences. Poses are camera-to-world, quaternions in the order x, y, z, w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.io.message_types import (
    POINT_LAYOUT,
    CameraInfoMessage,
    CompressedImageMessage,
    HeaderMessage,
    ImageMessage,
    OdometryMessage,
    PointCloudMessage,
    PoseMessage,
    StampedPoseMessage,
    StampedTransformMessage,
    TimeMessage,
    TransformsMessage,
)

_SECOND_NS = 1_000_000_000
_FLOAT32 = 7  # sensor_msgs/PointField
_UNKNOWN = -1.0  # in covariance[0], as sensor_msgs/Imu has it


class MessageBuilder:
    """Builds the messages of one library."""

    def __init__(
        self,
        types: Mapping[str, Callable[..., Any]],
        as_sequence: Callable[[npt.NDArray[Any]], Any],
    ) -> None:
        """
        Choose the library.

        :param types: message classes by name, such as 'std_msgs/msg/Header'.
        :param as_sequence: converts an array to the value of a field of variable length.
        """
        self._types = types
        self._as_sequence = as_sequence
        self._point_fields = [
            self._types['sensor_msgs/msg/PointField'](
                name=name, offset=at, datatype=_FLOAT32, count=1
            )
            for name, (_, at, *_) in (POINT_LAYOUT.fields or {}).items()
        ]

    def time(self, stamp_ns: int) -> TimeMessage:
        """Split nanoseconds; seconds are rounded down, so that nanosec is never negative."""
        seconds, nanoseconds = divmod(stamp_ns, _SECOND_NS)
        return self._types['builtin_interfaces/msg/Time'](sec=seconds, nanosec=nanoseconds)

    def header(self, frame_id: str, stamp_ns: int) -> HeaderMessage:
        """Build a header with an acquisition stamp."""
        return self._types['std_msgs/msg/Header'](stamp=self.time(stamp_ns), frame_id=frame_id)

    def poses(self, world_from_camera: Array) -> list[PoseMessage]:
        """
        Build poses.

        :param world_from_camera: (S, 4, 4), rigid.
        """
        rotations = torch.from_numpy(world_from_camera[:, :3, :3])
        positions = world_from_camera[:, :3, 3].tolist()
        return [
            self._types['geometry_msgs/msg/Pose'](
                position=self._types['geometry_msgs/msg/Point'](x=x, y=y, z=z),
                orientation=self._types['geometry_msgs/msg/Quaternion'](x=qx, y=qy, z=qz, w=qw),
            )
            for (x, y, z), (qx, qy, qz, qw) in zip(
                positions, quaternion_from_matrix(rotations).tolist()
            )
        ]

    def stamped_pose(self, header: HeaderMessage, pose: PoseMessage) -> StampedPoseMessage:
        """Build a geometry_msgs/PoseStamped."""
        return self._types['geometry_msgs/msg/PoseStamped'](header=header, pose=pose)

    def pose_array(self, header: HeaderMessage, poses: Sequence[PoseMessage]) -> Any:
        """Build a geometry_msgs/PoseArray."""
        return self._types['geometry_msgs/msg/PoseArray'](header=header, poses=poses)

    def path(self, header: HeaderMessage, poses: Sequence[StampedPoseMessage]) -> Any:
        """Build a nav_msgs/Path."""
        return self._types['nav_msgs/msg/Path'](header=header, poses=poses)

    def transform(
        self, header: HeaderMessage, child_frame: str, pose: PoseMessage
    ) -> StampedTransformMessage:
        """Build the transform that places a child frame at a pose."""
        return self._types['geometry_msgs/msg/TransformStamped'](
            header=header,
            child_frame_id=child_frame,
            transform=self._types['geometry_msgs/msg/Transform'](
                translation=self._vector(pose.position.x, pose.position.y, pose.position.z),
                rotation=pose.orientation,
            ),
        )

    def transforms(self, transforms: Sequence[StampedTransformMessage]) -> TransformsMessage:
        """Build a tf2_msgs/TFMessage."""
        return self._types['tf2_msgs/msg/TFMessage'](transforms=transforms)

    def odometry(
        self,
        header: HeaderMessage,
        child_frame: str,
        pose: PoseMessage,
        covariance: Array | None = None,
    ) -> OdometryMessage:
        """
        Build the odometry of one camera; its velocity is not measured.

        :param covariance: (6, 6), x, y, z and the rotations about the fixed axes; None: unknown.
        """
        unknown = np.zeros(36)
        unknown[0] = _UNKNOWN
        twist = self._types['geometry_msgs/msg/Twist'](
            linear=self._vector(), angular=self._vector()
        )
        return self._types['nav_msgs/msg/Odometry'](
            header=header,
            child_frame_id=child_frame,
            pose=self._types['geometry_msgs/msg/PoseWithCovariance'](
                pose=pose,
                covariance=unknown if covariance is None else covariance.ravel(),
            ),
            twist=self._types['geometry_msgs/msg/TwistWithCovariance'](
                twist=twist, covariance=unknown
            ),
        )

    def image(
        self, header: HeaderMessage, height: int, width: int, encoding: str, step: int, data: Any
    ) -> ImageMessage:
        """
        Build a little-endian image.

        :param step: bytes in a row.
        :param data: in the type that the library holds, so that an image sent twice is converted
            once.
        """
        return self._types['sensor_msgs/msg/Image'](
            header=header,
            height=height,
            width=width,
            encoding=encoding,
            is_bigendian=0,
            step=step,
            data=data,
        )

    def float_image(self, header: HeaderMessage, values: npt.NDArray[np.float32]) -> ImageMessage:
        """Build a 32FC1 image from (H, W) floats."""
        height, width = values.shape
        data = self._bytes(values.astype('<f4', copy=False))
        return self.image(header, height, width, '32FC1', 4 * width, data)

    def compressed_image(
        self, header: HeaderMessage, kind: str, data: bytes
    ) -> CompressedImageMessage:
        """
        Build a compressed image.

        :param kind: 'jpeg' or 'png'.
        """
        return self._types['sensor_msgs/msg/CompressedImage'](
            header=header,
            format=kind,
            data=self._as_sequence(np.frombuffer(data, np.uint8)),
        )

    def camera_info(
        self, header: HeaderMessage, intrinsics: Array, height: int, width: int
    ) -> CameraInfoMessage:
        """
        Describe a pinhole camera without distortion.

        :param intrinsics: (3, 3), for an image of this size.
        """
        return self._types['sensor_msgs/msg/CameraInfo'](
            header=header,
            height=height,
            width=width,
            distortion_model='plumb_bob',
            d=self._as_sequence(np.zeros(5)),
            k=intrinsics.ravel(),
            r=np.eye(3).ravel(),
            p=np.hstack([intrinsics, np.zeros((3, 1))]).ravel(),
            binning_x=0,
            binning_y=0,
            roi=self._types['sensor_msgs/msg/RegionOfInterest'](
                x_offset=0,
                y_offset=0,
                height=0,
                width=0,
                do_rectify=False,
            ),
        )

    def point_cloud(
        self,
        header: HeaderMessage,
        xyz: npt.NDArray[np.float32],
        rgb: npt.NDArray[np.uint8],
        confidence: npt.NDArray[np.float32],
    ) -> PointCloudMessage:
        """Build a cloud of N points from positions (N, 3), colours (N, 3) and confidence (N,)."""
        points = np.empty(len(xyz), POINT_LAYOUT)
        points['x'], points['y'], points['z'] = xyz.T
        red, green, blue = rgb.astype(np.uint32).T
        points['rgb'] = red << 16 | green << 8 | blue
        points['confidence'] = confidence
        return self._types['sensor_msgs/msg/PointCloud2'](
            header=header,
            height=1,
            width=len(points),
            fields=self._point_fields,
            is_bigendian=False,
            point_step=POINT_LAYOUT.itemsize,
            row_step=points.nbytes,
            data=self._bytes(points),
            is_dense=True,
        )

    def _vector(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Any:
        return self._types['geometry_msgs/msg/Vector3'](x=x, y=y, z=z)

    def _bytes(self, values: npt.NDArray[Any]) -> Any:
        return self._as_sequence(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
