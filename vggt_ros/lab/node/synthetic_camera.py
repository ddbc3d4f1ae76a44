#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
A camera driver for a camera that does not exist: it plays a drive through a ray-cast room.

Publishes `image_raw`, `camera_info` and, with the stamp of each image, the exact pose of the
camera on `truth`. All frames are rendered first, so that the rate afterwards is that of a real
camera. Playing starts when enough subscribers have come, and the process ends with the last frame
(or goes back and forth for ever, with `loop`). There is no noise, blur or distortion.

    ros2 run vggt_ros synthetic_camera --ros-args -p rate:=15.0 -p loop:=true
"""

from __future__ import annotations

import array
import math
import time
from dataclasses import dataclass, fields

import numpy as np
import rclpy
import torch
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.lab.synthetic.path import smooth_path
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.ros.parameters import parameter_descriptor
from vggt_ros.settings import check_range, setting


@dataclass(frozen=True)
class SyntheticCameraSettings:
    """What the camera sees and how it plays."""

    width: int = setting(320, 'Columns of the image.', low=16, high=4096)
    height: int = setting(240, 'Rows of the image.', low=16, high=4096)
    field_of_view: float = setting(
        70.0, 'Horizontal field of view of the pinhole camera, degrees.', low=20.0, high=140.0
    )
    rate: float = setting(10.0, 'Images per second.', low=0.1, high=1000.0)
    frames: int = setting(60, 'Number of images; all are kept in memory.', low=1, high=10000)
    step: float = setting(
        0.05, 'Distance that the camera moves from one image to the next, metres.', low=0.0
    )
    seed: int = setting(0, 'Which room and which path.', low=0, high=2**31)
    loop: bool = setting(False, 'Play forwards and backwards for ever instead of once.')
    frame_id: str = setting('camera_optical_frame', 'frame_id of the images.')
    world_frame: str = setting('synthetic_room', 'Frame of the true poses.')
    subscribers: int = setting(
        1, 'Start playing when image_raw has so many subscribers.', low=0, high=100
    )
    wait: float = setting(
        30.0, 'Start playing after so many seconds in any case.', low=0.0, high=1e6
    )

    def __post_init__(self) -> None:
        check_range(self)


class SyntheticCamera(Node):
    """Plays the frames one by one, at each tick of its timer."""

    def __init__(self) -> None:
        super().__init__('synthetic_camera')
        for entry in fields(SyntheticCameraSettings):
            self.declare_parameter(entry.name, entry.default, parameter_descriptor(entry))
        names = [entry.name for entry in fields(SyntheticCameraSettings)]
        self.settings = SyntheticCameraSettings(**{n: self.get_parameter(n).value for n in names})
        self.finished = False
        self._played = 0
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
        self._image = self.create_publisher(Image, 'image_raw', qos)
        self._info = self.create_publisher(CameraInfo, 'camera_info', qos)
        self._truth = self.create_publisher(PoseStamped, 'truth', qos)

    def render(self) -> None:
        """Make all frames; takes some tens of milliseconds for each."""
        wanted = self.settings
        self.get_logger().info(
            f'rendering {wanted.frames} frames of {wanted.width}x{wanted.height} pixels'
        )
        begin = time.monotonic()
        focal = wanted.width / 2 / math.tan(math.radians(wanted.field_of_view) / 2)
        matrix = [[focal, 0, wanted.width / 2], [0, focal, wanted.height / 2], [0, 0, 1]]
        self._intrinsics = torch.tensor(matrix, dtype=torch.float64)
        self._poses = smooth_path(wanted.frames, wanted.seed, wanted.step)
        scene = SyntheticScene.room(wanted.seed)
        self._images: list[array.array[int]] = []
        for pose in self._poses:
            images, _ = render(
                scene, pose[None], self._intrinsics[None].float(), wanted.height, wanted.width
            )
            self._images.append(_as_bytes(images.numpy()))
        self.get_logger().info(f'rendered in {time.monotonic() - begin:.1f} s')

    def wait_for_subscribers(self) -> None:
        """Block until somebody listens, or until the time is up."""
        needed, deadline = self.settings.subscribers, time.monotonic() + self.settings.wait
        self.get_logger().info(f'waiting for {needed} subscriber(s) of {self._image.topic_name}')
        while (found := self._image.get_subscription_count()) < needed:
            if time.monotonic() > deadline:
                self.get_logger().warning(
                    f'{found} subscriber(s) of {self._image.topic_name} after '
                    f'{self.settings.wait} s, expected {needed}: playing all the same'
                )
                return
            time.sleep(0.05)

    def play(self) -> None:
        """Start the timer that publishes a frame at each tick."""
        self.get_logger().info(f'playing at {self.settings.rate} Hz')
        self.create_timer(1 / self.settings.rate, self._publish_next)

    def flush(self) -> None:
        """Wait until reliable subscribers have everything; what is unsent dies with the node."""
        self._image.wait_for_all_acked(Duration(seconds=2))
        self._truth.wait_for_all_acked(Duration(seconds=2))

    def _publish_next(self) -> None:
        last = len(self._images) - 1
        index = self._played
        if self.settings.loop and last > 0:
            index = last - abs(self._played % (2 * last) - last)
        stamp = self.get_clock().now().to_msg()
        self._truth.publish(self._truth_message(index, stamp))
        self._info.publish(self._info_message(stamp))
        self._image.publish(self._image_message(index, stamp))
        self._played += 1
        self.finished = self._played > last and not self.settings.loop

    def _image_message(self, index: int, stamp: Time) -> Image:
        return Image(
            header=Header(stamp=stamp, frame_id=self.settings.frame_id),
            height=self.settings.height,
            width=self.settings.width,
            encoding='rgb8',
            step=3 * self.settings.width,
            data=self._images[index],
        )

    def _info_message(self, stamp: Time) -> CameraInfo:
        matrix = self._intrinsics.numpy()
        return CameraInfo(
            header=Header(stamp=stamp, frame_id=self.settings.frame_id),
            height=self.settings.height,
            width=self.settings.width,
            distortion_model='plumb_bob',
            d=[0.0] * 5,
            k=matrix.ravel(),
            r=np.eye(3).ravel(),
            p=np.hstack([matrix, np.zeros((3, 1))]).ravel(),
        )

    def _truth_message(self, index: int, stamp: Time) -> PoseStamped:
        pose = self._poses[index].double()
        message = PoseStamped(header=Header(stamp=stamp, frame_id=self.settings.world_frame))
        place, turn = message.pose.position, message.pose.orientation
        place.x, place.y, place.z = pose[:3, 3].tolist()
        turn.x, turn.y, turn.z, turn.w = quaternion_from_matrix(pose[:3, :3]).tolist()
        return message


def _as_bytes(image: np.ndarray) -> array.array[int]:
    """Copy pixels into what messages take at once; an assigned numpy array is copied bytewise."""
    data = array.array('B')
    data.frombytes(memoryview(image).cast('B'))
    return data


def main() -> None:
    """Render, wait, play, end."""
    # The node wants the other cores; on a full machine, threads that wait for each other take
    # longer than one.
    torch.set_num_threads(1)
    rclpy.init()
    try:
        camera = SyntheticCamera()
        camera.render()
        camera.wait_for_subscribers()
        camera.play()
        while not camera.finished:
            rclpy.spin_once(camera)
        camera.flush()
        camera.get_logger().info(f'played {camera.settings.frames} frames')
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
