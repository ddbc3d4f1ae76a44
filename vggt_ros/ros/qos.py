# SPDX-License-Identifier: Apache-2.0
"""QoS profiles: those of the parameters and those that tf2_ros uses."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

TF_QOS = QoSProfile(depth=100)  # reliable, volatile
TF_STATIC_QOS = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def make_qos(reliability: str, depth: int) -> QoSProfile:
    """
    Make a QoS profile that keeps the last `depth` messages.

    :param reliability: 'reliable' or 'best_effort'.
    """
    policy = {
        'reliable': ReliabilityPolicy.RELIABLE,
        'best_effort': ReliabilityPolicy.BEST_EFFORT,
    }[reliability]
    return QoSProfile(depth=depth, reliability=policy)
