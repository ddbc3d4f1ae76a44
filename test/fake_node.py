#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
The real node with the network that knows the truth; started by the tests as a process.

The checkpoint `missing` fails as one that is not there; FAKE_SECONDS is the time that the network
takes for each window.
"""

from __future__ import annotations

import os

from fake_network import FakeNetwork, warm_up

from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.ros.node import VggtNode, spin_until_signal
from vggt_ros.settings import ModelSettings


def load_fake(settings: ModelSettings) -> FakeNetwork:
    """Make the fake network, or fail as the real loader does."""
    if settings.checkpoint == 'missing':
        raise CheckpointError('missing: there is no such file')
    return FakeNetwork(seconds=float(os.environ.get('FAKE_SECONDS', '0')))


if __name__ == '__main__':
    warm_up()
    spin_until_signal(lambda: VggtNode(load_network=load_fake), None)
