# SPDX-License-Identifier: Apache-2.0
"""Recordings for tests: the same images as files, as a video and as bags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

START_NS, STEP_NS = 1_700_000_000_000_000_000, 100_000_000
CAMERA = 'camera_optical'
STORE = get_typestore(Stores.ROS2_JAZZY)


def write_images(folder: Path, images: Iterable[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        assert cv2.imwrite(str(folder / f'image{i}.png'), image[..., ::-1])
    return folder


def write_video(path: Path, images: Sequence[np.ndarray]) -> Path:
    height, width = images[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (width, height))
    for image in images:
        video.write(image[..., ::-1])
    video.release()
    return path


def make(kind: str, **values: Any) -> Any:
    return STORE.types[kind](**values)


def header(i: int, frame: str = CAMERA) -> Any:
    seconds, nanoseconds = divmod(START_NS + i * STEP_NS, 1_000_000_000)
    stamp = make('builtin_interfaces/msg/Time', sec=seconds, nanosec=nanoseconds)
    return make('std_msgs/msg/Header', stamp=stamp, frame_id=frame)


def image_message(i: int, image: np.ndarray) -> Any:
    height, width = image.shape[:2]
    return make(
        'sensor_msgs/msg/Image',
        header=header(i),
        height=height,
        width=width,
        encoding='rgb8',
        is_bigendian=0,
        step=3 * width,
        data=image.ravel(),
    )


def info_message(i: int, image: np.ndarray, focal: float) -> Any:
    height, width = image.shape[:2]
    matrix = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    region = dict.fromkeys(('x_offset', 'y_offset', 'height', 'width'), 0)
    return make(
        'sensor_msgs/msg/CameraInfo',
        header=header(i),
        height=height,
        width=width,
        distortion_model='plumb_bob',
        d=np.zeros(5),
        k=matrix.ravel(),
        r=np.eye(3).ravel(),
        p=np.hstack([matrix, np.zeros((3, 1))]).ravel(),
        binning_x=0,
        binning_y=0,
        roi=make('sensor_msgs/msg/RegionOfInterest', **region, do_rectify=False),
    )


def compressed_message(i: int, image: np.ndarray) -> Any:
    data = cv2.imencode('.png', image[..., ::-1])[1].ravel()
    return make('sensor_msgs/msg/CompressedImage', header=header(i), format='png', data=data)


def odometry_message(i: int, position: np.ndarray) -> Any:
    x, y, z = map(float, position)
    zero = make('geometry_msgs/msg/Vector3', x=0.0, y=0.0, z=0.0)
    pose = make(
        'geometry_msgs/msg/Pose',
        position=make('geometry_msgs/msg/Point', x=x, y=y, z=z),
        orientation=make('geometry_msgs/msg/Quaternion', x=0.0, y=0.0, z=0.0, w=1.0),
    )
    twist = make('geometry_msgs/msg/Twist', linear=zero, angular=zero)
    covariance = np.zeros(36)
    return make(
        'nav_msgs/msg/Odometry',
        header=header(i, 'odom'),
        child_frame_id=CAMERA,
        pose=make('geometry_msgs/msg/PoseWithCovariance', pose=pose, covariance=covariance),
        twist=make('geometry_msgs/msg/TwistWithCovariance', twist=twist, covariance=covariance),
    )


def write_bag(
    folder: Path, topics: dict[str, list[Any]], plugin: StoragePlugin = StoragePlugin.MCAP
) -> Path:
    """Write messages; the i-th of a topic is recorded at the i-th stamp."""
    with Writer(folder, version=9, storage_plugin=plugin) as writer:
        connections = {
            topic: writer.add_connection(topic, messages[0].__msgtype__, typestore=STORE)
            for topic, messages in topics.items()
        }
        for i in range(max(map(len, topics.values()))):
            for topic, messages in topics.items():
                if i < len(messages):
                    message = messages[i]
                    data = STORE.serialize_cdr(message, message.__msgtype__)
                    writer.write(connections[topic], START_NS + i * STEP_NS, data)
    return folder
