# SPDX-License-Identifier: Apache-2.0
"""ROS domains for tests that run side by side."""

from __future__ import annotations

import os
from enum import IntEnum


class Use(IntEnum):
    """The uses for which a test process needs a domain of its own."""

    NODE = 0
    SLOW_NODE = 1
    LAUNCH = 2
    PARAMETERS = 3
    PUBLISH = 4
    VIEWER = 5


def own_domain(use: Use) -> int:
    """
    Choose the domain of this process for one use.

    :returns: 1 to 100: the ports of higher domains are also used by other programs.
    """
    return 1 + (len(Use) * os.getpid() + use) % 100
