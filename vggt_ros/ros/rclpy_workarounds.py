# SPDX-License-Identifier: Apache-2.0
"""
Work-arounds for rclpy, each with its reason and the versions that need it.

Versions: Humble has rclpy 3.3, Jazzy 7.1, Kilted 9.1.
"""

from __future__ import annotations

import array
import functools
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

_POLL = 0.05  # s between two checks for a signal
_MAX_EXIT = 0.4  # s from the signal to the end of the process; a loaded machine adds more

# The typecodes that the setters of messages accept; numpy names uint64 'L'.
_TYPECODES = {np.uint8: 'B', np.uint64: 'Q', np.float32: 'f', np.float64: 'd'}


def sequence_from_array(values: npt.NDArray[Any]) -> array.array[Any]:
    """
    Convert an array to the value of a message field of variable length.

    The setters of rosidl's Python messages store an array.array as it is, but copy a numpy array
    element by element, which takes about 300 times longer. (All versions.)

    :param values: of any shape, uint8, uint64, float32 or float64.
    """
    sequence: array.array[Any] = array.array(_TYPECODES[values.dtype.type])
    sequence.frombytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return sequence


class RosLogHandler(logging.Handler):
    """
    Forwards the records of Python's `logging` to the logger of a node.

    rclpy raises ValueError where one line of code logs with another severity than before, hence
    one line for each severity. (All versions.)
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record with the nearest severity."""
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)


N = TypeVar('N', bound=Node)
Transition = Callable[[N, LifecycleState], TransitionCallbackReturn]


def log_exceptions(callback: Transition[N]) -> Transition[N]:
    """
    Log the exception of a transition callback.

    rclpy goes to *error processing* without logging it. (All versions.)
    """

    @functools.wraps(callback)
    def transition(node: N, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return callback(node, state)
        except Exception:
            node.get_logger().error(f'{callback.__name__} failed: {traceback.format_exc()}')
            raise

    return transition


class RobustLifecycleNode(LifecycleNode):
    """A lifecycle node that survives invalid transitions and leaves no shared memory."""

    def _LifecycleNodeMixin__on_change_state(self, request: Any, response: Any) -> Any:  # noqa: N802
        """
        Answer a transition that the current state does not have with success = False.

        rclpy raises from its service callback instead, which ends the executor. (Humble, Jazzy;
        rclpy 8.0 answers by itself, https://github.com/ros2/rclpy/pull/1319.)
        """
        try:
            return super()._LifecycleNodeMixin__on_change_state(  # type: ignore[misc]
                request, response
            )
        except rclpy_implementation.RCLError as error:
            self.get_logger().error(f'transition {request.transition.id} rejected: {error}')
            response.success = False
            return response

    def destroy_node(self) -> None:
        """
        Destroy the node and the state machine.

        rclpy's state machine holds the node of rcl and with it the DDS participant, whose shared
        memory (70 MB with config/fastdds.xml) would stay after the process ends. (All versions.)
        """
        super().destroy_node()
        del self._state_machine

    def close(self) -> None:
        """End the node with its process, without waiting for other threads."""
        self.destroy_node()


def spin_until_signal(
    make_node: Callable[[], RobustLifecycleNode], arguments: list[str] | None = None
) -> None:
    """
    Run a node until SIGINT or SIGTERM, then end the process with exit code 0.

    rclpy's own handlers invalidate the context while callbacks run, and the publishers then raise.
    The handlers here only set an event. The process ends by `os._exit`: Python would wait for the
    worker's thread, which may be inside the network for seconds and cannot be interrupted, and the
    destructors of torch and of the middleware take longer than launch files wait. (All versions.)

    :param make_node: called after rclpy is initialised.
    :param arguments: of the command line; None: those of the process.
    """
    leaving = threading.Event()

    def give_up() -> None:
        sys.stderr.write(f'vggt: not closed after {_MAX_EXIT} s, exiting\n')
        _exit_now()

    def leave(_number: int, _frame: object) -> None:
        if not leaving.is_set():
            leaving.set()
            # the main thread may be loading a network, or hang in the middleware
            timer = threading.Timer(_MAX_EXIT, give_up)
            timer.daemon = True
            timer.start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = make_node()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    # The objects that the imports of torch and rclpy made stay; a garbage collection that visits
    # them blocks the executor for up to a second on a slow machine.
    gc.collect()
    gc.freeze()
    while not leaving.is_set():
        executor.spin_once(timeout_sec=_POLL)
    executor.shutdown()
    node.close()
    rclpy.shutdown()
    _exit_now()


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
