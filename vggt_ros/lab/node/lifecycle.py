# SPDX-License-Identifier: Apache-2.0
"""
Brings a lifecycle node to *active* from outside, where no launch file does it.

    python3 -m vggt_ros.lab.node.lifecycle /vggt 60

ends with 0 when the node is active, else with 1 and one sentence.
"""

from __future__ import annotations

import sys
import time

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

_STEPS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
}


class TransitionError(RuntimeError):
    """A node that does not answer or refuses a transition."""


def bring_up(node: Node, target: str, timeout: float) -> None:
    """
    Configure and activate a lifecycle node.

    :param node: a node of this process to ask from; it is spun here.
    :param target: full name of the lifecycle node, such as /vggt.
    :param timeout: seconds for everything together.
    :raises TransitionError: if the node is not active in time.
    """
    deadline = time.monotonic() + timeout
    client = node.create_client(ChangeState, f'{target}/change_state')
    try:
        if not client.wait_for_service(timeout):
            raise TransitionError(f'there is no lifecycle node {target} after {timeout:.0f} s')
        for step, transition in _STEPS.items():
            request = ChangeState.Request(transition=Transition(id=transition))
            answer = client.call_async(request)
            rclpy.spin_until_future_complete(
                node, answer, timeout_sec=max(0.0, deadline - time.monotonic())
            )
            if not answer.done():
                raise TransitionError(f'{target} did not {step} within {timeout:.0f} s')
            if not answer.result().success:
                raise TransitionError(f'{target} refused to {step}: its log says why')
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
