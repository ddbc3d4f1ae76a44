# SPDX-License-Identifier: Apache-2.0
"""
Map updates become messages of rclpy: pure functions, no node, no publisher.

`builder` builds the standard messages, the functions those of this package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import (
    Point,
    Pose,
    PoseArray,
    PoseStamped,
    PoseWithCovariance,
    Quaternion,
    Transform,
    TransformStamped,
    Twist,
    TwistWithCovariance,
    Vector3,
)
from nav_msgs.msg import Odometry, Path
from sensor_msgs.msg import (
    CameraInfo,
    CompressedImage,
    Image,
    PointCloud2,
    PointField,
    RegionOfInterest,
)
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from vggt_ros.io.message_building import MessageBuilder
from vggt_ros.io.message_types import PoseMessage
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.point_tracker import PointTracks
from vggt_ros.msg import Tracks, WindowReport
from vggt_ros.ros.rclpy_workarounds import sequence_from_array

builder = MessageBuilder(
    {
        'builtin_interfaces/msg/Time': Time,
        'geometry_msgs/msg/Point': Point,
        'geometry_msgs/msg/Pose': Pose,
        'geometry_msgs/msg/PoseArray': PoseArray,
        'geometry_msgs/msg/PoseStamped': PoseStamped,
        'geometry_msgs/msg/PoseWithCovariance': PoseWithCovariance,
        'geometry_msgs/msg/Quaternion': Quaternion,
        'geometry_msgs/msg/Transform': Transform,
        'geometry_msgs/msg/TransformStamped': TransformStamped,
        'geometry_msgs/msg/Twist': Twist,
        'geometry_msgs/msg/TwistWithCovariance': TwistWithCovariance,
        'geometry_msgs/msg/Vector3': Vector3,
        'nav_msgs/msg/Odometry': Odometry,
        'nav_msgs/msg/Path': Path,
        'sensor_msgs/msg/CameraInfo': CameraInfo,
        'sensor_msgs/msg/CompressedImage': CompressedImage,
        'sensor_msgs/msg/Image': Image,
        'sensor_msgs/msg/PointCloud2': PointCloud2,
        'sensor_msgs/msg/PointField': PointField,
        'sensor_msgs/msg/RegionOfInterest': RegionOfInterest,
        'std_msgs/msg/Header': Header,
        'tf2_msgs/msg/TFMessage': TFMessage,
    },
    sequence_from_array,
)


def make_window_report(
    update: MapUpdate, world_frame: str, poses: Sequence[PoseMessage], total_seconds: float
) -> WindowReport:
    """Build the report of one window; see msg/WindowReport.msg."""
    frames = update.batch.frames
    geometry, registration = update.reconstruction, update.registration
    height, width = geometry.image_size
    starts_map = bool(update.map_start_reason)  # there is no map to register to
    return WindowReport(
        header=builder.header(world_frame, frames[-1].stamp_ns),
        window_id=update.window_id,
        map_id=update.map_id,
        map_start_reason=update.map_start_reason,
        stamps=[builder.time(frame.stamp_ns) for frame in frames],
        frame_ids=list(update.batch.ids),
        is_new=list(update.is_new),
        camera_frames=[frame.camera_frame for frame in frames],
        poses=poses,
        confidence=update.confidence.tolist(),
        intrinsics=geometry.intrinsics.ravel().tolist(),
        width=width,
        height=height,
        scale=float(update.world_from_window.scale),
        scale_source=update.metric.source,
        scale_valid=update.metric.valid,
        scale_spread=float(update.metric.spread),
        scale_age=float(update.metric.age),
        registered=starts_map or registration.accepted,
        rejection_reason='' if starts_map else registration.rejection_reason,
        registration_residual=0.0 if starts_map else float(registration.residual),
        registration_inliers=1.0 if starts_map else float(registration.inliers),
        overlap=registration.shared,
        loop_closed=update.loop_closure is not None,
        loop_window_id=0 if update.loop_closure is None else update.loop_closure.with_window,
        frames_dropped=update.dropped,
        model=update.model,
        model_trained=update.model_trained,
        preprocess_seconds=update.seconds['preprocess'],
        inference_seconds=update.seconds['inference'],
        reconstruct_seconds=update.seconds['reconstruct'],
        registration_seconds=update.seconds['register'],
        total_seconds=total_seconds,
    )


def make_tracks(update: MapUpdate, tracks: PointTracks) -> Tracks:
    """Build the tracks of one window; see msg/Tracks.msg."""
    frames = update.batch.frames
    return Tracks(
        header=builder.header(frames[-1].camera_frame, frames[-1].stamp_ns),
        window_id=update.window_id,
        map_id=update.map_id,
        stamps=[builder.time(frame.stamp_ns) for frame in frames],
        frame_ids=list(update.batch.ids),
        camera_frames=[frame.camera_frame for frame in frames],
        ids=sequence_from_array(tracks.ids.astype(np.uint64)),
        pixels=sequence_from_array(tracks.pixels),
        visibility=sequence_from_array(tracks.visibility),
        confidence=sequence_from_array(tracks.confidence),
        trained=tracks.trained,
    )
