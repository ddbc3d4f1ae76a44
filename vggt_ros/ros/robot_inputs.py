# SPDX-License-Identifier: Apache-2.0
"""
What the node subscribes to beside the cameras: /tf, and the odometry or the depth of the robot.

The callbacks run in the executor and only store; any thread may query the result. Transforms that
this node publishes are ignored: another node that publishes the same ones has to be noticed.
"""

from __future__ import annotations

import threading

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.poses import pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io import names
from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.io.scale_messages import MAX_TF_GAP, TF_CACHE_TIME, ScaleMessages
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.ros.faults import Faults
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.qos import TF_QOS, TF_STATIC_QOS, make_qos
from vggt_ros.settings import ScaleSettings

_OWN = 5000  # transforms published and not yet received: those of minutes, for a busy executor
_ODOMETRY_DEPTH = 100


class RobotFrames:
    """The frames of the robot, from /tf and /tf_static."""

    def __init__(self, node: Node) -> None:
        """Prepare; `start` subscribes."""
        self.tree = TransformTree(MAX_TF_GAP, max_extrapolation=0.0, cache_time=TF_CACHE_TIME)
        # Child and stamp of transforms that this node published and will receive, oldest first.
        self._own: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self._node = node
        self._subscriptions: list[Subscription] = []

    def start(self) -> None:
        """Subscribe."""
        subscribe = self._node.create_subscription
        self._subscriptions = [
            subscribe(TFMessage, names.TF, self._receive, TF_QOS),
            subscribe(TFMessage, names.TF_STATIC, self._receive_static, TF_STATIC_QOS),
        ]

    def stop(self) -> None:
        """Destroy the subscriptions; the tree is kept."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def ignore(self, child: str, stamp_ns: int) -> None:
        """Ignore a transform of this node when it is received; any thread may call."""
        with self._lock:
            self._own[child, stamp_ns] = None
            if len(self._own) > _OWN:
                del self._own[next(iter(self._own))]

    def _receive(self, message: TFMessage) -> None:
        self._add(message, static=False)

    def _receive_static(self, message: TFMessage) -> None:
        self._add(message, static=True)

    def _add(self, message: TFMessage, static: bool) -> None:
        for each in message.transforms:
            pose = pose_from_message(each.transform.translation, each.transform.rotation)
            stamp_ns = ns_from_time(each.header.stamp)
            if (each.child_frame_id, stamp_ns) in self._own:
                continue
            self.tree.set_transform(
                each.header.frame_id, each.child_frame_id, stamp_ns * 1e-9, pose, static
            )


class ScaleInputs:
    """The messages that `scale_source` needs beside /tf."""

    def __init__(
        self,
        node: Node,
        settings: ScaleSettings,
        node_settings: NodeSettings,
        frames: RobotFrames,
        faults: Faults,
    ) -> None:
        """Prepare; `start` subscribes."""
        self.needs_frames = settings.scale_source in ('tf', 'odometry')
        self._node = node
        self._kind = settings.scale_source
        self._depth = node_settings.image_depth
        self._messages = ScaleMessages(
            settings, node_settings.odom_frame, frames.tree, faults.report
        )
        self._subscriptions: list[Subscription] = []

    def source(self) -> ScaleSource | None:
        """Make the engine's scale source; None if it needs no messages."""
        return self._messages.source()

    def start(self) -> None:
        """Subscribe."""
        subscribe = self._node.create_subscription
        if self._kind == 'odometry':
            qos = make_qos('best_effort', _ODOMETRY_DEPTH)
            subscription = subscribe(
                Odometry, names.ODOMETRY_INPUT, self._messages.add_odometry, qos
            )
        elif self._kind == 'depth':
            qos = make_qos('best_effort', self._depth)
            subscription = subscribe(Image, names.SENSOR_DEPTH, self._messages.add_depth, qos)
        else:
            return
        self._subscriptions.append(subscription)

    def stop(self) -> None:
        """Destroy the subscriptions; the messages are kept."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
