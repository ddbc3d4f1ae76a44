# SPDX-License-Identifier: Apache-2.0
"""
Bags (rosbag2, sqlite3 or mcap) with colour, registered depth, camera_info and poses.

Poses come from one PoseStamped or Odometry topic, or else from /tf; all are links of one tree of
frames, which is walked from the camera's optical frame (REP-103) up to its root, the world.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.image import ImageError, message_to_cvimage
from rosbags.typesys import Stores, get_typestore

from vggt_ros.geometry.poses import Array, pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.rgbd import DEPTH_ENCODINGS, RgbdFrame

IMAGES = ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')
CALIBRATION = 'sensor_msgs/msg/CameraInfo'
POSES = ('geometry_msgs/msg/PoseStamped', 'nav_msgs/msg/Odometry')
TRANSFORMS = 'tf2_msgs/msg/TFMessage'
LARGEST_OFFSET = 0.02  # s between a colour and a depth picture of the same moment
LARGEST_GAP = 0.5  # s between poses

logger = logging.getLogger(__name__)


class BagRecording:
    """A bag; messages are read when a frame is asked for."""

    def __init__(
        self, path: Path, image_topic: str = '', depth_topic: str = '', pose_topic: str = ''
    ) -> None:
        """
        Find the topics and the pictures that have depth and a pose.

        :param path: a bag's folder, or its file.
        :param image_topic: of the colour pictures; '' if there is only one.
        :param depth_topic: registered to them; '' if there is only one.
        :param pose_topic: '' if there is only one, or none but /tf.
        :raises ValueError: if the bag cannot be read, a topic is missing or there are several,
            depth is in another frame than colour, or nothing fits together.
        """
        self.name = path.resolve().name
        self._open = ExitStack()
        try:
            self._reader = self._open.enter_context(
                AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            )
        except (AnyReaderError, OSError) as error:
            raise ValueError(f'{path} cannot be read as a bag: {error}') from error
        depths = {
            topic for topic in self._topics(*IMAGES) if self._encoding(topic) in DEPTH_ENCODINGS
        }
        colours = self._topics(*IMAGES) - depths
        self._image_topic = self._choose('image_topic', image_topic, colours)
        self._depth_topic = self._choose('depth_topic', depth_topic, depths)
        colour_times, colour_stamps, frame = self._index(self._image_topic)
        depth_times, depth_stamps, depth_frame = self._index(self._depth_topic)
        if depth_frame != frame:
            raise ValueError(
                f'{self.name}: {self._depth_topic} is in the frame {depth_frame!r} and '
                f'{self._image_topic} in {frame!r}; expected depth that is registered to colour'
            )
        self._intrinsics = self._read_intrinsics(frame)
        poses = self._read_poses(pose_topic, frame, colour_stamps)
        nearest = np.abs(depth_stamps - colour_stamps[:, None]).argmin(axis=1)
        together = np.abs(depth_stamps[nearest] - colour_stamps) <= LARGEST_OFFSET
        usable = together & np.isfinite(poses).all(axis=(1, 2))
        self._frames = [
            (colour_stamps[i], colour_times[i], depth_times[nearest[i]], poses[i])
            for i in np.flatnonzero(usable)
        ]
        if not self._frames:
            raise ValueError(
                f'{self.name}: of {len(colour_stamps)} colour pictures {int(together.sum())} have '
                f'a depth picture within {LARGEST_OFFSET} s, and none of these has a pose'
            )

    def close(self) -> None:
        """Close the bag."""
        self._open.close()

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `Recording`."""
        stamp, colour_time, depth_time, pose = self._frames[index]
        colour = self._message(self._image_topic, colour_time)
        depth = self._message(self._depth_topic, depth_time)
        try:
            image = message_to_cvimage(colour, 'rgb8')
            stored = message_to_cvimage(depth)
        except ImageError as error:
            raise ValueError(f'{self.name}: a picture cannot be decoded: {error}') from error
        measured = stored.astype(np.float32) * np.float32(DEPTH_ENCODINGS[depth.encoding][1])
        measured[~(measured > 0) | ~np.isfinite(measured)] = np.nan
        pixels = np.ascontiguousarray(image, np.uint8)
        return RgbdFrame(float(stamp), pixels, measured, pose, self._intrinsics)

    def _topics(self, *kinds: str) -> set[str]:
        return {c.topic for c in self._reader.connections if c.msgtype in kinds}

    def _choose(self, parameter: str, asked: str, there: set[str]) -> str:
        chosen = there & {asked} if asked else there
        if len(chosen) != 1:
            found = ', '.join(sorted(there)) or 'none'
            wanted = f'{asked!r}' if asked else f'one, or {parameter} to say which'
            raise ValueError(f'{self.name}: found {found}; expected {wanted}')
        return chosen.pop()

    def _messages(self, topic: str) -> Iterator[tuple[int, Any]]:
        connections = [c for c in self._reader.connections if c.topic == topic]
        for connection, time, raw in self._reader.messages(connections):
            yield time, self._reader.deserialize(raw, connection.msgtype)

    def _message(self, topic: str, time: int) -> Any:
        connections = [c for c in self._reader.connections if c.topic == topic]
        for connection, _, raw in self._reader.messages(connections, start=time, stop=time + 1):
            return self._reader.deserialize(raw, connection.msgtype)
        raise ValueError(f'{self.name}: the message of {topic} at {time} ns is gone')

    def _encoding(self, topic: str) -> str:
        for _, message in self._messages(topic):
            return str(getattr(message, 'encoding', ''))
        return ''

    def _index(self, topic: str) -> tuple[list[int], Array, str]:
        times, stamps, frame = [], [], ''
        for time, message in self._messages(topic):
            times.append(time)
            stamps.append(_seconds(message.header.stamp))
            frame = message.header.frame_id
        if not times:
            raise ValueError(f'{self.name}: {topic} has no messages')
        return times, np.array(stamps), frame

    def _read_intrinsics(self, frame: str) -> Array:
        for topic in sorted(self._topics(CALIBRATION)):
            for _, message in self._messages(topic):
                if message.header.frame_id != frame:
                    break
                if np.any(message.d):
                    logger.warning('%s: the distortion of %s is left as it is', self.name, topic)
                return np.array(message.k, dtype=np.float64).reshape(3, 3)
        raise ValueError(f'{self.name}: no camera_info for the frame {frame!r}')

    def _read_poses(self, pose_topic: str, frame: str, stamps: Array) -> Array:
        """Return (N, 4, 4) world_from_camera, NaN where unknown."""
        # a recording may begin or end a little outside of its poses
        tree = TransformTree(LARGEST_GAP, beyond=LARGEST_GAP / 2)
        for topic in sorted(self._topics(TRANSFORMS)):
            static = topic.endswith('tf_static')
            for _, message in self._messages(topic):
                for each in message.transforms:
                    pose = pose_from_message(each.transform.translation, each.transform.rotation)
                    stamp = _seconds(each.header.stamp)
                    tree.add(each.header.frame_id, each.child_frame_id, stamp, pose, static)
        there = self._topics(*POSES)
        if pose_topic or there:
            for _, message in self._messages(self._choose('pose_topic', pose_topic, there)):
                # a PoseStamped does not say whose pose it is: the camera's
                child = getattr(message, 'child_frame_id', frame)
                pose = getattr(message.pose, 'pose', message.pose)
                tree.add(
                    message.header.frame_id,
                    child,
                    _seconds(message.header.stamp),
                    pose_from_message(pose.position, pose.orientation),
                )
        world = tree.root(frame)
        if tree.is_static(world, frame):
            raise ValueError(
                f'{self.name}: nothing says how {frame!r} moves; expected a PoseStamped or '
                f'Odometry topic or /tf (it hangs on {world!r})'
            )
        return tree.look_up(world, frame, stamps)


def _seconds(stamp: Any) -> float:
    return float(stamp.sec) + 1e-9 * float(stamp.nanosec)
