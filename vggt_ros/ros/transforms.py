# SPDX-License-Identifier: Apache-2.0
"""
What the node publishes on /tf: the cameras of the window, or the robot in the map (REP-105).

A plain publisher does what `tf2_ros.TransformBroadcaster` does, and needs no tf2_ros. No frame of
the robot gets a second parent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from rclpy.node import Node
from rclpy.publisher import Publisher
from tf2_msgs.msg import TFMessage

from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.poses import Array
from vggt_ros.io.message_types import PoseMessage
from vggt_ros.io.names import TF
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.ros.faults import Faults
from vggt_ros.ros.messages import builder
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.qos import TF_QOS
from vggt_ros.ros.robot_inputs import RobotFrames

_PERIOD = 0.05  # s
_TOLERANCE_NS = 100_000_000  # as the transform_tolerance of amcl
# If the stamps of the images are farther from the node's clock, they are of another clock: a bag
# without use_sim_time. The transform then follows that clock, or no lookup would find it.
_OTHER_CLOCK_NS = 10_000_000_000


class CameraTransforms:
    """Publishes world -> camera frames for `tf_mode` cameras and newest, all in one message."""

    def __init__(self, node: Node, settings: NodeSettings, faults: Faults) -> None:
        self._node = node
        self._newest_only = settings.tf_mode == 'newest'
        self._world_frame = settings.world_frame
        self._prefix = settings.camera_frame_prefix
        self._several = len(settings.camera_topics) > 1
        self._faults = faults
        self._publisher: Publisher | None = None
        if settings.tf_mode in ('cameras', 'newest'):
            self._publisher = node.create_publisher(TFMessage, TF, TF_QOS)

    def publish(self, frames: Sequence[Frame], poses: Sequence[PoseMessage]) -> None:
        """
        Publish the cameras of one window, each with its acquisition stamp.

        A camera frame whose name an image has already belongs to the robot: it is not published.

        :param frames: S frames, oldest first.
        :param poses: S poses, camera-to-world.
        """
        if self._publisher is None:
            return
        named = []
        for camera in sorted({frame.camera for frame in frames}):
            prefix = f'{self._prefix}_{camera}' if self._several else self._prefix
            own = [pair for pair in zip(frames, poses) if pair[0].camera == camera]
            if self._newest_only:
                named.append((prefix, *own[-1]))
            else:
                named += [(f'{prefix}_{i}', *pair) for i, pair in enumerate(own)]
        robot_frames = {frame.camera_frame for frame in frames}
        transforms = [
            builder.transform(builder.header(self._world_frame, frame.stamp_ns), child, pose)
            for child, frame, pose in named
            if child not in robot_frames
        ]
        for child in robot_frames & {child for child, _, _ in named}:
            self._faults.report(
                'tf_child_taken',
                f"transform to '{child}' is not published: images have this frame_id; expected "
                'another camera_frame_prefix',
            )
        if transforms:
            self._publisher.publish(builder.transforms(transforms))

    def destroy(self) -> None:
        """Destroy the publisher."""
        if self._publisher is not None:
            self._node.destroy_publisher(self._publisher)
            self._publisher = None


class MapToOdom:
    """
    Publishes `map -> odom` for `tf_mode: map_to_odom`.

    The robot gives the camera in `odom`, smooth but drifting, the map gives it without that drift:

        map_from_odom = map_from_world @ world_from_camera @ inverse(odom_from_camera)

    With the first metric window, `map` is `odom`, so z points up as it does for the robot.
    `world_frame`, an optical frame, is a child of `map` beside `odom`. When the node starts a new
    map, or was inactive, the robot keeps its pose in `map`, and `world_frame` is placed anew.

    `map -> odom` is published at 20 Hz, stamped a little ahead, since consumers look up the
    present; also while the camera is stationary and no window comes. `map -> world_frame` has the
    stamps of the images, as it may be another transform for the images of the next map.
    """

    def __init__(
        self, node: Node, settings: NodeSettings, frames: RobotFrames, faults: Faults
    ) -> None:
        """Prepare; `start` starts publishing."""
        self._node = node
        self._settings = settings
        self._frames = frames
        self._faults = faults
        self._map_id = -1
        self._map_start_ns = 0  # the first image that only the latest map has
        self._map_from_world = np.eye(4)
        self._map_from_odom = np.eye(4)
        self._valid = False  # whether the timer publishes
        self._clock_offset_ns = 0  # of the images to the node
        self._publisher = node.create_publisher(TFMessage, TF, TF_QOS)
        self._timer = node.create_timer(_PERIOD, self._publish_odom)
        self._timer.cancel()

    def start(self) -> None:
        """Publish, from the first window with a valid pose on."""
        self._timer.reset()

    def stop(self) -> None:
        """Publish nothing more; the pose in the map is kept."""
        self._timer.cancel()

    def destroy(self) -> None:
        """Destroy timer and publisher."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def update(self, update: MapUpdate, arrived: float) -> None:
        """
        Update the transforms with a window; called in the worker's thread.

        :param arrived: arrival of its newest image, `time.monotonic()`.
        """
        if update.map_start_reason:
            self._map_start_ns = update.batch.frames[update.is_new.index(True)].stamp_ns
        odom_from_camera = self._look_up(update)
        if odom_from_camera is None:
            return
        world_from_camera = update.world_from_camera[-1]
        newest_ns = update.batch.frames[-1].stamp_ns
        stamps = [newest_ns]
        if update.map_id != self._map_id:
            self._map_id = update.map_id
            self._map_from_world = (
                self._map_from_odom @ odom_from_camera @ _inverse(world_from_camera)
            )
            stamps.insert(0, self._map_start_ns)  # the transform of the map before ends there
        self._map_from_odom = self._map_from_world @ world_from_camera @ _inverse(odom_from_camera)
        self._valid = True
        self._follow_clock(newest_ns + round((time.monotonic() - arrived) * 1e9))
        self._publish(self._settings.world_frame, self._map_from_world, stamps)

    def _look_up(self, update: MapUpdate) -> Array | None:
        """Look up the newest camera in `odom`; None and a fault where that is not possible."""
        odom, frame = self._settings.odom_frame, update.batch.frames[-1]
        name = f"'{self._settings.map_frame}' -> '{odom}'"
        if not update.metric.valid:
            self._faults.report(
                'map_to_odom_scale',
                f'{name} is not published: the map has no metric scale; expected a scale_source',
            )
            return None
        parent = self._frames.tree.parent(odom)
        if parent is not None:
            self._valid = False
            self._faults.report(
                'map_to_odom_taken',
                f"{name} is not published: '{odom}' has the parent '{parent}'; another node "
                'localizes this robot',
            )
            return None
        stamp = np.array([frame.stamp_ns * 1e-9])
        try:
            odom_from_camera: Array = self._frames.tree.lookup_transforms(
                odom, frame.camera_frame, stamp
            )[0]
        except ValueError as error:
            self._faults.report('map_to_odom_tf', f'{name} is not updated: {error}')
            return None
        if np.isnan(odom_from_camera).any():
            self._faults.report(
                'map_to_odom_tf',
                f"{name} is not updated: '{odom}' and '{frame.camera_frame}' are connected, but "
                'no transform has the time of the newest image',
            )
            return None
        return odom_from_camera

    def _follow_clock(self, images_ns: int) -> None:
        """
        Compare the clock of the images with the node's.

        :param images_ns: the present time of the former.
        """
        offset_ns = images_ns - self._node.get_clock().now().nanoseconds
        if abs(offset_ns) <= _OTHER_CLOCK_NS:
            self._clock_offset_ns = 0
            return
        self._clock_offset_ns = offset_ns
        self._node.get_logger().warning(
            f"the stamps of the images are {offset_ns * 1e-9:.0f} s from this node's clock: map "
            '-> odom follows them; expected use_sim_time with a bag or a simulator',
            once=True,
        )

    def _publish_odom(self) -> None:
        if self._valid:
            now_ns = self._node.get_clock().now().nanoseconds
            stamp_ns = now_ns + self._clock_offset_ns + _TOLERANCE_NS
            self._publish(self._settings.odom_frame, self._map_from_odom, [stamp_ns])

    def _publish(self, child: str, map_from_child: Array, stamps_ns: Sequence[int]) -> None:
        pose = builder.poses(map_from_child[None])[0]
        for stamp_ns in stamps_ns:
            self._frames.ignore(child, stamp_ns)
        transforms = [
            builder.transform(builder.header(self._settings.map_frame, stamp_ns), child, pose)
            for stamp_ns in stamps_ns
        ]
        self._publisher.publish(builder.transforms(transforms))


def _inverse(pose: Array) -> Array:
    inverse: Array = invert_rigid(torch.from_numpy(pose)).numpy()
    return inverse
