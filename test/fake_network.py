# SPDX-License-Identifier: Apache-2.0
"""
A network that knows the truth, for tests of everything around the real one.

The truth is a pure function of the stamp: a camera moves through an empty box-shaped room, and
the depth of each pixel is where its ray meets a wall. What it says of it, see `TruthNetwork`.

It fails on demand: where the first pixel of an image has one of the values of `Failure`, the
first window that contains that image fails in that way.
"""

from __future__ import annotations

import logging
import time
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.rotation import matrix_from_quaternion
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork, World
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

logger = logging.getLogger('vggt_ros.fake')  # the node shows what the package logs

ROOM = np.array([4.0, 3.0, 5.0])  # half the room's extent in x, y, z, metres


class Failure(IntEnum):
    """Red value of an image's first pixel that makes the network fail."""

    NAN = 201  # one depth is not a number
    ABSURD = 202  # depth beyond every room
    OUT_OF_MEMORY = 203
    SURPRISE = 204  # an exception that nobody expects


class FakeNetwork(TruthNetwork):
    """The truth, late or not at all."""

    name = 'fake'
    precision = 'float32'

    def __init__(
        self,
        seconds: float = 0.0,
        image_width: int = 56,
        world: World | None = None,
        errors: PredictionNoise | None = None,
    ) -> None:
        """
        Prepare the fake.

        :param seconds: how long it takes for each window.
        :param world: what it sees; None: the room of the functions below.
        """
        super().__init__(world or World(ROOM, true_cameras), errors, image_width)
        self._seconds = seconds
        self._failed: set[int] = set()  # stamps of the images that have made it fail

    def __call__(self, batch: Any, heads: tuple[str, ...]) -> Prediction:
        """Say what the cameras of this batch really see, or fail."""
        if 'tracks' in heads:
            logger.info('the fake network follows points')
        time.sleep(self._seconds)
        failure = self._find_failure(batch)
        if failure is Failure.OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError('the fake device has no memory left')
        if failure is Failure.SURPRISE:
            raise RuntimeError('the fake network has a bad day')
        prediction = super().__call__(batch, heads)
        if failure is not None:
            assert prediction.depth is not None
            prediction.depth[0, -1, 3, 4] = np.nan if failure is Failure.NAN else 1e9
        return prediction

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


def true_depth(stamp_ns: int, height: int, width: int) -> np.ndarray:
    """Measure the depth (H, W) along the optical axis, in metres."""
    return World(ROOM, true_cameras).depth(stamp_ns, height, width)


def cast_rays(stamp_ns: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Follow the ray of each pixel to a wall.

    :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
    """
    return World(ROOM, true_cameras).cast_rays(stamp_ns, height, width)
