# SPDX-License-Identifier: Apache-2.0
"""
A network that knows the truth, for tests of everything around the real one.

The truth is a pure function of the stamp: a camera moves through an empty box-shaped room, and
the depth of each pixel is where its ray meets a wall. Like a real network, the fake tells it in a
frame and a unit of its own for every window; both follow from the window's number, so that runs
can be repeated. It errs as much as it is told to, in each window anew.

It fails on demand: where the first pixel of an image has one of the values of `Failure`, the
first window that contains that image fails in that way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames import Frame
from vggt_ros.geometry.camera import encode_pose, invert_rigid
from vggt_ros.geometry.rotation import matrix_from_quaternion
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

ROOM = np.array([4.0, 3.0, 5.0])  # half the room's extent in x, y, z, metres
FIELD_OF_VIEW = 1.2  # horizontal, radians; pixels are square
CONFIDENCE, LOW_CONFIDENCE = 5.0, 1.0  # the leftmost column of each image is not to be trusted


class Failure(IntEnum):
    """Red value of an image's first pixel that makes the network fail."""

    NAN = 201  # one depth is not a number
    ABSURD = 202  # depth beyond every room
    OUT_OF_MEMORY = 203
    SURPRISE = 204  # an exception that nobody expects


@dataclass(frozen=True)
class World:
    """A room around the origin and a camera's way through it."""

    half_room: np.ndarray  # (3,), half the extent in x, y, z, metres
    cameras: Callable[[list[int]], np.ndarray]  # stamps, ns, to room_from_camera (S, 4, 4)

    def depth(self, stamp_ns: int, height: int, width: int) -> np.ndarray:
        """Measure the depth (H, W) along the optical axis, in metres."""
        return self.meet_walls(stamp_ns, height, width)[0]

    def meet_walls(self, stamp_ns: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Follow the ray of each pixel to a wall.

        :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
        """
        camera = self.cameras([stamp_ns])[0]
        rows, columns = np.indices((height, width), float)
        pixels = np.stack((columns, rows, np.ones_like(rows)), -1)
        rays = pixels @ np.linalg.inv(true_intrinsics(height, width)).T @ camera[:3, :3].T
        with np.errstate(divide='ignore', invalid='ignore'):
            to_walls = (np.sign(rays) * self.half_room - camera[:3, 3]) / rays
        depth = np.where(rays == 0, np.inf, to_walls).min(-1)
        return depth, camera[:3, 3] + depth[..., None] * rays


@dataclass(frozen=True)
class Errors:
    """Standard deviations of what the fake tells, independent for each pixel and camera."""

    depth: float = 0.0  # relative
    rotation: float = 0.0  # rad, of the angle
    translation: float = 0.0  # of the distance, over the extent of the window's cameras


class FakeNetwork:
    """The truth in a random frame and scale."""

    name = 'fake'
    trained = True
    device = 'cpu'
    precision = 'float32'

    def __init__(
        self,
        seconds: float = 0.0,
        image_width: int = 56,
        world: World | None = None,
        errors: Errors | None = None,
    ) -> None:
        """
        Prepare the fake.

        :param seconds: how long it takes for each window.
        :param image_width: of the images that it wants, pixels.
        :param world: what it sees; None: the room of the functions below.
        :param errors: what it does not know exactly; None: it knows all.
        """
        self.image_width = image_width
        self._seconds = seconds
        self._world = world or World(ROOM, true_cameras)
        self._errors = errors or Errors()
        self._failed: set[int] = set()  # stamps of the images that have made it fail

    def __call__(self, batch: Any, heads: tuple[str, ...]) -> Prediction:
        """Say what the cameras of this batch really see."""
        if not set(heads) <= {'camera', 'depth'}:
            raise ValueError(f'the fake network is asked for {heads}, it has camera and depth')
        time.sleep(self._seconds)
        failure = self._find_failure(batch)
        if failure is Failure.OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError('the fake device has no memory left')
        if failure is Failure.SURPRISE:
            raise RuntimeError('the fake network has a bad day')
        height, width = batch.images.shape[-2:]
        stamps = [frame.stamp_ns for frame in batch.frames]
        generator = np.random.default_rng([0, batch.window_id])
        scale, window_from_room = random_frame(generator)
        window_from_camera = window_from_room @ self._err_in_poses(
            self._world.cameras(stamps), generator
        )
        window_from_camera[:, :3, 3] *= scale
        depth = scale * np.stack([self._world.depth(stamp, height, width) for stamp in stamps])
        depth *= 1 + self._errors.depth * generator.normal(size=depth.shape)
        if failure is Failure.NAN:
            depth[-1, 3, 4] = np.nan
        if failure is Failure.ABSURD:
            depth[-1, 3, 4] = 1e9
        confidence = torch.full((1, len(stamps), height, width), CONFIDENCE)
        confidence[..., 0] = LOW_CONFIDENCE
        intrinsics = torch.from_numpy(true_intrinsics(height, width)).expand(len(stamps), 3, 3)
        camera_from_window = invert_rigid(torch.from_numpy(window_from_camera))
        encodings = encode_pose(camera_from_window, intrinsics, height, width)
        return Prediction(
            pose_encodings=[encodings.unsqueeze(0)],
            depth=torch.from_numpy(depth).float().unsqueeze(0),
            depth_confidence=confidence,
        )

    def _err_in_poses(self, cameras: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Turn and move each camera by chance."""
        moved = cameras.copy()
        extent = np.linalg.norm(np.ptp(cameras[:, :3, 3], axis=0))
        # three components that are independent make a third of the variance each
        turn = self._errors.rotation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        step = self._errors.translation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        moved[:, :3, 3] += extent * step
        half = np.concatenate([turn / 2, np.ones((len(cameras), 1))], -1)  # of small angles
        moved[:, :3, :3] @= matrix_from_quaternion(torch.from_numpy(half)).numpy()
        return moved

    def _find_failure(self, batch: Any) -> Failure | None:
        for frame in batch.frames:
            value = int(frame.image[0, 0, 0])
            if value in set(Failure) and frame.stamp_ns not in self._failed:
                self._failed.add(frame.stamp_ns)
                return Failure(value)
        return None


def warm_up() -> None:
    """
    Run the engine on two windows, in one thread from now on.

    The first use of a library's function can take seconds on a cold machine; tests of latency
    start after that. A fake network gains nothing from threads.
    """
    torch.set_num_threads(1)
    engine = StreamingEngine(
        Settings.from_flat({'window_size': 3, 'window_stride': 1}), FakeNetwork()
    )
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        engine.add(Frame(picture, number * 1_000_000, 'camera'))


def true_cameras(stamps_ns: list[int]) -> np.ndarray:
    """
    Say where the cameras are.

    :returns: (S, 4, 4), `room_from_camera`, metres.
    """
    t = np.array(stamps_ns) * 1e-9
    yaw, pitch = 0.4 * np.sin(0.5 * t), 0.1 * np.sin(0.8 * t)
    # about y, then about x, as a quaternion x, y, z, w
    quaternion = np.stack(
        (
            np.cos(yaw / 2) * np.sin(pitch / 2),
            np.sin(yaw / 2) * np.cos(pitch / 2),
            -np.sin(yaw / 2) * np.sin(pitch / 2),
            np.cos(yaw / 2) * np.cos(pitch / 2),
        ),
        -1,
    )
    cameras = np.tile(np.eye(4), (len(t), 1, 1))
    cameras[:, :3, :3] = matrix_from_quaternion(torch.from_numpy(quaternion)).numpy()
    cameras[:, :3, 3] = np.stack(
        (1.5 * np.sin(0.4 * t), 0.3 * np.sin(0.6 * t), 1.5 * np.cos(0.3 * t)), -1
    )
    return cameras


def true_intrinsics(height: int, width: int) -> np.ndarray:
    """Return the camera matrix (3, 3) for an image of this size, in the network's convention."""
    focal = (width / 2) / np.tan(FIELD_OF_VIEW / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def true_depth(stamp_ns: int, height: int, width: int) -> np.ndarray:
    """Measure the depth (H, W) along the optical axis, in metres."""
    return World(ROOM, true_cameras).depth(stamp_ns, height, width)


def meet_walls(stamp_ns: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Follow the ray of each pixel to a wall.

    :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
    """
    return World(ROOM, true_cameras).meet_walls(stamp_ns, height, width)


def random_frame(generator: np.random.Generator) -> tuple[float, np.ndarray]:
    """
    Choose how the network tells the truth about this window.

    :returns: scale, and `window_from_room` (4, 4), rigid.
    """
    window_from_room = np.eye(4)
    quaternion = torch.from_numpy(generator.normal(size=4))
    window_from_room[:3, :3] = matrix_from_quaternion(quaternion).numpy()
    window_from_room[:3, 3] = generator.normal(size=3)
    return float(np.exp(generator.uniform(-1, 1))), window_from_room
