#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
The lifecycle node `vggt`: camera images in, poses, depth and a map out.

*configure* validates the settings and loads the network, *activate* starts subscriptions and the
worker, *deactivate* stops them and keeps the network, *cleanup* frees the device's memory. A bad
setting or a missing checkpoint makes *configure* fail with one sentence; the node lives on.

The executor has one thread and never waits for the network; the worker has the other. SIGINT and
SIGTERM end the process with exit code 0 within two seconds: a thread inside the network cannot be
interrupted, so the process then leaves without it.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import rclpy
import torch
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from vggt_ros.engine import StreamingEngine
from vggt_ros.inference.network import Network, load_network
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.ros.log import RosLogHandler
from vggt_ros.ros.map_to_odom import MapToOdom
from vggt_ros.ros.parameters import NodeSettings, Parameters
from vggt_ros.ros.pipeline import Pipeline
from vggt_ros.ros.publish import MapPublishers
from vggt_ros.ros.robot_frames import RobotFrames
from vggt_ros.ros.scale_inputs import ScaleInputs
from vggt_ros.settings import ModelSettings, Settings

_POLL = 0.05  # seconds until a signal is noticed
_JOIN = 0.1  # seconds that the worker gets to end when the process does
_LONGEST_EXIT = 0.4  # seconds from the signal to the end, whatever hangs; a full machine adds more

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE


def _reported(callback: Callable[..., TransitionCallbackReturn]) -> Callable[..., Any]:
    """Log what a transition raises: rclpy only moves on to *error processing*, in silence."""

    @functools.wraps(callback)
    def transition(node: VggtNode, state: Any) -> TransitionCallbackReturn:
        try:
            return callback(node, state)
        except Exception:
            node.get_logger().error(f'{callback.__name__} failed: {traceback.format_exc()}')
            raise

    return transition


class VggtNode(LifecycleNode):
    """VGGT as a lifecycle node."""

    def __init__(
        self, load_network: Callable[[ModelSettings], Network] = load_network, **arguments: Any
    ) -> None:
        """
        Declare the parameters; nothing else happens before *configure*.

        :param load_network: makes the network; tests pass one that knows the truth.
        :param arguments: for rclpy's node, such as `namespace` or `parameter_overrides`.
        """
        super().__init__('vggt', **arguments)
        self._load_network = load_network
        self._log_handler = RosLogHandler(self.get_logger())
        core_logger = logging.getLogger('vggt_ros')
        core_logger.addHandler(self._log_handler)
        core_logger.setLevel(logging.DEBUG)  # the node's own level decides what is shown
        self._declared = Parameters(self)
        self._settings = Settings()
        self._node_settings = NodeSettings()
        self._network: Network | None = None
        self._engine: StreamingEngine | None = None
        self._robot_frames: RobotFrames | None = None
        self._scale_inputs: ScaleInputs | None = None
        self._map_to_odom: MapToOdom | None = None
        self._map_publishers: MapPublishers | None = None
        self._pipeline: Pipeline | None = None
        self._counts: Counter[str] = Counter()

    @_reported
    def on_configure(self, _state: Any) -> TransitionCallbackReturn:
        """Validate the settings, load the network, announce the topics."""
        try:
            self._settings, self._node_settings = self._declared.read()
            self._network = self._load_network(self._settings.model)
            self._robot_frames = RobotFrames()
            self._scale_inputs = ScaleInputs(
                self._settings.scale, self._node_settings, self._robot_frames
            )
            self._engine = StreamingEngine(
                self._settings, self._network, self._scale_inputs.source()
            )
        except (ValueError, CheckpointError, torch.cuda.OutOfMemoryError) as error:
            self.get_logger().error(f'cannot be configured: {error}')
            self._free()
            return FAILURE
        if self._node_settings.tf_mode == 'map_to_odom':
            self._map_to_odom = MapToOdom(self._node_settings, self._robot_frames)
        self._map_publishers = MapPublishers(self, self._node_settings)
        self._counts = Counter()
        self._declared.locked = True
        return SUCCESS

    @_reported
    def on_activate(self, _state: Any) -> TransitionCallbackReturn:
        """Subscribe and start the worker."""
        self._pipeline = Pipeline(
            self,
            self._node_settings,
            self._engine.window_stride,
            self._network,
            self._engine,
            self._map_publishers,
            self._robot_frames,
            self._scale_inputs,
            self._map_to_odom,
            self._counts,
        )
        return SUCCESS

    @_reported
    def on_deactivate(self, _state: Any) -> TransitionCallbackReturn:
        """Stop, after the window that is being computed; keep the network."""
        self._stop_pipeline()
        self._engine.reset('the node was deactivated')
        return SUCCESS

    @_reported
    def on_cleanup(self, _state: Any) -> TransitionCallbackReturn:
        """Give the device's memory back."""
        self._free()
        return SUCCESS

    @_reported
    def on_shutdown(self, _state: Any) -> TransitionCallbackReturn:
        """Stop and free, from whichever state."""
        self._stop_pipeline()
        self._free()
        return SUCCESS

    @_reported
    def on_error(self, _state: Any) -> TransitionCallbackReturn:
        """Stop and free; the node can be configured again."""
        self.get_logger().error('a transition failed; the node is unconfigured now')
        self._stop_pipeline()
        self._free()
        return SUCCESS

    def _LifecycleNodeMixin__on_change_state(self, request: Any, response: Any) -> Any:  # noqa: N802
        """
        Answer a transition that the present state does not have with success = False.

        rclpy (Humble to Kilted) raises out of this service callback of its own instead, which
        ends the executor and with it the node.
        """
        try:
            return super()._LifecycleNodeMixin__on_change_state(request, response)
        except rclpy_implementation.RCLError as error:
            self.get_logger().error(f'transition {request.transition.id} was refused: {error}')
            response.success = False
            return response

    def close(self) -> None:
        """End the node with its process, even if the worker is still inside the network."""
        if self._pipeline is not None and not self._pipeline.stop_computing(_JOIN):
            self.get_logger().warning('the network is still computing: leaving without its result')
        logging.getLogger('vggt_ros').removeHandler(self._log_handler)
        # Even then: the worker publishes nothing more, and others must not wait for a dead node.
        # This takes everything off the graph at once.
        self.destroy_node()
        # rclpy's state machine holds the node in rcl, and with it the participant of DDS, whose
        # shared memory (70 MB with config/fastdds.xml) would stay when the process has ended.
        del self._state_machine

    def _stop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None

    def _free(self) -> None:
        self._network = self._engine = None
        self._robot_frames = self._scale_inputs = self._map_to_odom = None
        if self._map_publishers is not None:
            self._map_publishers.destroy()
            self._map_publishers = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._declared.locked = False


def spin_until_signal(make_node: Callable[[], VggtNode], arguments: list[str] | None) -> None:
    """
    Run a node until SIGINT or SIGTERM, which then end the process with exit code 0.

    :param make_node: called once rclpy is initialised.
    :param arguments: of the command line; None: those of the process.
    """
    leaving = threading.Event()

    def give_up() -> None:
        sys.stderr.write(f'vggt: not closed after {_LONGEST_EXIT} s, leaving without that\n')
        _leave_at_once()

    def leave(_number: int, _frame: object) -> None:
        if not leaving.is_set():
            leaving.set()
            # loading a network or a hanging middleware can hold the main thread
            timer = threading.Timer(_LONGEST_EXIT, give_up)
            timer.daemon = True
            timer.start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = make_node()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    # What torch and rclpy made at import stays; a collection that visits it holds the node up for
    # a second on a slow machine.
    gc.collect()
    gc.freeze()
    while not leaving.is_set():
        executor.spin_once(timeout_sec=_POLL)
    executor.shutdown()
    node.close()
    rclpy.shutdown()
    _leave_at_once()


def _leave_at_once() -> None:
    """End the process without waiting for any thread, or for Python, which clears torch away."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Run the node with the network that its parameters name."""
    spin_until_signal(VggtNode, arguments)


if __name__ == '__main__':
    main()
