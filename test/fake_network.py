# SPDX-License-Identifier: Apache-2.0
"""
A network that predicts the ground truth, for tests of everything around the real one.

The truth is a pure function of the stamp: a camera moves through an empty box-shaped room, and
the depth of a pixel is that of the intersection of its ray with a wall. See `TruthNetwork` for
the frame and scale of the predictions.

It fails on request: if the first pixel of an image has one of the values of `Failure`, the first
window that contains the image fails accordingly.
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

ROOM = np.array([4.0, 3.0, 5.0])  # half the extent of the room in x, y, z, metres


class Failure(IntEnum):
    """Red value of the first pixel of an image that makes the network fail."""

    NAN = 201  # NaN in the depth
    ABSURD = 202  # implausibly large depth
    OUT_OF_MEMORY = 203
    SURPRISE = 204  # an unexpected exception


class FakeNetwork(TruthNetwork):
    """The ground truth, after a delay or with a failure."""

    name = 'fake'
    precision = 'float32'

    def __init__(
        self,
        seconds: float = 0.0,
        image_width: int = 56,
        world: World | None = None,
        prediction_noise: PredictionNoise | None = None,
    ) -> None:
        """
        Set up the network.

        :param seconds: duration of a prediction.
        :param world: the observed scene; None: the room of the functions below.
        """
        super().__init__(world or World(ROOM, true_cameras), prediction_noise, image_width)
        self._seconds = seconds
        self._failed: set[int] = set()  # stamps of the images that have already caused a failure

    def __call__(self, batch: Any, heads: tuple[str, ...]) -> Prediction:
        """Predict what the cameras of this batch observe, or fail."""
        if 'tracks' in heads:
            logger.info('the fake network follows points')
        time.sleep(self._seconds)
        failure = self._find_failure(batch)
        if failure is Failure.OUT_OF_MEMORY:
            raise torch.cuda.OutOfMemoryError('the fake device is out of memory')
        if failure is Failure.SURPRISE:
            raise RuntimeError('the fake network fails')
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
    Run the engine on two windows, and limit torch to one thread.

    The first call of a library function can take seconds; tests of latency start after that. The
    fake network does not benefit from threads.
    """
    torch.set_num_threads(1)
    engine = StreamingEngine(
        Settings.from_flat({'window_size': 3, 'window_stride': 1}), FakeNetwork()
    )
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        engine.add(Frame(image, number * 1_000_000, 'camera'))


def true_cameras(stamps_ns: list[int]) -> np.ndarray:
    """
    Return the camera poses.

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
    """Return the depth (H, W) along the optical axis, in metres."""
    return World(ROOM, true_cameras).depth(stamp_ns, height, width)


def cast_rays(stamp_ns: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Intersect the ray of each pixel with the walls.

    :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
    """
    return World(ROOM, true_cameras).cast_rays(stamp_ns, height, width)
