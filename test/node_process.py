# SPDX-License-Identifier: Apache-2.0
"""
The node as its users run it: a process of its own, reached over DDS only.

`NodeProcess` starts `fake_node.py` in a ROS domain of its own; `Driver` is the rest of the robot:
it triggers transitions, publishes images and keeps all messages of the node.
"""

from __future__ import annotations

import array
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import fake_node
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger
from tf2_msgs.msg import TFMessage

from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.io.names import resolve_private
from vggt_ros.ros.messages import builder
from vggt_ros.ros.publish import TOPICS

# Importing torch and rclpy takes half a minute on a slow machine: one process imports them, and
# every node is forked from it; ROS is not initialised there.
START = multiprocessing.get_context('forkserver')
START.set_forkserver_preload(['pytest', 'vggt_ros.ros.node'])
SIZE, STRIDE = 8, 6  # the stride is large, so that a slow test machine drops nothing
ARGUMENTS = {
    'min_parallax': 0.0,
    'window_size': SIZE,
    'window_stride': STRIDE,
    'image_reliability': 'reliable',
    'image_depth': 100,
    'publish_depth': 100,
    'diagnostics_period': 0.1,
}
BASE_NS = 1_000_000_000_000
PERIOD_NS = 100_000_000
COLOUR = (40, 90, 160)
TRANSITIONS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
    'deactivate': Transition.TRANSITION_DEACTIVATE,
    'cleanup': Transition.TRANSITION_CLEANUP,
}


def stamp_of(number):
    return BASE_NS + round(number * PERIOD_NS)


def make_image(number, width=64, height=48, frame='camera', red=COLOUR[0]):
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = (COLOUR[2], COLOUR[1], red)
    return Image(
        header=builder.header(frame, stamp_of(number)),
        height=height,
        width=width,
        encoding='bgr8',
        step=3 * width,
        data=array.array('B', pixels.tobytes()),
    )


class NodeProcess:
    """The node with the fake network, running."""

    def __init__(self, domain, log, seconds=0.0, **parameters):
        arguments = ['--ros-args']
        for name, value in {**ARGUMENTS, **parameters}.items():
            arguments += ['-p', f'{name}:={value}']
        environment = {'ROS_DOMAIN_ID': str(domain), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
        self.log = log
        self.process = START.Process(
            target=fake_node.run, args=(log, environment, arguments, seconds), daemon=True
        )
        self.process.start()

    def status(self, key):
        """Read a number from /proc, such as Threads or VmRSS (KiB)."""
        for line in Path(f'/proc/{self.process.pid}/status').read_text().splitlines():
            if line.startswith(f'{key}:'):
                return int(line.split()[1])
        raise KeyError(key)

    def shared_memory(self):
        """Return the names of DDS's shared-memory segments in the process, without ports."""
        maps = Path(f'/proc/{self.process.pid}/maps').read_text()
        return set(re.findall(r'/dev/shm/fast(?:rtps|dds)_[0-9a-f]{16}\b', maps))

    def output(self):
        return self.log.read_text()

    def stacks(self):
        """Return the output, with the stacks of the threads at the end."""
        if self.process.is_alive():
            os.kill(self.process.pid, fake_node.STACKS)
            time.sleep(1)
        return self.output()

    def leave(self, number=signal.SIGINT):
        """
        Send a signal; return the exit code and the seconds it took.

        A virtual machine can pause for a second. The time that this process oversleeps is the
        machine's, not the node's, and is subtracted.
        """
        started = before = time.monotonic()
        paused = 0.0
        os.kill(self.process.pid, number)
        while self.process.is_alive() and before - started < 20:
            time.sleep(0.005)
            now = time.monotonic()
            paused += max(0.0, now - before - 0.02)
            before = now
        return self.process.exitcode, before - started - paused

    def kill(self):
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Driver:
    """The other side of every topic and service of the node."""

    def __init__(self, node_process, domain, topics=tuple(TOPICS)):
        self.node_process = node_process
        os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node('driver', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.got = {}
        qos = QoSProfile(depth=200)
        for topic in topics:
            self.listen(TOPICS[topic], resolve_private(topic), topic[2:], qos)
        self.listen(TFMessage, '/tf', 'tf', qos)
        self.listen(DiagnosticArray, '/diagnostics', 'diagnostics', qos)
        self.images = self.node.create_publisher(Image, 'image_raw', qos)
        self.jpegs = self.node.create_publisher(CompressedImage, 'image_raw/compressed', qos)
        self.infos = self.node.create_publisher(CameraInfo, 'camera_info', qos)
        services = {
            'change_state': ChangeState,
            'get_state': GetState,
            'set_parameters': SetParameters,
            'reset': Trigger,
        }
        self.clients = {
            name: self.node.create_client(kind, f'/vggt/{name}') for name, kind in services.items()
        }

    def listen(self, kind, topic, name, qos):
        """Subscribe, and keep the messages under a name."""
        self.got[name] = []
        self.node.create_subscription(kind, topic, self.got[name].append, qos)

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def spin_until(self, condition, seconds=60.0, what='result'):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                output = self.node_process.stacks()
                raise AssertionError(f'no {what} after {seconds} s; the node:\n{output}')
            self.executor.spin_once(timeout_sec=0.05)

    def spin_for(self, seconds):
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=left)

    def call(self, service, request, seconds=120.0):
        client = self.clients[service]
        self.spin_until(client.service_is_ready, seconds, service)
        future = client.call_async(request)
        self.spin_until(future.done, seconds, f'response of {service}')
        return future.result()

    def change(self, *names):
        """Request transitions; return whether the last one succeeded."""
        for name in names:
            request = ChangeState.Request(transition=Transition(id=TRANSITIONS[name]))
            response = self.call('change_state', request)
        return response.success

    def state(self):
        return self.call('get_state', GetState.Request()).current_state.label

    def set(self, **values):
        parameters = [Parameter(name, value=v).to_parameter_msg() for name, v in values.items()]
        return self.call('set_parameters', SetParameters.Request(parameters=parameters)).results[0]

    def settle(self, publisher=None):
        """Wait until node and driver have discovered each other; clear the messages."""
        publisher = publisher or self.images
        self.spin_until(lambda: publisher.get_subscription_count() > 0, what='subscription')
        self.got['diagnostics'].clear()
        self.spin_until(lambda: self.got['diagnostics'], what='diagnostics')
        self.spin_for(0.15)
        for messages in self.got.values():
            messages.clear()

    def send(self, numbers, make=make_image, **how):
        """Publish images no faster than the node processes them."""
        numbers = list(numbers)
        for first in range(0, len(numbers), STRIDE):  # the capacity of the node
            chunk = numbers[first : first + STRIDE]
            received = int(self.health()[1].get('received', 0)) + len(chunk)
            for number in chunk:
                self.images.publish(make(number, **how))
            self.wait_health(received=received, waiting=0)

    def wait_windows(self, count, seconds=60.0):
        self.spin_until(lambda: len(self.got['window']) >= count, seconds, f'{count} windows')
        return self.got['window']

    def health(self):
        """Wait for a fresh diagnostics message; return status and values."""
        self.got['diagnostics'].clear()
        self.spin_until(lambda: len(self.got['diagnostics']) > 1, what='diagnostics')
        status = self.got['diagnostics'][-1].status[0]
        return status, {pair.key: pair.value for pair in status.values}

    def wait_health(self, seconds=60.0, **expected):
        """Wait until the diagnostics have these values."""
        deadline = time.monotonic() + seconds
        expected = {key: str(value) for key, value in expected.items()}
        while True:
            status, values = self.health()
            if all(values.get(key) == value for key, value in expected.items()):
                return status, values
            assert time.monotonic() < deadline, f'{values} but expected {expected}'


def by_stamp(messages):
    return {ns_from_time(message.header.stamp): message for message in messages}
