# SPDX-License-Identifier: Apache-2.0
"""`ros2 launch vggt_ros vggt.launch.py` brings the node to *active*, and SIGINT ends both."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import time

import pytest

pytest.importorskip('rclpy', reason='needs ROS')
import rclpy
from lifecycle_msgs.srv import GetState
from ros_domain import Use, own_domain

DOMAIN = own_domain(Use.LAUNCH)
LONGEST = 180.0  # seconds until active, with torch imported on a slow machine

# The folder launch/ of this repository looks like a package named launch, so look for launch_ros.
pytestmark = pytest.mark.skipif(
    shutil.which('ros2') is None or importlib.util.find_spec('launch_ros') is None,
    reason='no `ros2 launch` here: ros2cli and launch_ros are not installed',
)


@pytest.fixture
def client_node():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=DOMAIN)
    node = rclpy.create_node('client_node', context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield node, executor
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)


def start(log, *arguments):
    with open(log, 'w') as output:
        return subprocess.Popen(
            ['ros2', 'launch', 'vggt_ros', 'vggt.launch.py', *arguments],
            env={**os.environ, 'ROS_DOMAIN_ID': str(DOMAIN)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # `end` kills the group, the node included
            # A shell that runs the tests in the background makes them ignore SIGINT, which launch
            # would inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def end(process):
    """Kill all processes of the launch."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_state(client_node, service, wanted):
    node, executor = client_node
    client = node.create_client(GetState, service)
    deadline = time.monotonic() + LONGEST
    state = 'absent'
    while state != wanted and time.monotonic() < deadline:
        if client.service_is_ready():
            answer = client.call_async(GetState.Request())
            executor.spin_until_future_complete(answer, timeout_sec=5)
            state = answer.result().current_state.label if answer.done() else 'silent'
        executor.spin_once(timeout_sec=0.2)
    return state


def test_the_node_becomes_active_under_the_given_names_and_ends_with_the_launch(
    client_node, tmp_path
):
    log = tmp_path / 'log'
    process = start(
        log,
        *('namespace:=robot', 'image_topic:=/front/image', 'log_level:=warn'),
        *('scale_source:=odometry', 'odometry_topic:=/wheel/odometry'),
    )
    try:
        assert wait_for_state(client_node, '/robot/vggt/get_state', 'active') == 'active', (
            log.read_text()
        )
        topics = dict(client_node[0].get_topic_names_and_types())
        assert topics['/front/image'] == ['sensor_msgs/msg/Image']
        assert client_node[0].count_subscribers('/front/image') == 1
        assert client_node[0].count_subscribers('/wheel/odometry') == 1
        assert '/robot/vggt/points' in topics
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        end(process)
    assert 'Traceback' not in log.read_text()


def test_a_bad_setting_leaves_the_node_unconfigured_with_an_error(client_node, tmp_path):
    log = tmp_path / 'log'
    process = start(log, 'checkpoint:=/nowhere/weights.pt')
    try:
        deadline = time.monotonic() + LONGEST
        while 'configuration failed' not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert '/nowhere/weights.pt' in log.read_text()
        assert wait_for_state(client_node, '/vggt/get_state', 'unconfigured') == 'unconfigured'
        process.send_signal(signal.SIGINT)
        process.wait(60)  # launch itself takes long to end on a loaded machine
    finally:
        end(process)


def test_a_missing_parameter_file_ends_the_launch(tmp_path):
    log = tmp_path / 'log'
    process = start(log, 'params_file:=/nowhere/mine.yaml')
    try:
        assert process.wait(LONGEST) == 1
    finally:
        end(process)
    assert "params_file is '/nowhere/mine.yaml', expected a file" in log.read_text()
