# SPDX-License-Identifier: Apache-2.0
"""
The fields of ROS messages that this package reads, as types, and the layout of its point clouds.

rclpy and rosbags have classes of their own for the same messages; both have these fields, and
neither has types that a checker could read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# One point of a cloud. `rgb` is 0x00RRGGBB, declared as a float32, as RViz and PCL expect.
POINT_LAYOUT = np.dtype(
    [('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('rgb', '<u4'), ('confidence', '<f4')]
)


class TimeMessage(Protocol):
    """builtin_interfaces/Time."""

    sec: int
    nanosec: int


class HeaderMessage(Protocol):
    """std_msgs/Header."""

    stamp: TimeMessage
    frame_id: str


class VectorMessage(Protocol):
    """geometry_msgs/Point or Vector3."""

    x: float
    y: float
    z: float


class QuaternionMessage(Protocol):
    """geometry_msgs/Quaternion."""

    x: float
    y: float
    z: float
    w: float


class PoseMessage(Protocol):
    """geometry_msgs/Pose."""

    position: VectorMessage
    orientation: QuaternionMessage


class PoseWithCovarianceMessage(Protocol):
    """geometry_msgs/PoseWithCovariance."""

    pose: PoseMessage


class StampedPoseMessage(Protocol):
    """geometry_msgs/PoseStamped."""

    header: HeaderMessage
    pose: PoseMessage


class TransformMessage(Protocol):
    """geometry_msgs/Transform."""

    translation: VectorMessage
    rotation: QuaternionMessage


class StampedTransformMessage(Protocol):
    """geometry_msgs/TransformStamped."""

    header: HeaderMessage
    child_frame_id: str
    transform: TransformMessage


class TransformsMessage(Protocol):
    """tf2_msgs/TFMessage."""

    transforms: Sequence[StampedTransformMessage]


class OdometryMessage(Protocol):
    """nav_msgs/Odometry."""

    header: HeaderMessage
    child_frame_id: str
    pose: PoseWithCovarianceMessage


class ImageMessage(Protocol):
    """sensor_msgs/Image."""

    header: HeaderMessage
    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any  # uint8[], an array.array or a numpy array


class CompressedImageMessage(Protocol):
    """sensor_msgs/CompressedImage."""

    header: HeaderMessage
    format: str
    data: Any  # uint8[], an array.array or a numpy array


class CameraInfoMessage(Protocol):
    """sensor_msgs/CameraInfo."""

    header: HeaderMessage
    height: int
    width: int
    distortion_model: str
    d: Sequence[float]
    k: npt.NDArray[np.float64]  # (9,)
    p: npt.NDArray[np.float64]  # (12,)


class PointFieldMessage(Protocol):
    """sensor_msgs/PointField."""

    name: str
    offset: int


class PointCloudMessage(Protocol):
    """sensor_msgs/PointCloud2."""

    header: HeaderMessage
    fields: Sequence[PointFieldMessage]
    point_step: int
    data: Any  # uint8[], an array.array or a numpy array
