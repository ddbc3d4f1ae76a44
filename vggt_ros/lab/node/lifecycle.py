# SPDX-License-Identifier: Apache-2.0
"""
Configures and activates a lifecycle node from another process, where no launch file does it.

    python3 -m vggt_ros.lab.node.lifecycle /vggt 60

The exit code is 0 when the node is active, else 1, with one line on standard error.
"""

from __future__ import annotations

import sys
import time

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.client import Client
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

_TRANSITIONS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
}


class TransitionError(RuntimeError):
    """A node does not answer, or rejects a transition."""


def bring_up(node: Node, target: str, timeout: float) -> None:
    """
    Configure and activate a lifecycle node.

    :param node: makes the requests; it is spun here.
    :param target: full name of the lifecycle node, such as /vggt.
    :param timeout: seconds for both transitions.
    :raises TransitionError: if the node is not active in time.
    """
    deadline = time.monotonic() + timeout
    client: Client = node.create_client(ChangeState, f'{target}/change_state')
    try:
        if not client.wait_for_service(timeout):
            raise TransitionError(f'no lifecycle node {target} after {timeout:.0f} s')
        for name, transition in _TRANSITIONS.items():
            request = ChangeState.Request(transition=Transition(id=transition))
            future = client.call_async(request)
            rclpy.spin_until_future_complete(
                node, future, timeout_sec=max(0.0, deadline - time.monotonic())
            )
            response = future.result()
            if response is None:
                raise TransitionError(f'{target} did not {name} within {timeout:.0f} s')
            if not response.success:
                raise TransitionError(f'{target} failed to {name}: see its log')
    finally:
        node.destroy_client(client)


def main() -> int:
    """Bring up the node that the command line names."""
    target, timeout = sys.argv[1], float(sys.argv[2])
    rclpy.init()
    try:
        bring_up(rclpy.create_node('bring_up'), target, timeout)
    except TransitionError as error:
        sys.stderr.write(f'{error}\n')
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
