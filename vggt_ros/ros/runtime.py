# SPDX-License-Identifier: Apache-2.0
"""
What *configure* makes and *cleanup* frees: one value, shared by all that runs while active.

`counts` and `faults` cover the time since *configure*, over *deactivate* and *activate*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rclpy.node import Node

from vggt_ros.engine import StreamingEngine
from vggt_ros.inference.network import Network
from vggt_ros.ros.faults import Faults
from vggt_ros.ros.parameters import NodeSettings
from vggt_ros.ros.publish import MapPublishers
from vggt_ros.ros.robot_inputs import RobotFrames, ScaleInputs
from vggt_ros.ros.transforms import MapToOdom
from vggt_ros.settings import ModelSettings, Settings


@dataclass(frozen=True)
class Runtime:
    """A configured node."""

    node: Node
    settings: NodeSettings
    network: Network
    engine: StreamingEngine
    robot_frames: RobotFrames
    scale_inputs: ScaleInputs
    map_to_odom: MapToOdom | None  # None: another tf_mode
    publishers: MapPublishers
    faults: Faults
    counts: Counter[str]  # images received and dropped; each key is written by one thread

    def destroy(self) -> None:
        """Destroy the publishers; network and engine are freed with this value."""
        self.publishers.destroy()
        if self.map_to_odom is not None:
            self.map_to_odom.destroy()


def make_runtime(
    node: Node,
    settings: Settings,
    node_settings: NodeSettings,
    load_network: Callable[[ModelSettings], Network],
) -> Runtime:
    """
    Load the network and create the publishers.

    :raises ValueError: if the settings do not fit each other or the network.
    :raises CheckpointError: if the network cannot be loaded.
    :raises torch.cuda.OutOfMemoryError: if the device's memory does not suffice.
    """
    network = load_network(settings.model)
    faults = Faults(node.get_logger())
    frames = RobotFrames(node)
    scale_inputs = ScaleInputs(node, settings.scale, node_settings, frames, faults)
    engine = StreamingEngine(settings, network, scale_inputs.source())
    in_map = node_settings.tf_mode == 'map_to_odom'
    return Runtime(
        node=node,
        settings=node_settings,
        network=network,
        engine=engine,
        robot_frames=frames,
        scale_inputs=scale_inputs,
        map_to_odom=MapToOdom(node, node_settings, frames, faults) if in_map else None,
        publishers=MapPublishers(node, node_settings),
        faults=faults,
        counts=Counter(),
    )
