# SPDX-License-Identifier: Apache-2.0
"""
Metric scale from messages: /tf, odometry or a depth sensor.

Shared by the node and the reader of bags. Messages are stored as they arrive; the engine queries
them once per window, perhaps from another thread. A message or a lookup that cannot be used is
reported as a fault, and the window is mapped without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array, pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.message_reading import ImageError, decode_depth, ns_from_time
from vggt_ros.io.message_types import ImageMessage, OdometryMessage
from vggt_ros.mapping.metric_scale import DepthScale, MotionScale, ScaleSource
from vggt_ros.settings import ScaleSettings

MAX_TF_GAP = 0.5  # s between two poses that are interpolated
TF_CACHE_TIME = 60.0  # s of poses that are kept: a window on a slow device takes that long
_DEPTH_IMAGES = 60  # kept undecoded: 2 s of a camera, 70 MB of 640x480 floats
_SYNC_SLOP_NS = 20_000_000  # between an image and its depth image

ReportFault = Callable[[str, str], None]  # takes the kind of a fault and its description


class ScaleMessages:
    """The messages received for `scale_source`."""

    def __init__(
        self,
        settings: ScaleSettings,
        fixed_frame: str,
        tf: TransformTree,
        report_fault: ReportFault,
    ) -> None:
        """
        Begin without messages.

        :param fixed_frame: the frame in which /tf gives the camera motion.
        :param tf: the frames of the robot, filled by the caller.
        """
        self._kind = settings.scale_source
        self._min_travel = settings.scale_min_travel
        self._fixed_frame = fixed_frame
        self._tf = tf
        self._report_fault = report_fault
        self._odometry = TransformTree(MAX_TF_GAP, max_extrapolation=0.0, cache_time=TF_CACHE_TIME)
        self._odometry_frames: tuple[str, str] | None = None  # fixed frame, robot frame
        self._depth: deque[tuple[int, ImageMessage]] = deque(maxlen=_DEPTH_IMAGES)

    def source(self) -> ScaleSource | None:
        """Make the engine's scale source; None if `scale_source` needs no messages."""
        if self._kind == 'tf':
            return MotionScale(self._positions_from_tf, self._min_travel)
        if self._kind == 'odometry':
            return MotionScale(self._positions_from_odometry, self._min_travel)
        if self._kind == 'depth':
            return DepthScale(self._depth_at, lambda text: self._report_fault('scale_depth', text))
        return None

    def add_odometry(self, message: OdometryMessage) -> None:
        """Store the odometry of the robot."""
        fixed, moving = message.header.frame_id, message.child_frame_id
        if not moving or moving == fixed:
            self._report_fault(
                'odometry_frames',
                f"odometry ignored: its frame_id is '{fixed}', its child_frame_id '{moving}'; "
                "expected the robot's frame as child_frame_id",
            )
            return
        self._odometry_frames = fixed, moving
        stamp = ns_from_time(message.header.stamp) * 1e-9
        pose = pose_from_message(message.pose.pose.position, message.pose.pose.orientation)
        self._odometry.set_transform(fixed, moving, stamp, pose)

    def add_depth(self, message: ImageMessage) -> None:
        """Store a depth image of the sensor."""
        self._depth.append((ns_from_time(message.header.stamp), message))

    def _positions_from_tf(self, stamps: Array, camera_frame: str) -> Array:
        try:
            poses = self._tf.lookup_transforms(self._fixed_frame, camera_frame, stamps)
        except ValueError as error:
            return self._unknown('scale_tf', f'no scale from /tf: {error}', stamps)
        with suppress(ValueError):  # the fixed frame need not be an ancestor of the camera
            if self._tf.is_static(self._fixed_frame, camera_frame):
                text = (
                    f"no scale from /tf: all transforms from '{self._fixed_frame}' to "
                    f"'{camera_frame}' are static; expected odom_frame to be the frame of an "
                    'odometry'
                )
                return self._unknown('scale_tf', text, stamps)
        if np.isnan(poses).all():
            text = (
                f"no scale from /tf: '{self._fixed_frame}' and '{camera_frame}' are connected, "
                'but no transform has the times of the images'
            )
            return self._unknown('scale_tf', text, stamps)
        return poses[:, :3, 3]

    def _positions_from_odometry(self, stamps: Array, camera_frame: str) -> Array:
        if self._odometry_frames is None:
            return self._unknown('scale_odometry', 'no odometry received', stamps)
        fixed, moving = self._odometry_frames
        try:
            robot_from_camera = self._tf.lookup_transforms(moving, camera_frame, stamps)
        except ValueError as error:
            text = f"no scale from odometry of '{moving}': {error}; expected it on /tf_static"
            return self._unknown('scale_odometry', text, stamps)
        poses = self._odometry.lookup_transforms(fixed, moving, stamps) @ robot_from_camera
        if np.isnan(poses).all():
            text = 'no scale from odometry: no message has the times of the images'
            return self._unknown('scale_odometry', text, stamps)
        return poses[:, :3, 3]

    def _unknown(self, kind: str, text: str, stamps: Array) -> Array:
        self._report_fault(kind, text)
        return np.full((len(stamps), 3), np.nan)

    def _depth_at(self, stamp_ns: int) -> npt.NDArray[np.float32] | None:
        images = list(self._depth)  # another thread may append meanwhile
        if not images:
            raise LookupError('no scale from depth: no depth image received')
        nearest_ns, message = min(images, key=lambda pair: abs(pair[0] - stamp_ns))
        if abs(nearest_ns - stamp_ns) > _SYNC_SLOP_NS:
            raise LookupError(
                'no scale from depth: the nearest depth image is '
                f'{abs(nearest_ns - stamp_ns) * 1e-9:.3f} s from the image'
            )
        try:
            return decode_depth(message)
        except ImageError as error:
            self._report_fault('scale_depth', f'depth image ignored: {error}')
            return None
