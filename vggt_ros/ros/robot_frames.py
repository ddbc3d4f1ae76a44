# SPDX-License-Identifier: Apache-2.0
"""
Where the robot's frames are, as /tf and /tf_static tell it: one subscription for all who ask.

The callbacks run in the executor and only remember; any thread may ask the tree. What this node
publishes itself is not in it: who else places the robot has to be seen.
"""

from __future__ import annotations

import threading
from typing import Any

from rclpy.qos import DurabilityPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.poses import pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.io.scale_messages import LARGEST_GAP, MEMORY

_OWN = 5000  # transforms that may be on their way: minutes, or a busy node would fear its own

_MOVING = QoSProfile(depth=100)  # as tf2_ros has them
_STATIC = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class RobotFrames:
    """The subscriptions and the tree that they fill."""

    def __init__(self) -> None:
        """Prepare; nothing is subscribed yet."""
        self.tree = TransformTree(LARGEST_GAP, beyond=0.0, memory=MEMORY)
        # Child and stamp of transforms that this node has published and will hear, oldest first.
        self._own: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self._node: Any = None
        self._subscriptions: list[Any] = []

    def start(self, node: Any) -> None:
        """Subscribe."""
        self._node = node
        self._subscriptions = [
            node.create_subscription(TFMessage, '/tf', self._take_moving, _MOVING),
            node.create_subscription(TFMessage, '/tf_static', self._take_static, _STATIC),
        ]

    def stop(self) -> None:
        """Take the subscriptions off the graph; what came is kept."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def leave_out(self, child: str, stamp_ns: int) -> None:
        """Pass over a transform, which is this node's, when it comes; any thread may call."""
        with self._lock:
            self._own[child, stamp_ns] = None
            if len(self._own) > _OWN:
                del self._own[next(iter(self._own))]

    def _take_moving(self, message: Any) -> None:
        self._take(message, static=False)

    def _take_static(self, message: Any) -> None:
        self._take(message, static=True)

    def _take(self, message: Any, static: bool) -> None:
        for each in message.transforms:
            pose = pose_from_message(each.transform.translation, each.transform.rotation)
            stamp_ns = ns_from_time(each.header.stamp)
            if (each.child_frame_id, stamp_ns) in self._own:
                continue
            self.tree.add(each.header.frame_id, each.child_frame_id, stamp_ns * 1e-9, pose, static)
