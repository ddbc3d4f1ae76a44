#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Thousands of windows of the small network in one process, whose memory must not grow.

    python3 test/soak_memory.py --windows 10000

The embedded weights, the engine, and the publishers of the node with a subscriber to every topic;
images come as fast as they are processed. Memory is read in ten steps; the first is the reference,
since libraries have filled their pools by then.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import rclpy
import torch
from rclpy.executors import SingleThreadedExecutor
from ros_domain import Use, own_domain

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.inference.load import load_network
from vggt_ros.io.names import resolve_private
from vggt_ros.lab.evaluation.truth_network import World
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import TOPICS, MapPublishers
from vggt_ros.settings import ModelSettings, Settings

PERIOD_NS = 33_333_333
_IMAGES = 48  # that are played forwards and backwards
_HALF_ROOM = np.array([4.0, 3.0, 5.0])  # metres
_PATH = 100  # poses in ~/path: reached long before the first reading
_OF_A_FRAME, _OF_A_WINDOW = 5, 3  # messages
_TIMEOUT = 30.0  # seconds
_ALLOWED = 0.01  # growth of the memory


def resident_memory(process: str | int = 'self') -> int:
    """Read the resident memory of a process in bytes."""
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return 1024 * int(line.split()[1])
    raise ValueError(f'/proc/{process}/status has no VmRSS')


def move(stamps_ns: list[int]) -> np.ndarray:
    """Return poses that move sideways through the room: (S, 4, 4), room_from_camera."""
    cameras = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
    cameras[:, 0, 3] = -1 + 1.5e-9 * np.array(stamps_ns)
    return cameras


class Soak:
    """The engine, and publishers with subscribers."""

    def __init__(self) -> None:
        # small windows, since their number matters
        settings = Settings.from_flat(
            {'window_size': 4, 'window_stride': 2, 'resolution': 56, 'min_parallax': 0.0}
        )
        self.engine = StreamingEngine(settings, load_network(ModelSettings('embedded', 'cpu')))
        self.node = rclpy.create_node('soak')
        self.listener = rclpy.create_node('listener')
        self.received = 0
        for topic, kind in TOPICS.items():
            name = resolve_private(topic, '/soak')
            self.listener.create_subscription(kind, name, self._count, 20, raw=True)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.listener)
        self.publishers = MapPublishers(self.node, NodeSettings(max_path=_PATH))
        world = World(_HALF_ROOM, move)
        self._images = [world.render_image(i * PERIOD_NS, 120, 160) for i in range(_IMAGES)]
        self._sent = 0

    def run_window(self) -> None:
        """Send images until a window has been published."""
        update = None
        while update is None:
            index = self._sent % (2 * _IMAGES - 2)
            image = self._images[min(index, 2 * _IMAGES - 2 - index)]
            update = self.engine.add(Frame(image, self._sent * PERIOD_NS, 'camera'))
            self._sent += 1
        self.publishers.publish(update, time.monotonic())
        expected = self.received + _OF_A_FRAME * sum(update.is_new) + _OF_A_WINDOW
        deadline = time.monotonic() + _TIMEOUT
        while self.received < expected:
            self._executor.spin_once(timeout_sec=_TIMEOUT)
            if time.monotonic() > deadline:
                raise TimeoutError(f'{expected - self.received} messages are missing')

    def wait_for_listener(self) -> None:
        """Wait until the listener and all publishers are matched."""
        while not all(self.node.count_subscribers(resolve_private(t, '/soak')) for t in TOPICS):
            time.sleep(0.01)
        time.sleep(1)  # the endpoints match a little later

    def _count(self, _message: bytes) -> None:
        self.received += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--windows', type=int, default=10_000, help='a multiple of ten')
    windows = parser.parse_args().windows
    torch.set_num_threads(1)
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    rclpy.init(domain_id=own_domain(Use.SLOW_NODE))
    soak = Soak()
    soak.wait_for_listener()
    memory = []
    for step in range(1, 11):
        for _ in range(windows // 10):
            soak.run_window()
        memory.append(resident_memory())
        print(
            f'{step * windows // 10} windows, {soak.received} messages, '
            f'{memory[-1] / 1e6:.1f} MB, {time.process_time():.0f} s of CPU',
            flush=True,
        )
    print(f'maps: {soak.engine.counts["maps"]}')
    growth = max(memory) / memory[0] - 1
    print(f'memory grew by {growth:.2%} at most after the first step, allowed {_ALLOWED:.0%}')
    rclpy.shutdown()
    assert growth <= _ALLOWED


if __name__ == '__main__':
    main()
