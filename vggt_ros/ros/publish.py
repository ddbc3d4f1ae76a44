# SPDX-License-Identifier: Apache-2.0
"""
Everything that the node says about the map, except /tf and /diagnostics.

One message per new frame with the frame's own stamp: `~/depth/*` in the image's frame, `~/points`
and `~/odometry` in the world frame. One message per window: `~/poses`, `~/path`, `~/window`,
`~/tracks`. Of several cameras each has its own `~/camera_<number>/depth/*`; odometry and path are
those of the first. Nothing is built for a topic without subscribers: publishing costs the same
whether or not somebody listens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from geometry_msgs.msg import Pose, PoseArray, PoseStamped
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image, PointCloud2

from vggt_ros.geometry.poses import matrices_from_poses, pose_from_message
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.msg import Tracks, WindowReport
from vggt_ros.ros.messages import (
    make_camera_info,
    make_cloud_message,
    make_float_image,
    make_header,
    make_odometry,
    make_poses,
    make_tracks,
    make_window_report,
)
from vggt_ros.ros.parameters import NodeSettings

TOPICS: dict[str, Any] = {
    '~/poses': PoseArray,
    '~/odometry': Odometry,
    '~/path': Path,
    '~/depth/image_rect': Image,
    '~/depth/confidence': Image,
    '~/depth/camera_info': CameraInfo,
    '~/points': PointCloud2,
    '~/window': WindowReport,
    '~/tracks': Tracks,
}


CAMERA_TOPICS = ('~/depth/image_rect', '~/depth/confidence', '~/depth/camera_info')


def topic_of(topic: str, camera: int, cameras: int) -> str:
    """Name the topic of a camera: one of several has its own."""
    return topic if cameras == 1 else topic.replace('~/', f'~/camera_{camera}/')


def make_qos(reliability: str, depth: int) -> QoSProfile:
    """
    Make a QoS profile that keeps the last `depth` messages.

    :param reliability: 'reliable' or 'best_effort'.
    """
    policy = {
        'reliable': QoSReliabilityPolicy.RELIABLE,
        'best_effort': QoSReliabilityPolicy.BEST_EFFORT,
    }[reliability]
    return QoSProfile(depth=depth, reliability=policy)


class MapPublishers:
    """The publishers, and the path so far."""

    def __init__(self, node: Any, settings: NodeSettings) -> None:
        self._node = node
        self._settings = settings
        qos = make_qos(settings.publish_reliability, settings.publish_depth)
        self._cameras = len(settings.camera_topics)
        names = {
            topic_of(topic, camera, self._cameras) if topic in CAMERA_TOPICS else topic: kind
            for topic, kind in TOPICS.items()
            for camera in range(self._cameras)
        }
        self._publishers = {
            name: node.create_publisher(kind, name, qos) for name, kind in names.items()
        }
        # Poses with the windows that told them.
        self._path: deque[tuple[int, PoseStamped]] = deque(maxlen=settings.max_path)
        self._path_factor = 1.0  # metres in one map unit, as the poses of the path have it

    def publish(self, update: MapUpdate, arrived: float) -> list[Pose]:
        """
        Publish one update of the map.

        :param arrived: when the image came that completed the window, `time.monotonic()`.
        :returns: S poses, camera-to-world.
        """
        poses = make_poses(update.world_from_camera)
        for i, is_new in enumerate(update.is_new):
            if is_new:
                self._publish_frame(update, i, poses[i])
        self._publish_window(update, poses, arrived)
        return poses

    def wants_tracks(self) -> bool:
        """Say whether somebody listens to the tracks, which the engine has to compute first."""
        return self._heard('~/tracks') is not None

    def destroy(self) -> None:
        """Take the publishers off the graph."""
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)
        self._publishers.clear()

    def _publish_frame(self, update: MapUpdate, i: int, pose: Pose) -> None:
        frame = update.batch.frames[i]
        in_image = make_header(frame.camera_frame, frame.stamp_ns)
        in_world = make_header(self._settings.world_frame, frame.stamp_ns)
        geometry = update.reconstruction
        image, confidence, info = (
            topic_of(topic, frame.camera, self._cameras) for topic in CAMERA_TOPICS
        )
        if publisher := self._heard(image):
            publisher.publish(make_float_image(in_image, update.depth(i)))
        if publisher := self._heard(confidence):
            publisher.publish(make_float_image(in_image, geometry.confidence[i]))
        if publisher := self._heard(info):
            height, width = geometry.image_size
            publisher.publish(make_camera_info(in_image, geometry.intrinsics[i], height, width))
        if publisher := self._heard('~/points'):
            publisher.publish(make_cloud_message(in_world, update.point_cloud(i)))
        if frame.camera == 0 and (publisher := self._heard('~/odometry')):
            child = self._settings.camera_frame_prefix
            known = update.covariance
            covariance = None if known is None else known[i]
            publisher.publish(make_odometry(in_world, child, pose, covariance))

    def _publish_window(self, update: MapUpdate, poses: list[Pose], arrived: float) -> None:
        world_frame = self._settings.world_frame
        frames = update.batch.frames
        header = make_header(world_frame, frames[-1].stamp_ns)
        if publisher := self._heard('~/poses'):
            publisher.publish(PoseArray(header=header, poses=poses))
        if update.map_start_reason:
            self._path.clear()
        if update.loop_closure is not None:
            self._correct_path(update.loop_closure.corrections)
        self._rescale_path(update.metric.factor)
        self._path.extend(
            (
                update.window_id,
                PoseStamped(header=make_header(world_frame, frame.stamp_ns), pose=pose),
            )
            for frame, pose, is_new in zip(frames, poses, update.is_new)
            if frame.camera == 0 and (is_new or update.map_start_reason)
        )
        if publisher := self._heard('~/path'):
            publisher.publish(Path(header=header, poses=[pose for _, pose in self._path]))
        if publisher := self._heard('~/window'):
            seconds = time.monotonic() - arrived
            publisher.publish(make_window_report(update, world_frame, poses, seconds))
        if update.tracks is not None and (publisher := self._heard('~/tracks')):
            publisher.publish(make_tracks(update, update.tracks))

    def _correct_path(self, corrections: Mapping[int, Sim3]) -> None:
        """Move the poses that are there as their windows, by number, were moved in the map."""
        metric = Sim3(self._path_factor)
        for window, there in self._path:
            moved = metric @ corrections[window] @ metric.inverse()
            told = pose_from_message(there.pose.position, there.pose.orientation)
            there.pose = make_poses(moved.transform_poses(matrices_from_poses(np.array([told]))))[
                0
            ]

    def _rescale_path(self, factor: float) -> None:
        """Bring the poses that are there to what a metre is known to be now."""
        if factor != self._path_factor:
            for _, pose in self._path:
                for axis in 'xyz':
                    value = getattr(pose.pose.position, axis)
                    setattr(pose.pose.position, axis, value * factor / self._path_factor)
            self._path_factor = factor

    def _heard(self, topic: str) -> Any:
        """Return the topic's publisher if somebody listens, else None."""
        publisher = self._publishers[topic]
        return publisher if publisher.get_subscription_count() else None
