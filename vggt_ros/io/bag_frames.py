# SPDX-License-Identifier: Apache-2.0
"""
Bags as the node would receive them: images, camera_info and messages for the metric scale.

All messages are read in the order in which they were recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.geometry.transform_tree import TransformTree
from vggt_ros.io import names
from vggt_ros.io.bag import ODOMETRY, TRANSFORMS, Bag, add_transforms, decode_colour
from vggt_ros.io.message_reading import ImageError, ns_from_time, read_calibration
from vggt_ros.io.scale_messages import MAX_TF_GAP, TF_CACHE_TIME, ScaleMessages
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

Handler = Callable[[Any], None]  # of a message

logger = logging.getLogger(__name__)


class BagFrames:
    """The images of one topic; see `FrameSource`."""

    def __init__(
        self, path: Path, image_topic: str = '', odom_frame: str = names.ODOM_FRAME
    ) -> None:
        """
        Find the topics.

        :param path: a bag's folder, or a file.
        :param image_topic: '' for the only topic of colour images.
        :param odom_frame: fixed frame in which /tf gives the camera motion (REP-105).
        :raises ValueError: if the bag cannot be read, or does not have one such topic.
        """
        self.name = path.resolve().name
        self.unreadable: list[str] = []
        self._path = path
        self._odom_frame = odom_frame
        self._tree = TransformTree(MAX_TF_GAP, 0.0, TF_CACHE_TIME)
        self._scale: ScaleMessages | None = None
        self._warned: set[str] = set()
        with Bag(path) as bag:
            colour_topics, self._depth_topics = bag.image_topics()
            self._topic = bag.choose_topic('image', image_topic, colour_topics, '--topic')
            self._odometry_topics = bag.topics(ODOMETRY)
            self._tf_topics = bag.topics(TRANSFORMS)
            self.count: int | None = bag.count(self._topic)

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Read the messages; see `FrameSource`."""
        index = -1
        calibration: Calibration | None = None
        info_topic = self._info_topic()
        handlers = self._scale_handlers()
        with Bag(self._path) as bag:
            for each in bag.messages({self._topic, info_topic, *handlers}):
                if each.topic in handlers:
                    handlers[each.topic](each.deserialize())
                elif each.topic == info_topic:
                    calibration = self._read_calibration(each.deserialize(), calibration)
                else:
                    index += 1
                    if index < start:
                        continue
                    frame = self._make_frame(index, each.deserialize(), calibration)
                    if frame is not None:
                        yield index, frame

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Make the source, which `frames` feeds; see `FrameSource`."""
        kind = settings.scale_source
        topics = {
            'tf': self._tf_topics,
            'odometry': self._odometry_topics,
            'depth': self._depth_topics,
        }.get(kind)
        if topics is not None and not topics:
            raise ValueError(
                f'{self.name}: scale_source is {kind!r}, but the bag has no such topic'
            )
        if kind in ('odometry', 'depth') and len(topics or ()) > 1:
            raise ValueError(
                f'{self.name}: found {", ".join(sorted(topics or ()))}; expected one topic for '
                f'scale_source {kind!r}'
            )
        self._scale = ScaleMessages(settings, self._odom_frame, self._tree, self._warn_once)
        return self._scale.source()

    def _scale_handlers(self) -> dict[str, Handler]:
        """Return what handles the messages of each topic that the metric scale needs."""
        if self._scale is None or self._scale.source() is None:
            return {}
        return {
            **{topic: partial(add_transforms, self._tree, topic) for topic in self._tf_topics},
            **dict.fromkeys(self._odometry_topics, self._scale.add_odometry),
            **dict.fromkeys(self._depth_topics, self._scale.add_depth),
        }

    def _make_frame(
        self, index: int, message: Any, calibration: Calibration | None
    ) -> Frame | None:
        try:
            image = decode_colour(message)
        except ImageError as error:
            self.unreadable.append(f'{self.name}: image {index}: {error}')
            logger.warning('skipped image %d of %s: %s', index, self._topic, error)
            return None
        if calibration is not None and image.shape[:2] != (calibration.height, calibration.width):
            self._warn_once(
                'calibration',
                f'camera_info ignored: it is for {calibration.width}x{calibration.height} pixels, '
                f'the images have {image.shape[1]}x{image.shape[0]}',
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
            self._warn_once('calibration', f'camera_info ignored: {error}')
            return None

    def _warn_once(self, kind: str, text: str) -> None:
        """Log each kind of fault once."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning('%s: %s', self.name, text)

    def _info_topic(self) -> str:
        """Name the topic of the calibration."""
        return names.camera_info_topic(self._topic.removesuffix(names.compressed_topic('')))
