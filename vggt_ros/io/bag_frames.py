# SPDX-License-Identifier: Apache-2.0
"""
Bags (rosbag2, sqlite3 or mcap) as the node would hear them.

Images, camera_info and what knows metres, in the order in which they were recorded.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag2 import ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.geometry.poses import pose_from_message
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io.message_reading import (
    ImageError,
    decode_compressed,
    decode_image,
    ns_from_time,
    read_calibration,
)
from vggt_ros.io.rgbd import DEPTH_ENCODINGS
from vggt_ros.io.scale_messages import LARGEST_GAP, MEMORY, ScaleMessages
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

RAW, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CALIBRATION = 'sensor_msgs/msg/CameraInfo'
ODOMETRY, TRANSFORMS = 'nav_msgs/msg/Odometry', 'tf2_msgs/msg/TFMessage'
FIXED_FRAME = 'odom'  # in which /tf says how the camera moves, REP-105

logger = logging.getLogger(__name__)


class BagFrames:
    """The images of one topic; see `FrameSource`."""

    def __init__(self, path: Path, image_topic: str = '') -> None:
        """
        Find the topics.

        :param path: a bag's folder, or its file.
        :param image_topic: '' if there is only one that shows pictures.
        :raises ValueError: if the bag cannot be read, or does not have one such topic.
        """
        self.name = path.resolve().name
        self.unreadable: list[str] = []
        self._path = path
        self._tree = TransformTree(LARGEST_GAP, beyond=0.0, memory=MEMORY)
        self._scale: ScaleMessages | None = None
        self._complained: set[str] = set()
        with self._read() as reader:
            self._kinds = {each.topic: each.msgtype for each in reader.connections}
            self._depth_topics = {
                topic for topic in self._topics(RAW) if _is_depth(_first(reader, topic))
            }
            self._topic = self._choose(image_topic)
            connections = [c for c in reader.connections if c.topic == self._topic]
            self.count: int | None = sum(each.msgcount for each in connections)

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Read the messages; see `FrameSource`."""
        place = -1
        calibration: Calibration | None = None
        takers = self._takers()
        with self._read() as reader:
            wanted = [c for c in reader.connections if c.topic in takers or c.topic == self._topic]
            wanted += [c for c in reader.connections if c.topic == self._info_topic()]
            for connection, _, raw in reader.messages(wanted):
                topic = connection.topic
                if topic == self._topic:
                    place += 1
                    if place < start:
                        continue
                message = reader.deserialize(raw, connection.msgtype)
                if topic in takers:
                    takers[topic](message)
                elif topic == self._info_topic():
                    calibration = self._read_calibration(message, calibration)
                else:
                    frame = self._decode(place, message, calibration)
                    if frame is not None:
                        yield place, frame

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Make what the engine asks while the bag is read; see `FrameSource`."""
        wanted = {
            'tf': self._topics(TRANSFORMS),
            'odometry': self._topics(ODOMETRY),
            'depth': self._depth_topics,
        }.get(settings.scale_source)
        if wanted is not None and not wanted:
            raise ValueError(
                f'{self.name}: scale_source is {settings.scale_source!r}, but there is no such '
                'topic in the bag'
            )
        if settings.scale_source in ('odometry', 'depth') and len(wanted or ()) > 1:
            raise ValueError(
                f'{self.name}: found {", ".join(sorted(wanted or ()))}; expected one topic for '
                f'scale_source {settings.scale_source!r}'
            )
        self._scale = ScaleMessages(settings, FIXED_FRAME, self._tree, self._complain)
        return self._scale.source()

    def _takers(self) -> dict[str, Any]:
        """Say what takes the messages of which topics."""
        if self._scale is None or self._scale.source() is None:
            return {}
        return {
            **{
                topic: partial(self._take_transforms, topic.endswith('tf_static'))
                for topic in self._topics(TRANSFORMS)
            },
            **dict.fromkeys(self._topics(ODOMETRY), self._scale.add_odometry),
            **dict.fromkeys(self._depth_topics, self._scale.add_depth),
        }

    def _take_transforms(self, static: bool, message: Any) -> None:
        for each in message.transforms:
            pose = pose_from_message(each.transform.translation, each.transform.rotation)
            stamp = ns_from_time(each.header.stamp) * 1e-9
            self._tree.add(each.header.frame_id, each.child_frame_id, stamp, pose, static)

    def _decode(self, place: int, message: Any, calibration: Calibration | None) -> Frame | None:
        decode = decode_image if self._kinds[self._topic] == RAW else decode_compressed
        try:
            image = decode(message)
        except ImageError as error:
            self.unreadable.append(f'{self.name}: image {place}: {error}')
            logger.warning('left out: image %d of %s: %s', place, self._topic, error)
            return None
        if calibration is not None and image.shape[:2] != (calibration.height, calibration.width):
            self._complain(
                'calibration',
                f'camera_info is of {calibration.width}x{calibration.height} pixels, the images '
                f'have {image.shape[1]}x{image.shape[0]}: it is left out of account',
            )
            calibration = None
        header = message.header
        return Frame(image, ns_from_time(header.stamp), header.frame_id, calibration)

    def _read_calibration(self, message: Any, before: Calibration | None) -> Calibration | None:
        if before is not None and np.array_equal(before.K.ravel(), message.k):
            return before
        try:
            return read_calibration(message)
        except ValueError as error:
            self._complain('calibration', f'camera_info is left out of account: {error}')
            return None

    def _complain(self, kind: str, sentence: str) -> None:
        """Say each kind of fault once."""
        if kind not in self._complained:
            self._complained.add(kind)
            logger.warning('%s: %s', self.name, sentence)

    def _topics(self, *kinds: str) -> set[str]:
        return {topic for topic, kind in self._kinds.items() if kind in kinds}

    def _info_topic(self) -> str:
        """Name the topic of the calibration: by convention beside the images (REP-104)."""
        base = self._topic.removesuffix('/compressed').rpartition('/')[0]
        return f'{base}/camera_info'

    def _choose(self, asked: str) -> str:
        there = self._topics(RAW, COMPRESSED) - self._depth_topics
        if asked and asked in there:
            return asked
        if not there or asked:
            found = ', '.join(sorted(there)) or 'none'
            wanted = asked or 'sensor_msgs/Image or CompressedImage'
            raise ValueError(f'{self.name}: found image topics: {found}; expected {wanted}')
        if len(there) > 1:
            raise ValueError(
                f'{self.name}: found image topics: {", ".join(sorted(there))}; expected one, or '
                '--topic to say which'
            )
        return there.pop()

    @contextmanager
    def _read(self) -> Iterator[AnyReader]:
        """Open the bag; whatever is wrong with its files is a ValueError that says so."""
        if not self._path.exists():
            raise ValueError(f'{self._path}: there is no such bag')
        try:
            with AnyReader(
                [self._path], default_typestore=get_typestore(Stores.ROS2_JAZZY)
            ) as reader:
                yield reader
        except (AnyReaderError, ReaderError, SerdeError, sqlite3.Error, OSError) as error:
            raise ValueError(f'{self._path} cannot be read as a bag: {error}') from error


def _first(reader: AnyReader, topic: str) -> Any:
    connections = [c for c in reader.connections if c.topic == topic]
    for connection, _, raw in reader.messages(connections):
        return reader.deserialize(raw, connection.msgtype)
    return None


def _is_depth(message: Any) -> bool:
    return message is not None and message.encoding in DEPTH_ENCODINGS
