# SPDX-License-Identifier: Apache-2.0
"""
The subscriptions to one camera, and the cheap checks of its messages.

The callbacks run in the executor and read headers only; the worker decodes. Images that cannot be
used are reported as faults, by cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable

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
from vggt_ros.io.names import compressed_topic
from vggt_ros.ros.qos import make_qos
from vggt_ros.ros.runtime import Runtime
from vggt_ros.ros.worker import ReceivedImage


class ImageIntake:
    """The subscriptions to one camera, and its latest calibration."""

    def __init__(
        self, runtime: Runtime, camera: int, push: Callable[[ReceivedImage], None]
    ) -> None:
        """
        Subscribe.

        :param camera: index into `settings.camera_topics`.
        :param push: receives each image that passes the checks; must return at once.
        """
        self._node = node = runtime.node
        self._faults = runtime.faults
        self._counts = runtime.counts
        self._camera = camera
        self._push = push
        self._calibration: Calibration | None = None
        self._last_stamp_ns: int | None = None
        settings = runtime.settings
        self._compressed = settings.image_transport == 'compressed'
        image_topic, info_topic = settings.camera_topics[camera]
        self._images = node.create_subscription(
            CompressedImage if self._compressed else Image,
            compressed_topic(image_topic) if self._compressed else image_topic,
            self._receive_image,
            make_qos(settings.image_reliability, settings.image_depth),
        )
        self._infos = node.create_subscription(
            CameraInfo, info_topic, self._receive_info, qos_profile_sensor_data
        )

    def decode(self, image: ReceivedImage) -> Frame:
        """
        Decode an image; called in the worker's thread.

        :raises ImageError: if it cannot be decoded.
        """
        message = image.message
        pixels = decode_compressed(message) if self._compressed else decode_image(message)
        calibration = image.calibration
        height, width = pixels.shape[:2]
        if calibration and (calibration.width, calibration.height) != (width, height):
            self._faults.report(
                'camera_info_mismatch',
                f'camera_info ignored: it is for {calibration.width}x{calibration.height} pixels, '
                f'the image has {width}x{height}',
            )
            calibration = None
        return Frame(pixels, image.stamp_ns, message.header.frame_id, calibration, self._camera)

    def count_publishers(self) -> int:
        """Count the publishers on the image topic; the images of several would be mixed."""
        return self._node.count_publishers(self._images.topic_name)

    def destroy(self) -> None:
        """Destroy the subscriptions."""
        for subscription in (self._images, self._infos):
            self._node.destroy_subscription(subscription)

    def _receive_image(self, message: Image | CompressedImage) -> None:
        self._counts['received'] += 1
        try:
            if self._compressed:
                check_compressed(message)
            else:
                check_image(message)
        except ImageError as error:
            self._faults.report(f'bad_image_{error.cause}', f'image dropped: {error}')
            return
        stamp_ns = ns_from_time(message.header.stamp)
        if stamp_ns == self._last_stamp_ns:
            self._faults.report(
                'bad_image_duplicate_stamp',
                f'image dropped: its stamp {stamp_ns} ns is that of the image before',
            )
            return
        self._last_stamp_ns = stamp_ns
        self._push(
            ReceivedImage(message, stamp_ns, time.monotonic(), self._calibration, self._camera)
        )

    def _receive_info(self, message: CameraInfo) -> None:
        try:
            self._calibration = read_calibration(message)
        except ValueError as error:
            self._calibration = None
            self._faults.report(
                'bad_camera_info', f'camera_info ignored, images are used as they are: {error}'
            )
