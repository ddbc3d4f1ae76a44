# SPDX-License-Identifier: Apache-2.0
"""Messages of running topics become a bag (mcap) without rosbag2, which need not be installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rclpy.serialization import serialize_message
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from vggt_ros.io.message_reading import ns_from_time


class BagWriter:
    """A bag that is being written."""

    def __init__(self, folder: Path) -> None:
        """
        Begin a bag.

        :param folder: to be made; a bag that is there is replaced.
        :raises ValueError: if something else is there.
        """
        if folder.exists():
            if not (folder / 'metadata.yaml').exists():
                raise ValueError(f'{folder} is there and is no bag; expected a new folder')
            shutil.rmtree(folder)
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._topics: dict[str, Any] = {}

    def write(self, topic: str, message: Any) -> None:
        """Write a message that has a header, at its stamp."""
        if topic not in self._topics:
            package = type(message).__module__.partition('.')[0]
            kind = f'{package}/msg/{type(message).__name__}'
            self._topics[topic] = self._writer.add_connection(topic, kind, typestore=self._store)
        stamp = ns_from_time(message.header.stamp)
        self._writer.write(self._topics[topic], stamp, serialize_message(message))

    def close(self) -> None:
        """Finish the bag."""
        self._writer.close()
