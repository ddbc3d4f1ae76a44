# SPDX-License-Identifier: Apache-2.0
"""
Bags with ground truth: colour, registered depth, camera_info and poses.

Poses come from one PoseStamped or Odometry topic, or else from /tf. All of them are links of one
transform tree, which is followed from the camera's optical frame (REP-103) up to its root.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from vggt_ros.geometry.poses import Array, pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.bag import (
    CAMERA_INFO,
    ODOMETRY,
    STAMPED_POSE,
    TRANSFORMS,
    Bag,
    add_transforms,
    decode_colour,
    seconds,
)
from vggt_ros.io.message_reading import ImageError, decode_depth
from vggt_ros.io.rgbd import RgbdFrame, associate_depth

_MAX_GAP = 0.5  # s between two poses that are interpolated

logger = logging.getLogger(__name__)


class BagRecording:
    """A bag; messages are read when a frame is requested."""

    def __init__(
        self, path: Path, image_topic: str = '', depth_topic: str = '', pose_topic: str = ''
    ) -> None:
        """
        Find the topics and the images that have depth and a pose.

        :param path: a bag's folder, or a file.
        :param image_topic: of the colour images; '' for the only one.
        :param depth_topic: of depth registered to them; '' for the only one.
        :param pose_topic: '' for the only one, or for /tf.
        :raises ValueError: if the bag cannot be read, a topic is missing or ambiguous, depth is
            not registered, or no image has both.
        """
        self.name = path.resolve().name
        self._bag = Bag(path)
        colour_topics, depth_topics = self._bag.image_topics()
        choose = self._bag.choose_topic
        self._image_topic = choose('image', image_topic, colour_topics, 'image_topic')
        self._depth_topic = choose('depth', depth_topic, depth_topics, 'depth_topic')
        colour_times, colour_stamps, frame = self._index(self._image_topic)
        depth_times, depth_stamps, depth_frame = self._index(self._depth_topic)
        if depth_frame != frame:
            raise ValueError(
                f'{self.name}: {self._depth_topic} is in the frame {depth_frame!r} and '
                f'{self._image_topic} in {frame!r}; expected depth registered to colour'
            )
        self._intrinsics = self._read_intrinsics(frame)
        poses = self._read_poses(pose_topic, frame, colour_stamps)
        self._frames = [
            (float(colour_stamps[i]), colour_times[i], depth_times[j], poses[i])
            for i, j in associate_depth(self.name, colour_stamps, depth_stamps, poses)
        ]

    def close(self) -> None:
        """Close the bag."""
        self._bag.close()

    def __len__(self) -> int:
        """Count the usable frames."""
        return len(self._frames)

    def frame(self, index: int) -> RgbdFrame:
        """Read a frame; see `RgbdRecording`."""
        stamp, colour_time, depth_time, pose = self._frames[index]
        try:
            image = decode_colour(self._read(self._image_topic, colour_time))
            depth = decode_depth(self._read(self._depth_topic, depth_time))
        except ImageError as error:
            raise ValueError(f'{self.name}: an image cannot be decoded: {error}') from error
        return RgbdFrame(stamp, image, depth, pose, self._intrinsics)

    def _read(self, topic: str, recorded_ns: int) -> Any:
        for each in self._bag.messages([topic], recorded_ns, recorded_ns + 1):
            return each.deserialize()
        raise ValueError(f'{self.name}: the message of {topic} at {recorded_ns} ns is missing')

    def _index(self, topic: str) -> tuple[list[int], Array, str]:
        """Return times of recording in ns, stamps in s and the frame id of all messages."""
        times, stamps, frame = [], [], ''
        for each in self._bag.messages([topic]):
            header = each.deserialize().header
            times.append(each.recorded_ns)
            stamps.append(seconds(header.stamp))
            frame = header.frame_id
        if not times:
            raise ValueError(f'{self.name}: {topic} has no messages')
        return times, np.array(stamps), frame

    def _read_intrinsics(self, frame: str) -> Array:
        for topic in sorted(self._bag.topics(CAMERA_INFO)):
            message = self._bag.first(topic)
            if message is not None and message.header.frame_id == frame:
                if np.any(message.d):
                    logger.warning('%s: the distortion of %s is ignored', self.name, topic)
                return np.array(message.k, dtype=np.float64).reshape(3, 3)
        raise ValueError(f'{self.name}: no camera_info for the frame {frame!r}')

    def _read_poses(self, pose_topic: str, frame: str, stamps: Array) -> Array:
        """Return world_from_camera (N, 4, 4), NaN where unknown."""
        # images may begin a little before the poses and end after them
        tree = TransformTree(_MAX_GAP, _MAX_GAP / 2)
        for topic in sorted(self._bag.topics(TRANSFORMS)):
            for each in self._bag.messages([topic]):
                add_transforms(tree, topic, each.deserialize())
        topics = self._bag.topics(STAMPED_POSE, ODOMETRY)
        if pose_topic or topics:
            chosen = self._bag.choose_topic('pose', pose_topic, topics, 'pose_topic')
            for each in self._bag.messages([chosen]):
                message = each.deserialize()
                # a PoseStamped does not name the frame that it is the pose of: the camera's
                child = getattr(message, 'child_frame_id', frame)
                pose = getattr(message.pose, 'pose', message.pose)
                tree.set_transform(
                    message.header.frame_id,
                    child,
                    seconds(message.header.stamp),
                    pose_from_message(pose.position, pose.orientation),
                )
        world = tree.root(frame)
        if tree.is_static(world, frame):
            raise ValueError(
                f'{self.name}: nothing gives the motion of {frame!r} in {world!r}; expected a '
                'PoseStamped or Odometry topic, or /tf'
            )
        return tree.lookup_transforms(world, frame, stamps)
