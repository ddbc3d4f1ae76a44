# SPDX-License-Identifier: Apache-2.0
"""
Where the node hears how long a metre is: /tf, odometry or a depth sensor.

The callbacks run in the executor and only remember; the worker's thread asks, once per window.
What cannot be used is said once in a while and counted, and the images go on without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from nav_msgs.msg import Odometry
from sensor_msgs.msg import Image

from vggt_ros.geometry.poses import Array, pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.metric_scale import DepthScale, MotionScale, ScaleSource
from vggt_ros.ros.convert import ImageError, decode_depth
from vggt_ros.ros.messages import ns_from_time
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import make_qos
from vggt_ros.ros.robot_frames import LARGEST_GAP, MEMORY, Complain, RobotFrames
from vggt_ros.settings import ScaleSettings

_DEPTH_IMAGES = 60  # kept undecoded: 2 s of a camera, 70 MB of 640x480 floats
_SAME_MOMENT_NS = 20_000_000  # between an image and the depth that belongs to it


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
        self._smallest_travel = settings.scale_min_travel
        self._fixed_frame = node_settings.odom_frame
        self._depth_qos = make_qos('best_effort', node_settings.image_depth)
        self._complain: Complain = lambda _kind, _sentence: None
        self._tf = frames.tree
        self._odometry = TransformTree(LARGEST_GAP, beyond=0.0, memory=MEMORY)
        self._odometry_frames: tuple[str, str] | None = None  # fixed frame and the robot's
        self._depth: deque[tuple[int, Any]] = deque(maxlen=_DEPTH_IMAGES)
        self._node: Any = None
        self._subscriptions: list[Any] = []

    @property
    def asks_frames(self) -> bool:
        """Say whether the frames of the robot are needed."""
        return self._kind in ('tf', 'odometry')

    def source(self) -> ScaleSource | None:
        """Make what the engine asks; None if it needs nothing from outside."""
        if self._kind == 'tf':
            return MotionScale(self._positions_by_tf, self._smallest_travel)
        if self._kind == 'odometry':
            return MotionScale(self._positions_by_odometry, self._smallest_travel)
        if self._kind == 'depth':
            return DepthScale(
                self._depth_at, lambda sentence: self._complain('scale_depth', sentence)
            )
        return None

    def start(self, node: Any, complain: Complain) -> None:
        """
        Subscribe.

        :param complain: takes the kind of a fault and a sentence about it; counts it.
        """
        self._node, self._complain = node, complain
        if self._kind == 'odometry':
            self._subscribe(
                Odometry, 'odometry', self._take_odometry, make_qos('best_effort', 100)
            )
        if self._kind == 'depth':
            self._subscribe(Image, 'sensor_depth', self._take_depth, self._depth_qos)

    def stop(self) -> None:
        """Take the subscriptions off the graph; what came is kept."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(self, kind: Any, topic: str, take: Callable[[Any], None], qos: Any) -> None:
        self._subscriptions.append(self._node.create_subscription(kind, topic, take, qos))

    def _take_odometry(self, message: Any) -> None:
        fixed, moving = message.header.frame_id, message.child_frame_id
        if not moving or moving == fixed:
            self._complain(
                'odometry_frames',
                f"odometry says that '{moving}' moves in '{fixed}'; expected the robot's frame "
                'as child_frame_id: it is left out of account',
            )
            return
        self._odometry_frames = fixed, moving
        stamp = ns_from_time(message.header.stamp) * 1e-9
        pose = pose_from_message(message.pose.pose.position, message.pose.pose.orientation)
        self._odometry.add(fixed, moving, stamp, pose)

    def _take_depth(self, message: Any) -> None:
        self._depth.append((ns_from_time(message.header.stamp), message))

    def _positions_by_tf(self, stamps: Array, camera_frame: str) -> Array:
        try:
            poses = self._tf.look_up(self._fixed_frame, camera_frame, stamps)
        except ValueError as error:
            return self._know_nothing('scale_tf', f'no scale by /tf: {error}', stamps)
        with suppress(ValueError):  # the camera need not hang on the fixed frame
            if self._tf.is_static(self._fixed_frame, camera_frame):
                sentence = (
                    f"no scale by /tf: '{camera_frame}' cannot move in '{self._fixed_frame}', all "
                    'between them is static; expected odom_frame to be the frame of an odometry'
                )
                return self._know_nothing('scale_tf', sentence, stamps)
        if np.isnan(poses).all():
            sentence = (
                f"no scale by /tf: it says where '{camera_frame}' is in '{self._fixed_frame}', "
                'but not at the times of the images'
            )
            return self._know_nothing('scale_tf', sentence, stamps)
        return poses[:, :3, 3]

    def _positions_by_odometry(self, stamps: Array, camera_frame: str) -> Array:
        if self._odometry_frames is None:
            return self._know_nothing('scale_odometry', 'no odometry has come', stamps)
        fixed, moving = self._odometry_frames
        try:
            robot_from_camera = self._tf.look_up(moving, camera_frame, stamps)
        except ValueError as error:
            sentence = f"no scale by odometry of '{moving}': {error}; expected it on /tf_static"
            return self._know_nothing('scale_odometry', sentence, stamps)
        poses = self._odometry.look_up(fixed, moving, stamps) @ robot_from_camera
        if np.isnan(poses).all():
            sentence = 'no scale by odometry: none came for the times of the images'
            return self._know_nothing('scale_odometry', sentence, stamps)
        return poses[:, :3, 3]

    def _know_nothing(self, kind: str, sentence: str, stamps: Array) -> Array:
        self._complain(kind, sentence)
        return np.full((len(stamps), 3), np.nan)

    def _depth_at(self, stamp_ns: int) -> npt.NDArray[np.float32] | None:
        there = list(self._depth)  # the executor's thread may add meanwhile
        if not there:
            raise LookupError('no scale by depth: no depth image has come')
        nearest_ns, message = min(there, key=lambda pair: abs(pair[0] - stamp_ns))
        if abs(nearest_ns - stamp_ns) > _SAME_MOMENT_NS:
            raise LookupError(
                'no depth image belongs to an image: the nearest is '
                f'{abs(nearest_ns - stamp_ns) * 1e-9:.3f} s away'
            )
        try:
            return decode_depth(message)
        except ImageError as error:
            self._complain('scale_depth', f'a depth image is left out of account: {error}')
            return None
