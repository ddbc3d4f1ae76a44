#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
The lifecycle node `vggt`: camera images in, poses, depth and a map out.

*configure* validates the settings and loads the network, *activate* starts subscriptions and the
worker, *deactivate* stops them and keeps the network, *cleanup* frees the device memory. With a
bad setting or a missing checkpoint *configure* fails, and the node stays unconfigured.

The executor has one thread and never waits for the network; the worker has the other. On SIGINT
or SIGTERM the process ends with exit code 0 within two seconds, also from inside the network.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import Network
from vggt_ros.io.names import NODE
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.ros.parameters import Parameters
from vggt_ros.ros.pipeline import Pipeline
from vggt_ros.ros.rclpy_workarounds import (
    RobustLifecycleNode,
    RosLogHandler,
    log_exceptions,
    spin_until_signal,
)
from vggt_ros.ros.runtime import Runtime, make_runtime
from vggt_ros.settings import ModelSettings

_JOIN = 0.1  # s for the worker to stop when the process ends

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE


class VggtNode(RobustLifecycleNode):
    """VGGT as a lifecycle node."""

    def __init__(
        self, load_network: Callable[[ModelSettings], Network] = load_network, **arguments: Any
    ) -> None:
        """
        Declare the parameters.

        :param load_network: makes the network; tests pass one with known output.
        :param arguments: of rclpy's node, such as `namespace` or `parameter_overrides`.
        """
        super().__init__(NODE, **arguments)
        self._load_network = load_network
        self._log_handler = RosLogHandler(self.get_logger())
        core_logger = logging.getLogger('vggt_ros')
        core_logger.addHandler(self._log_handler)
        core_logger.setLevel(logging.DEBUG)  # the level of the node filters
        self._declared = Parameters(self)
        self._runtime: Runtime | None = None  # while configured
        self._pipeline: Pipeline | None = None  # while active

    @log_exceptions
    def on_configure(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Validate the settings, load the network, create the publishers."""
        try:
            settings, node_settings = self._declared.read()
            self._runtime = make_runtime(self, settings, node_settings, self._load_network)
        except (ValueError, CheckpointError, torch.cuda.OutOfMemoryError) as error:
            self.get_logger().error(f'configuration failed: {error}')
        if self._runtime is None:  # outside of the handler, whose traceback holds the network
            self._free()
            return FAILURE
        self._declared.locked = True
        return SUCCESS

    @log_exceptions
    def on_activate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and start the worker."""
        assert self._runtime is not None  # configured
        self._pipeline = Pipeline(self._runtime)
        return SUCCESS

    @log_exceptions
    def on_deactivate(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop after the window that is being computed; keep the network."""
        assert self._runtime is not None  # configured
        self._stop_pipeline()
        self._runtime.engine.reset('the node was deactivated')
        return SUCCESS

    @log_exceptions
    def on_cleanup(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device memory."""
        self._free()
        return SUCCESS

    @log_exceptions
    def on_shutdown(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free, from any state."""
        self._stop_pipeline()
        self._free()
        return SUCCESS

    @log_exceptions
    def on_error(self, _state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free; the node can be configured again."""
        self.get_logger().error('a transition failed: the node is unconfigured')
        self._stop_pipeline()
        self._free()
        return SUCCESS

    def close(self) -> None:
        """End the node with its process, even if the worker is still inside the network."""
        if self._pipeline is not None and not self._pipeline.stop_worker(_JOIN):
            self.get_logger().warning('exiting without the result of the network')
        logging.getLogger('vggt_ros').removeHandler(self._log_handler)
        # Also then: the worker publishes nothing more, and other nodes see that this one is gone.
        self.destroy_node()

    def _stop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None

    def _free(self) -> None:
        if self._runtime is not None:
            self._runtime.destroy()
            self._runtime = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._declared.locked = False


def main(arguments: list[str] | None = None) -> None:
    """Run the node with the network that its parameters name."""
    spin_until_signal(VggtNode, arguments)


if __name__ == '__main__':
    main()
