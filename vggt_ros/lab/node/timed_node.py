# SPDX-License-Identifier: Apache-2.0
"""
The node with clocks around its network, for `node_benchmark`.

Each call of the network writes one line of CPU times to a file, at its begin and its end: of the
worker's thread, of the executor's, and of the whole process. Between the calls is the node's own
work. The network is the one of the parameters or, with `--wall WIDTH`, one that knows the true
geometry and costs little: the camera moves along a wall.

    python3 -m vggt_ros.lab.node.timed_node --clocks FILE [--wall WIDTH] --ros-args ...
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vggt_ros.frames.batch import Batch
from vggt_ros.geometry.poses import Array
from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import Network
from vggt_ros.lab.evaluation.truth_network import TruthNetwork, World
from vggt_ros.model.prediction import Prediction
from vggt_ros.ros.node import VggtNode
from vggt_ros.ros.rclpy_workarounds import spin_until_signal
from vggt_ros.settings import ModelSettings

_DISTANCE = 2.0  # metres to the wall


class Wall(World):
    """A wall perpendicular to the optical axis."""

    def depth(self, _stamp_ns: int, height: int, width: int) -> Array:
        """Return the depth (H, W), the same everywhere."""
        return np.full((height, width), _DISTANCE)


def slide(stamps_ns: list[int]) -> Array:
    """Return poses that move back and forth along the wall: (S, 4, 4), room_from_camera."""
    cameras = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
    cameras[:, 0, 3] = np.sin(1e-9 * np.array(stamps_ns))
    return cameras


class TimedNetwork:
    """A network that records the CPU times of its calls."""

    def __init__(self, network: Network, clocks: Path) -> None:
        self._network = network
        self._lines = clocks.open('w', buffering=1)
        executor = threading.main_thread().ident
        assert executor is not None  # it is running
        self._executor_clock = time.pthread_getcpuclockid(executor)

    def __getattr__(self, name: str) -> Any:
        """Delegate everything else to the network."""
        return getattr(self._network, name)

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """Run the network."""
        begin = self._read_clocks()
        prediction = self._network(batch, heads)
        line = {'begin': begin, 'end': self._read_clocks()}
        self._lines.write(json.dumps(line) + '\n')
        return prediction

    def _read_clocks(self) -> dict[str, float]:
        return {
            'worker': time.thread_time(),
            'executor': time.clock_gettime(self._executor_clock),
            'process': time.process_time(),
            'wall': time.monotonic(),
        }


def main() -> None:
    """Run the node until a signal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--clocks', type=Path, required=True)
    parser.add_argument('--wall', type=int, default=0)
    options, arguments = parser.parse_known_args()

    def load(settings: ModelSettings) -> Network:
        if not options.wall:
            return TimedNetwork(load_network(settings), options.clocks)
        torch.set_num_threads(1)  # then the other threads of the process are those of DDS
        return TimedNetwork(
            TruthNetwork(Wall(np.zeros(3), slide), image_width=options.wall), options.clocks
        )

    spin_until_signal(lambda: VggtNode(load_network=load), ['vggt_node', *arguments])


if __name__ == '__main__':
    main()
