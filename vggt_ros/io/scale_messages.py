# SPDX-License-Identifier: Apache-2.0
"""
What messages say about how long a metre is: /tf, odometry or a depth sensor.

Messages only have to look like those of ROS, so that a node and a bag share this. They are
remembered as they come; the engine asks once for each window, perhaps from another thread. What
cannot be used is complained about, and the images go on without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array, pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.message_reading import ImageError, decode_depth, ns_from_time
from vggt_ros.mapping.metric_scale import DepthScale, MotionScale, ScaleSource
from vggt_ros.settings import ScaleSettings

LARGEST_GAP = 0.5  # s between two poses that may be bridged
MEMORY = 60.0  # s of poses: a window on a slow device takes that long
_DEPTH_IMAGES = 60  # kept undecoded: 2 s of a camera, 70 MB of 640x480 floats
_SAME_MOMENT_NS = 20_000_000  # between an image and the depth that belongs to it

Complain = Callable[[str, str], None]


class ScaleMessages:
    """The messages that came for `scale_source`."""

    def __init__(
        self, settings: ScaleSettings, fixed_frame: str, tf: TransformTree, complain: Complain
    ) -> None:
        """
        Begin with nothing.

        :param fixed_frame: in which /tf says how the camera moves.
        :param tf: the frames of the robot; somebody else fills it.
        :param complain: takes the kind of a fault and a sentence about it.
        """
        self._kind = settings.scale_source
        self._smallest_travel = settings.scale_min_travel
        self._fixed_frame = fixed_frame
        self._tf = tf
        self._complain = complain
        self._odometry = TransformTree(LARGEST_GAP, beyond=0.0, memory=MEMORY)
        self._odometry_frames: tuple[str, str] | None = None  # fixed frame and the robot's
        self._depth: deque[tuple[int, Any]] = deque(maxlen=_DEPTH_IMAGES)

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

    def take_odometry(self, message: Any) -> None:
        """Take a nav_msgs/Odometry."""
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

    def take_depth(self, message: Any) -> None:
        """Take a sensor_msgs/Image of the depth sensor."""
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
