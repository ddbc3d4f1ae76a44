# SPDX-License-Identifier: Apache-2.0
"""
The cameras of the window on /tf, all in one message.

A plain publisher does what `tf2_ros.TransformBroadcaster` does, and is there on every machine.
The children are frames of our own: a frame of the robot must keep the parent that it has, so a
child whose name an image carries is left out, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geometry_msgs.msg import Pose, TransformStamped, Vector3
from rclpy.qos import QoSProfile
from tf2_msgs.msg import TFMessage

from vggt_ros.frames.frame import Frame
from vggt_ros.ros.log import RateLimitedLog
from vggt_ros.ros.messages import make_header
from vggt_ros.ros.parameters import NodeSettings

TF_QOS = QoSProfile(depth=100)  # as tf2_ros has it: reliable, volatile


class CameraTransforms:
    """Publishes world-to-camera-frame transforms in one of the modes of `tf_mode`."""

    def __init__(self, node: Any, settings: NodeSettings, log: RateLimitedLog) -> None:
        self._node = node
        self._mode = settings.tf_mode
        self._world_frame = settings.world_frame
        self._prefix = settings.camera_frame_prefix
        self._several = len(settings.camera_topics) > 1
        self._log = log
        self._publisher = (
            node.create_publisher(TFMessage, '/tf', TF_QOS)
            if self._mode in ('cameras', 'newest')
            else None
        )

    def publish(self, frames: Sequence[Frame], poses: Sequence[Pose]) -> None:
        """
        Publish the cameras of one window, each with its own acquisition stamp.

        :param frames: S frames, oldest first.
        :param poses: S poses, camera-to-world.
        """
        if self._publisher is None:
            return
        named = []
        for camera in sorted({frame.camera for frame in frames}):
            prefix = f'{self._prefix}_{camera}' if self._several else self._prefix
            own = [pair for pair in zip(frames, poses) if pair[0].camera == camera]
            if self._mode == 'newest':
                named.append((prefix, *own[-1]))
            else:
                named += [(f'{prefix}_{i}', *pair) for i, pair in enumerate(own)]
        taken = {frame.camera_frame for frame in frames}
        transforms = [
            self._make_transform(child, frame.stamp_ns, pose)
            for child, frame, pose in named
            if child not in taken
        ]
        for child in taken & {child for child, _, _ in named}:
            self._log.warn(
                'tf_child_taken',
                f"images come in frame '{child}', which is also a name that camera_frame_prefix "
                'makes: its transform is not published, since the robot places that frame; '
                'choose another prefix',
            )
        if transforms:
            self._publisher.publish(TFMessage(transforms=transforms))

    def destroy(self) -> None:
        """Take the publisher off the graph."""
        if self._publisher is not None:
            self._node.destroy_publisher(self._publisher)
            self._publisher = None

    def _make_transform(self, child: str, stamp_ns: int, pose: Pose) -> TransformStamped:
        position = pose.position
        message = TransformStamped(
            header=make_header(self._world_frame, stamp_ns), child_frame_id=child
        )
        message.transform.translation = Vector3(x=position.x, y=position.y, z=position.z)
        message.transform.rotation = pose.orientation
        return message
