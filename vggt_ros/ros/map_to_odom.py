# SPDX-License-Identifier: Apache-2.0
"""
The robot in the map, as REP-105 wants it: `map -> odom`, published on /tf.

The robot's own chain says where the camera is in `odom`, smoothly but drifting; the map says
where it is without that drift. The transform between the two frames is what both together tell:

    map_from_odom = map_from_world @ world_from_camera @ inverse(odom_from_camera)

`map` begins as `odom` is when the first metric window comes, so z points up as the robot has it.
The frame of everything else that the node publishes (`world_frame`, an optical frame) hangs on
`map` beside `odom`; no frame of the robot gets a second parent. A new map of the node, or a node
that was inactive, does not move the robot: the map is hung up where the robot is then.

`map -> odom` is said all the time and a little ahead, since consumers ask for the present; it goes
on while the camera stands and no window comes. `map -> world_frame` is said with the stamps of the
images, as it may be another one for the images of the next map.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from geometry_msgs.msg import TransformStamped, Vector3
from tf2_msgs.msg import TFMessage

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.poses import Array
from vggt_ros.io.scale_messages import Complain
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.ros.messages import make_header, make_poses
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.robot_frames import RobotFrames
from vggt_ros.ros.transforms import TF_QOS

_PERIOD = 0.05  # s
_AHEAD_NS = 100_000_000  # as the transform_tolerance of amcl
# Images whose stamps are farther from the node's clock are of another one: a bag without
# use_sim_time. The transform then follows their clock, or nobody could use it.
_OTHER_CLOCK_NS = 10_000_000_000


class MapToOdom:
    """Publishes `map -> odom` for `tf_mode: map_to_odom`."""

    def __init__(self, settings: NodeSettings, frames: RobotFrames) -> None:
        """
        Prepare; what is known of the robot outlives `stop`.

        :param frames: of the robot.
        """
        self._settings = settings
        self._frames = frames
        self._complain: Complain = lambda _kind, _sentence: None
        self._map_id = -1
        self._map_began_ns = 0  # the first image that only the newest map has
        self._map_from_world = np.eye(4)
        self._map_from_odom = np.eye(4)
        self._told: Array | None = None  # map_from_odom, what the timer publishes
        self._clock_ahead_ns = 0  # of the images against the node's
        self._node: Any = None
        self._publisher: Any = None
        self._timer: Any = None

    def start(self, node: Any, complain: Complain) -> None:
        """
        Announce it; nothing is published before the first window that tells something.

        :param complain: takes the kind of a fault and a sentence about it; counts it.
        """
        self._node, self._complain = node, complain
        self._publisher = node.create_publisher(TFMessage, '/tf', TF_QOS)
        self._timer = node.create_timer(_PERIOD, self._publish)

    def stop(self) -> None:
        """Take everything off the graph."""
        self._node.destroy_timer(self._timer)
        self._node.destroy_publisher(self._publisher)

    def update(self, update: MapUpdate, arrived: float) -> None:
        """
        Take a window; called in the worker's thread.

        :param arrived: when its newest image came, `time.monotonic()`.
        """
        if update.map_start_reason:
            self._map_began_ns = update.batch.frames[update.is_new.index(True)].stamp_ns
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
            # from there on it is not the old map's any more
            stamps.insert(0, self._map_began_ns)
        self._map_from_odom = self._map_from_world @ world_from_camera @ _inverse(odom_from_camera)
        self._told = self._map_from_odom
        self._follow_clock(newest_ns + round((time.monotonic() - arrived) * 1e9))
        self._say(self._settings.world_frame, self._map_from_world, stamps)

    def _follow_clock(self, images_ns: int) -> None:
        """Note what the clock of the images shows now."""
        ahead_ns = images_ns - self._node.get_clock().now().nanoseconds
        if abs(ahead_ns) <= _OTHER_CLOCK_NS:
            self._clock_ahead_ns = 0
            return
        self._clock_ahead_ns = ahead_ns
        self._node.get_logger().warning(
            f"the images' stamps are {ahead_ns * 1e-9:.0f} s from this node's clock: map -> odom "
            'is stamped by theirs; expected use_sim_time with a bag or a simulator',
            once=True,
        )

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
        above = self._frames.tree.parent(odom)
        if above is not None:
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
            found = self._frames.tree.look_up(odom, frame.camera_frame, stamp)[0]
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
        if self._told is not None:
            now_ns = self._node.get_clock().now().nanoseconds
            stamp_ns = now_ns + self._clock_ahead_ns + _AHEAD_NS
            self._say(self._settings.odom_frame, self._told, [stamp_ns])

    def _say(self, child: str, map_from_child: Array, stamps_ns: list[int]) -> None:
        pose = make_poses(map_from_child[None])[0]
        place = Vector3(x=pose.position.x, y=pose.position.y, z=pose.position.z)
        transforms = []
        for stamp_ns in stamps_ns:
            header = make_header(self._settings.map_frame, stamp_ns)
            stamped = TransformStamped(header=header, child_frame_id=child)
            stamped.transform.translation = place
            stamped.transform.rotation = pose.orientation
            transforms.append(stamped)
            self._frames.leave_out(child, stamp_ns)
        self._publisher.publish(TFMessage(transforms=transforms))


def _inverse(pose: Array) -> Array:
    inverse: Array = invert_rigid(torch.from_numpy(pose)).numpy()
    return inverse
