# SPDX-License-Identifier: Apache-2.0
"""
The robot in the map, as REP-105 wants it: `map -> odom`, published on /tf.

The robot's own chain says where the camera is in `odom`, smoothly but drifting; the map says
where it is without that drift. The transform between the two frames is what both together tell:

    map_from_odom = map_from_world @ world_from_camera @ inverse(odom_from_camera)

`map` begins as `odom` is when the first metric window comes, so z points up as the robot has it.
The frame of everything else that the node publishes (`world_frame`, an optical frame) hangs on
`map` beside `odom`; no frame of the robot gets a second parent. A new map of the node does not
move the robot: it is hung up where the robot is then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from geometry_msgs.msg import TransformStamped, Vector3
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.poses import Array
from vggt_ros.ros.messages import make_header, make_poses
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.robot_frames import RobotFrames
from vggt_ros.ros.transforms import TF_QOS
from vggt_ros.scene_map import MapUpdate

_PERIOD = 0.05  # s
# The transform changes slowly, and consumers ask for the present: it is stamped ahead, as amcl
# and slam_toolbox do.
_AHEAD_NS = 100_000_000


class MapToOdom:
    """Publishes `map -> odom` for `tf_mode: map_to_odom`."""

    def __init__(
        self,
        node: Any,
        settings: NodeSettings,
        frames: RobotFrames,
        complain: Callable[[str, str], None],
    ) -> None:
        """
        Announce it; nothing is published before the first window that tells something.

        :param frames: of the robot.
        :param complain: takes the kind of a fault and a sentence about it; counts it.
        """
        self._node = node
        self._settings = settings
        self._tree = frames.tree
        self._complain = complain
        self._map_id = -1
        self._map_from_world = np.eye(4)
        self._map_from_odom = np.eye(4)
        self._told: tuple[Array, Array] | None = None  # what the timer publishes, replaced whole
        self._publisher = node.create_publisher(TFMessage, '/tf', TF_QOS)
        self._timer = node.create_timer(_PERIOD, self._publish)

    def update(self, update: MapUpdate) -> None:
        """Take a window; called in the worker's thread."""
        odom_from_camera = self._look_up(update)
        if odom_from_camera is None:
            return
        world_from_camera = update.map_from_camera[-1]
        if update.map_id != self._map_id:
            self._map_id = update.map_id
            self._map_from_world = (
                self._map_from_odom @ odom_from_camera @ _inverse(world_from_camera)
            )
        self._map_from_odom = self._map_from_world @ world_from_camera @ _inverse(odom_from_camera)
        self._told = self._map_from_odom, self._map_from_world

    def destroy(self) -> None:
        """Take everything off the graph."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def _look_up(self, update: MapUpdate) -> Array | None:
        """Find the newest camera in `odom`; None, and said, where the transform cannot be told."""
        odom, frame = self._settings.odom_frame, update.batch.frames[-1]
        if not update.metric.valid:
            self._complain(
                'map_to_odom_scale',
                f"'{self._settings.map_frame}' -> '{odom}' waits for metres: the scale of the map "
                'is unknown; expected a scale_source',
            )
            return None
        above = self._tree.parent(odom)
        if above not in (None, self._settings.map_frame):
            self._complain(
                'map_to_odom_taken',
                f"'{odom}' hangs on '{above}' already and cannot have a second parent: "
                f"'{self._settings.map_frame}' -> '{odom}' is not published; somebody else "
                'localises this robot',
            )
            self._told = None
            return None
        try:
            stamp = np.array([frame.stamp_ns * 1e-9])
            found = self._tree.look_up(odom, frame.camera_frame, stamp)[0]
        except ValueError as error:
            self._complain('map_to_odom_tf', f"the robot's place is not known: {error}")
            return None
        if np.isnan(found).any():
            self._complain(
                'map_to_odom_tf',
                f"/tf says where '{frame.camera_frame}' is in '{odom}', but not at the time of "
                'the newest image',
            )
            return None
        return found

    def _publish(self) -> None:
        if self._told is None:
            return
        settings = self._settings
        stamp_ns = self._node.get_clock().now().nanoseconds + _AHEAD_NS
        children = (settings.odom_frame, settings.world_frame)
        transforms = []
        for child, pose in zip(children, make_poses(np.stack(self._told)), strict=True):
            header = make_header(settings.map_frame, stamp_ns)
            stamped = TransformStamped(header=header, child_frame_id=child)
            place = pose.position
            stamped.transform.translation = Vector3(x=place.x, y=place.y, z=place.z)
            stamped.transform.rotation = pose.orientation
            transforms.append(stamped)
        self._publisher.publish(TFMessage(transforms=transforms))


def _inverse(pose: Array) -> Array:
    inverse: Array = invert_rigid(torch.from_numpy(pose)).numpy()
    return inverse
