# SPDX-License-Identifier: Apache-2.0
"""
Where the node hears how long a metre is: /tf, odometry or a depth sensor.

The callbacks run in the executor and only remember; the worker's thread asks, once per window.
What cannot be used is said once in a while and counted, and the images go on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nav_msgs.msg import Odometry
from sensor_msgs.msg import Image

from vggt_ros.io.scale_messages import Complain, ScaleMessages
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import make_qos
from vggt_ros.ros.robot_frames import RobotFrames
from vggt_ros.settings import ScaleSettings


class ScaleInputs:
    """The subscriptions that `scale_source` needs, and what came by them."""

    def __init__(
        self, settings: ScaleSettings, node_settings: NodeSettings, frames: RobotFrames
    ) -> None:
        """
        Prepare; nothing is subscribed yet.

        :param frames: of the robot.
        """
        self._kind = settings.scale_source
        self._depth_qos = make_qos('best_effort', node_settings.image_depth)
        self._complain: Complain = lambda _kind, _sentence: None
        self._messages = ScaleMessages(
            settings,
            node_settings.odom_frame,
            frames.tree,
            lambda kind, sentence: self._complain(kind, sentence),
        )
        self._node: Any = None
        self._subscriptions: list[Any] = []

    @property
    def asks_frames(self) -> bool:
        """Say whether the frames of the robot are needed."""
        return self._kind in ('tf', 'odometry')

    def source(self) -> ScaleSource | None:
        """Make what the engine asks; None if it needs nothing from outside."""
        return self._messages.source()

    def start(self, node: Any, complain: Complain) -> None:
        """
        Subscribe.

        :param complain: takes the kind of a fault and a sentence about it; counts it.
        """
        self._node, self._complain = node, complain
        if self._kind == 'odometry':
            many = make_qos('best_effort', 100)
            self._subscribe(Odometry, 'odometry', self._messages.take_odometry, many)
        if self._kind == 'depth':
            self._subscribe(Image, 'sensor_depth', self._messages.take_depth, self._depth_qos)

    def stop(self) -> None:
        """Take the subscriptions off the graph; what came is kept."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(self, kind: Any, topic: str, take: Callable[[Any], None], qos: Any) -> None:
        self._subscriptions.append(self._node.create_subscription(kind, topic, take, qos))
