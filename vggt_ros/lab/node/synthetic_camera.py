#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
The driver of a synthetic camera: it plays a drive through a ray-cast room.

Publishes `image_raw`, `camera_info` and, with the stamp of each image, the true pose of the camera
on `truth`. All frames are rendered first, so that they are played at the rate of a real camera.
Playing starts with a number of subscribers, and the process ends with the last frame, or plays
back and forth with `loop`. There is no noise, blur or distortion.

    ros2 run vggt_ros synthetic_camera --ros-args -p rate:=15.0 -p loop:=true
"""

from __future__ import annotations

import array
import math
import time
from dataclasses import dataclass, fields

import rclpy
import torch
from geometry_msgs.msg import PoseStamped
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image

from vggt_ros.io import names
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import SyntheticScene
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.ros.messages import builder
from vggt_ros.ros.parameters import parameter_descriptor
from vggt_ros.ros.qos import make_qos
from vggt_ros.ros.rclpy_workarounds import sequence_from_array
from vggt_ros.settings import check_range, setting


@dataclass(frozen=True)
class SyntheticCameraSettings:
    """The camera, its path and its playback."""

    width: int = setting(320, 'Width of the image, pixels.', low=16, high=4096)
    height: int = setting(240, 'Height of the image, pixels.', low=16, high=4096)
    field_of_view: float = setting(
        70.0, 'Horizontal field of view of the pinhole camera, degrees.', low=20.0, high=140.0
    )
    rate: float = setting(10.0, 'Images per second.', low=0.1, high=1000.0)
    frames: int = setting(60, 'Number of images; all are kept in memory.', low=1, high=10000)
    step: float = setting(0.05, 'Camera motion from one image to the next, metres.', low=0.0)
    seed: int = setting(0, 'Seed of the room and the path.', low=0, high=2**31)
    loop: bool = setting(False, 'Play forwards and backwards for ever instead of once.')
    frame_id: str = setting('camera_optical_frame', 'frame_id of the images.')
    world_frame: str = setting('synthetic_room', 'Frame of the true poses.')
    subscribers: int = setting(
        1, 'Number of subscribers to image_raw with which playing starts.', low=0, high=100
    )
    wait: float = setting(
        30.0, 'Seconds after which playing starts without them.', low=0.0, high=1e6
    )

    def __post_init__(self) -> None:
        check_range(self)


class SyntheticCamera(Node):
    """Publishes one frame at each tick of its timer."""

    def __init__(self) -> None:
        super().__init__('synthetic_camera')
        for entry in fields(SyntheticCameraSettings):
            self.declare_parameter(entry.name, entry.default, parameter_descriptor(entry))
        values = {
            entry.name: self.get_parameter(entry.name).value
            for entry in fields(SyntheticCameraSettings)
        }
        self.settings = SyntheticCameraSettings(**values)
        self.finished = False
        self._played = 0
        qos = make_qos('reliable', 5)
        self._image = self.create_publisher(Image, names.IMAGE, qos)
        self._info = self.create_publisher(CameraInfo, names.CAMERA_INFO, qos)
        self._truth = self.create_publisher(PoseStamped, names.TRUTH, qos)

    def render(self) -> None:
        """Render all frames; takes some tens of milliseconds for each."""
        settings = self.settings
        self.get_logger().info(
            f'rendering {settings.frames} frames of {settings.width}x{settings.height} pixels'
        )
        begin = time.monotonic()
        focal = settings.width / 2 / math.tan(math.radians(settings.field_of_view) / 2)
        matrix = [[focal, 0, settings.width / 2], [0, focal, settings.height / 2], [0, 0, 1]]
        intrinsics = torch.tensor(matrix, dtype=torch.float64)
        poses = smooth_trajectory(settings.frames, settings.seed, settings.step)
        scene = SyntheticScene.room(settings.seed)
        self._images: list[array.array[int]] = []
        for pose in poses:
            images, _ = render(
                scene, pose[None], intrinsics[None].float(), settings.height, settings.width
            )
            self._images.append(sequence_from_array(images.numpy()))
        self._intrinsics = intrinsics.numpy()
        self._poses = builder.poses(poses.double().numpy())
        self.get_logger().info(f'rendered in {time.monotonic() - begin:.1f} s')

    def wait_for_subscribers(self) -> None:
        """Block until there are enough subscribers, or until the timeout."""
        needed, deadline = self.settings.subscribers, time.monotonic() + self.settings.wait
        self.get_logger().info(f'waiting for {needed} subscriber(s) of {self._image.topic_name}')
        while (found := self._image.get_subscription_count()) < needed:
            if time.monotonic() > deadline:
                self.get_logger().warning(
                    f'{found} subscriber(s) of {self._image.topic_name} after '
                    f'{self.settings.wait} s, expected {needed}: playing without more'
                )
                return
            time.sleep(0.05)

    def play(self) -> None:
        """Start the timer that publishes the frames."""
        self.get_logger().info(f'playing at {self.settings.rate} Hz')
        self.create_timer(1 / self.settings.rate, self._publish_next)

    def flush(self) -> None:
        """Wait until reliable subscribers have received everything, before the node ends."""
        self._image.wait_for_all_acked(Duration(seconds=2))
        self._truth.wait_for_all_acked(Duration(seconds=2))

    def _publish_next(self) -> None:
        settings, last = self.settings, len(self._images) - 1
        index = self._played
        if settings.loop and last > 0:
            index = last - abs(self._played % (2 * last) - last)
        stamp_ns = self.get_clock().now().nanoseconds
        in_room = builder.header(settings.world_frame, stamp_ns)
        in_camera = builder.header(settings.frame_id, stamp_ns)
        height, width = settings.height, settings.width
        self._truth.publish(builder.stamped_pose(in_room, self._poses[index]))
        self._info.publish(builder.camera_info(in_camera, self._intrinsics, height, width))
        self._image.publish(
            builder.image(in_camera, height, width, 'rgb8', 3 * width, self._images[index])
        )
        self._played += 1
        self.finished = self._played > last and not settings.loop


def main() -> None:
    """Render, wait, play, end."""
    # The node needs the other cores; on a loaded machine, threads that wait for each other take
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
