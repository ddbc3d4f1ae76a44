# SPDX-License-Identifier: Apache-2.0
"""
What comes in: the camera's topics, and checks that cost nothing.

The callbacks run in the executor and look at headers only; decoding is the worker's. Images that
cannot be used are counted by cause, with a warning that does not flood the log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.io.message_reading import (
    ImageError,
    check_compressed,
    check_image,
    decode_compressed,
    decode_image,
    ns_from_time,
    read_calibration,
)
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import make_qos
from vggt_ros.ros.worker import ReceivedImage


class ImageIntake:
    """The subscriptions, the newest calibration, and counts of what came."""

    def __init__(
        self,
        node: Any,
        settings: NodeSettings,
        offer: Callable[[ReceivedImage], None],
        counts: Counter[str],
        complain: Callable[[str, str], None],
        camera: int = 0,
    ) -> None:
        """
        Subscribe.

        :param camera: which of the settings' cameras.
        :param offer: takes each image that passes the checks; must return at once.
        :param counts: what comes is counted here.
        :param complain: takes the kind of a fault and a sentence about it.
        """
        self._node = node
        self._offer = offer
        self._counts = counts
        self._complain = complain
        self._camera = camera
        self._calibration: Calibration | None = None
        self._last_stamp_ns: int | None = None
        self._compressed = settings.image_transport == 'compressed'
        self._check = check_compressed if self._compressed else check_image
        self.topic, info_topic = settings.camera_topics[camera]
        self._images = node.create_subscription(
            CompressedImage if self._compressed else Image,
            f'{self.topic}/compressed' if self._compressed else self.topic,
            self._take_image,
            make_qos(settings.image_reliability, settings.image_depth),
        )
        self._infos = node.create_subscription(
            CameraInfo, info_topic, self._take_info, qos_profile_sensor_data
        )

    def decode(self, image: ReceivedImage) -> Frame:
        """
        Turn a received image into a frame; called in the worker's thread.

        :raises ImageError: if the image cannot be decoded.
        """
        message = image.message
        pixels = decode_compressed(message) if self._compressed else decode_image(message)
        calibration = image.calibration
        height, width = pixels.shape[:2]
        if calibration and (calibration.width, calibration.height) != (width, height):
            self._counts['camera_info_mismatch'] += 1
            self._complain(
                'camera_info_mismatch',
                f'camera_info is for images of {calibration.width}x{calibration.height} pixels, '
                f'the image has {width}x{height}: it is left out of account',
            )
            calibration = None
        return Frame(pixels, image.stamp_ns, message.header.frame_id, calibration, self._camera)

    def count_publishers(self) -> int:
        """Count the publishers of images: more than one mix theirs."""
        return int(self._node.count_publishers(self._images.topic_name))

    def destroy(self) -> None:
        """Take the subscriptions off the graph."""
        for subscription in (self._images, self._infos):
            self._node.destroy_subscription(subscription)

    def _take_image(self, message: Any) -> None:
        self._counts['received'] += 1
        try:
            self._check(message)
        except ImageError as error:
            self._counts[f'bad_image_{error.cause}'] += 1
            self._complain(f'bad_image_{error.cause}', f'an image is left out: {error}')
            return
        stamp_ns = ns_from_time(message.header.stamp)
        if stamp_ns == self._last_stamp_ns:
            self._counts['duplicate_stamp'] += 1
            self._complain(
                'duplicate_stamp', f'an image is left out: its stamp {stamp_ns} ns came before'
            )
            return
        self._last_stamp_ns = stamp_ns
        self._offer(
            ReceivedImage(message, stamp_ns, time.monotonic(), self._calibration, self._camera)
        )

    def _take_info(self, message: Any) -> None:
        try:
            self._calibration = read_calibration(message)
        except ValueError as error:
            self._calibration = None
            self._counts['bad_camera_info'] += 1
            self._complain(
                'bad_camera_info', f'camera_info cannot be used, images are as they come: {error}'
            )
