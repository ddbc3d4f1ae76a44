# SPDX-License-Identifier: Apache-2.0
"""
The publishers of the map: everything but /tf and /diagnostics.

One message per new frame, with the frame's own stamp: `~/depth/*` in the camera frame, `~/points`
and `~/odometry` in the world frame. One message per window: `~/poses`, `~/path`, `~/window`,
`~/tracks`. Each of several cameras has its own `~/camera_<index>/depth/*`; odometry and path are
those of the first. No message is built for a topic without subscribers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseArray
from nav_msgs.msg import Odometry, Path
from rclpy.node import Node
from rclpy.publisher import Publisher
from sensor_msgs.msg import CameraInfo, Image, PointCloud2

from vggt_ros.geometry.poses import matrices_from_poses, pose_from_message
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.io import names
from vggt_ros.io.message_types import PoseMessage, StampedPoseMessage
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.msg import Tracks, WindowReport
from vggt_ros.ros.messages import builder, make_tracks, make_window_report
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.qos import make_qos

TOPICS: dict[str, Any] = {
    names.POSES: PoseArray,
    names.ODOMETRY: Odometry,
    names.PATH: Path,
    names.DEPTH: Image,
    names.CONFIDENCE: Image,
    names.DEPTH_CAMERA_INFO: CameraInfo,
    names.POINTS: PointCloud2,
    names.WINDOW: WindowReport,
    names.TRACKS: Tracks,
}
_CAMERA_TOPICS = (names.DEPTH, names.CONFIDENCE, names.DEPTH_CAMERA_INFO)


class MapPublishers:
    """The publishers, and the path so far."""

    def __init__(self, node: Node, settings: NodeSettings) -> None:
        self._node = node
        self._settings = settings
        qos = make_qos(settings.publish_reliability, settings.publish_depth)
        self._cameras = cameras = len(settings.camera_topics)
        types = {
            names.camera_topic(topic, i, cameras) if topic in _CAMERA_TOPICS else topic: kind
            for topic, kind in TOPICS.items()
            for i in range(cameras)
        }
        self._publishers = {
            topic: node.create_publisher(kind, topic, qos) for topic, kind in types.items()
        }
        # With the id of the window that each pose is from.
        self._path: deque[tuple[int, StampedPoseMessage]] = deque(maxlen=settings.max_path)
        self._path_scale = 1.0  # metric scale of the path

    def publish(self, update: MapUpdate, arrived: float) -> list[PoseMessage]:
        """
        Publish one update of the map.

        :param arrived: arrival of the image that completed the window, `time.monotonic()`.
        :returns: S poses, camera-to-world.
        """
        poses = builder.poses(update.world_from_camera)
        for i, is_new in enumerate(update.is_new):
            if is_new:
                self._publish_frame(update, i, poses[i])
        self._publish_window(update, poses, arrived)
        return poses

    def has_track_subscribers(self) -> bool:
        """Tell whether the engine has to compute tracks."""
        return self._if_subscribed(names.TRACKS) is not None

    def destroy(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)
        self._publishers.clear()

    def _publish_frame(self, update: MapUpdate, i: int, pose: PoseMessage) -> None:
        frame = update.batch.frames[i]
        in_camera = builder.header(frame.camera_frame, frame.stamp_ns)
        in_world = builder.header(self._settings.world_frame, frame.stamp_ns)
        geometry = update.reconstruction
        depth, confidence, info = (
            self._if_subscribed(names.camera_topic(topic, frame.camera, self._cameras))
            for topic in _CAMERA_TOPICS
        )
        if depth:
            depth.publish(builder.float_image(in_camera, update.depth(i)))
        if confidence:
            confidence.publish(builder.float_image(in_camera, geometry.confidence[i]))
        if info:
            intrinsics = geometry.intrinsics[i]
            info.publish(builder.camera_info(in_camera, intrinsics, *geometry.image_size))
        if points := self._if_subscribed(names.POINTS):
            cloud = update.point_cloud(i)
            points.publish(builder.point_cloud(in_world, cloud.xyz, cloud.rgb, cloud.confidence))
        if frame.camera == 0 and (odometry := self._if_subscribed(names.ODOMETRY)):
            covariance = update.covariance
            odometry.publish(
                builder.odometry(
                    in_world,
                    self._settings.camera_frame_prefix,
                    pose,
                    None if covariance is None else covariance[i],
                )
            )

    def _publish_window(self, update: MapUpdate, poses: list[PoseMessage], arrived: float) -> None:
        header = builder.header(self._settings.world_frame, update.batch.frames[-1].stamp_ns)
        if publisher := self._if_subscribed(names.POSES):
            publisher.publish(builder.pose_array(header, poses))
        self._update_path(update, poses)
        if publisher := self._if_subscribed(names.PATH):
            publisher.publish(builder.path(header, [pose for _, pose in self._path]))
        if publisher := self._if_subscribed(names.WINDOW):
            seconds = time.monotonic() - arrived
            publisher.publish(
                make_window_report(update, self._settings.world_frame, poses, seconds)
            )
        if update.tracks is not None and (publisher := self._if_subscribed(names.TRACKS)):
            publisher.publish(make_tracks(update, update.tracks))

    def _update_path(self, update: MapUpdate, poses: list[PoseMessage]) -> None:
        """Correct the path by a closed loop and the new scale, and append the new poses."""
        if update.map_start_reason:
            self._path.clear()
        if update.loop_closure is not None:
            self._correct_path(update.loop_closure.corrections)
        self._rescale_path(update.metric.factor)
        for frame, pose, is_new in zip(update.batch.frames, poses, update.is_new):
            if frame.camera == 0 and (is_new or update.map_start_reason):
                header = builder.header(self._settings.world_frame, frame.stamp_ns)
                self._path.append((update.window_id, builder.stamped_pose(header, pose)))

    def _correct_path(self, corrections: Mapping[int, Sim3]) -> None:
        """
        Move the poses of the path with their windows.

        :param corrections: by window id, in the unit of the map.
        """
        metric = Sim3(self._path_scale)
        for window_id, stamped in self._path:
            correction = metric @ corrections[window_id] @ metric.inverse()
            pose = pose_from_message(stamped.pose.position, stamped.pose.orientation)
            corrected = correction.transform_poses(matrices_from_poses(np.array([pose])))
            stamped.pose = builder.poses(corrected)[0]

    def _rescale_path(self, scale: float) -> None:
        """Bring the path to a new metric scale."""
        if scale != self._path_scale:
            for _, stamped in self._path:
                position = stamped.pose.position
                for axis in 'xyz':
                    value = getattr(position, axis)
                    setattr(position, axis, value * scale / self._path_scale)
            self._path_scale = scale

    def _if_subscribed(self, topic: str) -> Publisher | None:
        """Return the topic's publisher if it has subscribers, else None."""
        publisher = self._publishers[topic]
        return publisher if publisher.get_subscription_count() else None
