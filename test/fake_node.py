# SPDX-License-Identifier: Apache-2.0
"""
The real node with the network that returns the truth; the tests start it as a process.

The checkpoint `missing` does not exist.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

from fake_network import FakeNetwork, warm_up

from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.ros.node import VggtNode
from vggt_ros.ros.rclpy_workarounds import spin_until_signal
from vggt_ros.settings import ModelSettings

STACKS = signal.SIGUSR1  # the process dumps the stacks of its threads


def run(log: Path, environment: dict[str, str], arguments: list[str], seconds: float) -> None:
    """
    Run the node until a signal ends the process.

    :param log: receives standard output and error.
    :param environment: variables set before ROS is started.
    :param arguments: of the command line.
    :param seconds: that the network takes for each window.
    """

    def load_fake(settings: ModelSettings) -> FakeNetwork:
        if settings.checkpoint == 'missing':
            raise CheckpointError('missing: no such file')
        return FakeNetwork(seconds=seconds)

    with log.open('w') as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.environ.update(environment)
    faulthandler.register(STACKS, all_threads=True)
    warm_up()
    spin_until_signal(lambda: VggtNode(load_network=load_fake), ['vggt_node', *arguments])
