# SPDX-License-Identifier: Apache-2.0
"""
Reads bags (rosbag2, sqlite3 or mcap): topics, messages in the order of recording, images.

Needs no ROS: `rosbags` reads the files and has the messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from vggt_ros.geometry.poses import pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.message_reading import decode_compressed, decode_image, ns_from_time
from vggt_ros.io.rgbd import DEPTH_ENCODINGS

IMAGE, COMPRESSED_IMAGE = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
ODOMETRY, STAMPED_POSE = 'nav_msgs/msg/Odometry', 'geometry_msgs/msg/PoseStamped'
TRANSFORMS = 'tf2_msgs/msg/TFMessage'


class BagError(ValueError):
    """A bag that cannot be read."""


@dataclass(frozen=True)
class BagMessage:
    """A message, not yet deserialized."""

    topic: str
    recorded_ns: int
    type: str
    _bag: Bag
    _raw: bytes

    def deserialize(self) -> Any:
        """
        Deserialize the message.

        :raises BagError: if the data are malformed.
        """
        return self._bag.deserialize(self._raw, self.type)


class Bag:
    """A bag, open for reading; use it in a `with` statement or close it."""

    def __init__(self, path: Path) -> None:
        """
        Open a bag.

        :param path: its folder, or a file.
        :raises BagError: if it does not exist or cannot be read.
        """
        self.name = path.resolve().name
        self._path = path
        if not path.exists():
            raise BagError(f'{path}: there is no such bag')
        with self._reading():
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def topics(self, *types: str) -> set[str]:
        """List the topics with messages of these types."""
        return {each.topic for each in self._reader.connections if each.msgtype in types}

    def image_topics(self) -> tuple[set[str], set[str]]:
        """List the topics of colour images and those of depth images, by their encoding."""
        depth = {
            topic
            for topic in self.topics(IMAGE)
            if getattr(self.first(topic), 'encoding', None) in DEPTH_ENCODINGS
        }
        return self.topics(IMAGE, COMPRESSED_IMAGE) - depth, depth

    def choose_topic(self, kind: str, requested: str, candidates: set[str], option: str) -> str:
        """
        Choose one of several topics.

        :param kind: for the error.
        :param requested: '' for the only one.
        :param option: that selects a topic, for the error.
        :raises ValueError: if the requested one is missing, or there is more than one.
        """
        chosen = candidates & {requested} if requested else candidates
        if len(chosen) != 1:
            found = ', '.join(sorted(candidates)) or 'none'
            expected = repr(requested) if requested else f'one, or {option} to select it'
            raise ValueError(f'{self.name}: found {kind} topics: {found}; expected {expected}')
        return next(iter(chosen))

    def count(self, topic: str) -> int:
        """Count the messages of a topic."""
        return sum(each.msgcount for each in self._reader.connections if each.topic == topic)

    def first(self, topic: str) -> Any:
        """Read the first message of a topic; None if it has none."""
        return next((each.deserialize() for each in self.messages([topic])), None)

    def messages(
        self, topics: Collection[str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[BagMessage]:
        """
        Read the messages of some topics in the order in which they were recorded.

        :param start_ns: time of recording of the first message.
        :param stop_ns: time of recording before which the last message is.
        :raises BagError: if the files are damaged.
        """
        connections = [each for each in self._reader.connections if each.topic in topics]
        if not connections:  # of which rosbags would read all
            return
        with self._reading():
            found = self._reader.messages(connections, start_ns, stop_ns)
        while True:
            with self._reading():
                entry = next(found, None)
            if entry is None:
                return
            connection, recorded_ns, raw = entry
            yield BagMessage(connection.topic, recorded_ns, connection.msgtype, self, raw)

    def deserialize(self, raw: bytes, kind: str) -> Any:
        """See `BagMessage`."""
        with self._reading():
            return self._reader.deserialize(raw, kind)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise BagError for all errors of rosbags, whose parsers raise many kinds."""
        try:
            yield
        except Exception as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise BagError(f'{self._path} cannot be read as a bag: {reason}') from error


def decode_colour(message: Any) -> npt.NDArray[np.uint8]:
    """
    Decode an Image or a CompressedImage.

    :returns: (H, W, 3), RGB.
    :raises ImageError: if it cannot be decoded.
    """
    if message.__msgtype__ == COMPRESSED_IMAGE:
        return decode_compressed(message)
    return decode_image(message)


def seconds(stamp: Any) -> float:
    """Convert a builtin_interfaces/Time to seconds."""
    return ns_from_time(stamp) * 1e-9


def add_transforms(tree: TransformTree, topic: str, message: Any) -> None:
    """
    Add a TFMessage to a tree.

    :param topic: transforms of a `tf_static` hold at all times.
    """
    static = topic.endswith('tf_static')
    for each in message.transforms:
        pose = pose_from_message(each.transform.translation, each.transform.rotation)
        stamp = seconds(each.header.stamp)
        tree.set_transform(each.header.frame_id, each.child_frame_id, stamp, pose, static)
