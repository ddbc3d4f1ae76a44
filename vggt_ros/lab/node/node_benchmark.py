# SPDX-License-Identifier: Apache-2.0
"""
One measurement of the node as its users run it: camera, node and listener are three processes.

The camera plays images of a ray-cast room at 30 Hz, this process listens. Latencies are wall-clock
times from the stamp of a window's newest image to the arrival of `~/window`, the last message of a
window but for /tf. The cost of the node is CPU time, which other programs disturb less.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import QoSProfile

from vggt_ros.io import names
from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.lab.node.lifecycle import bring_up
from vggt_ros.lab.node.topic_timing import TopicTiming
from vggt_ros.msg import WindowReport
from vggt_ros.ros.publish import TOPICS

RATE = 30.0  # images per second
_STEP = 0.12  # metres from image to image, enough parallax for each
_TIMEOUT = 300.0  # seconds until all processes run: rendering takes its time
_WARM_UP = 20  # windows before the measurement
_COUNTED = ('received', 'dropped', 'no_parallax', 'windows', 'maps')


@dataclass(frozen=True)
class Case:
    """What is measured."""

    width: int  # of the camera's images, pixels
    height: int
    seconds: float
    topics: tuple[str, ...]  # subscribed, as in `TOPICS`, besides ~/window
    wall: int = 0  # width of the images of a network that costs nothing; 0: the embedded network
    window: bool = True  # subscribe to ~/window; without, latencies are unknown
    images: int = 24  # that the camera plays back and forth
    fast_resize: bool = False


class BenchmarkError(RuntimeError):
    """A process failed."""


@dataclass
class ReceivedTopics:
    """What the listener received."""

    window: TopicTiming = field(default_factory=TopicTiming)
    beside: list[float] = field(default_factory=list)  # s of each window outside of the network
    messages: dict[str, int] = field(default_factory=dict)  # by topic
    sent: int = 0  # images, by the true poses of the camera
    counts: dict[str, int] = field(default_factory=dict)  # of the last diagnostics
    diagnostics: int = 0


def measure_node(case: Case) -> dict[str, Any]:
    """
    Start camera and node, listen and measure.

    :returns: the case, `latency_p50` and `latency_p95` in s (None without ~/window), `beside_p50`
        (their part outside of DDS and the network: wall-clock time from the arrival of the image
        that completes a window to the publication of ~/window), `windows` and
        `windows_per_second`, images `sent`, `received`, `lost` in transport, `dropped` and
        without parallax, `cpu_share` (1: one core), `windows_per_cpu_second`, `memory_bytes`, and
        `cpu_ms_per_window`, see `node_work`.
    :raises BenchmarkError: if a process ends early or no windows come.
    """
    with tempfile.TemporaryDirectory() as folder:
        clocks = Path(folder) / 'clocks'
        node: dict[str, object] = {
            'checkpoint': 'embedded',
            'fast_resize': str(case.fast_resize).lower(),
        }
        timed = ('--clocks', str(clocks), '--wall', str(case.wall))
        camera: dict[str, object] = {
            'width': case.width,
            'height': case.height,
            'rate': RATE,
            'frames': case.images,
            'step': _STEP,
            'loop': 'true',
            'wait': _TIMEOUT,
        }
        rclpy.init()
        children = [
            _start('timed_node', *timed, '--ros-args', *_parameters(node)),
            _start('synthetic_camera', '--ros-args', *_parameters(camera)),
        ]
        try:
            return _listen(case, children, clocks)
        finally:
            for child in children:
                child.send_signal(signal.SIGINT)
            for child in children:
                child.wait()
            rclpy.try_shutdown()


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, '-m', f'vggt_ros.lab.node.{module}', *arguments])


def _parameters(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in ('-p', f'{name}:={value}')]


def _listen(
    case: Case, children: Sequence[subprocess.Popen[bytes]], clocks: Path
) -> dict[str, Any]:
    node = rclpy.create_node('benchmark')
    received = ReceivedTopics()
    _subscribe(node, case, received)
    bring_up(node, f'/{names.NODE}', _TIMEOUT)
    deadline = time.monotonic() + _TIMEOUT

    def spin_to_diagnostics(condition: Callable[[], bool]) -> None:
        """Spin until the first diagnostics after a condition is true."""
        while not condition():
            rclpy.spin_once(node, timeout_sec=0.1)
            if any(child.poll() is not None for child in children):
                raise BenchmarkError('the node or the camera ended: see their logs')
            if time.monotonic() > deadline:
                raise BenchmarkError(f'{received.counts} after {_TIMEOUT:.0f} s')
        seen = received.diagnostics
        while received.diagnostics == seen:
            rclpy.spin_once(node, timeout_sec=0.1)

    spin_to_diagnostics(lambda: received.counts.get('windows', 0) >= _WARM_UP)
    before, cpu, sent = dict(received.counts), cpu_seconds(children[0].pid), received.sent
    received.window, received.beside, received.messages = TopicTiming(), [], {}
    begin = time.monotonic()
    deadline += case.seconds
    spin_to_diagnostics(lambda: time.monotonic() > begin + case.seconds)
    seconds = time.monotonic() - begin
    cpu = cpu_seconds(children[0].pid) - cpu
    counts = {name: received.counts.get(name, 0) - before.get(name, 0) for name in _COUNTED}
    sent = received.sent - sent
    lines = [json.loads(line) for line in clocks.read_text().splitlines()]
    latencies = [received.window.latency_ms(percent) / 1e3 for percent in (50, 95)]
    return {
        **asdict(case),
        'profile': bool(os.environ.get('FASTRTPS_DEFAULT_PROFILES_FILE')),
        'measured_seconds': seconds,
        'latency_p50': latencies[0] if case.window else None,
        'latency_p95': latencies[1] if case.window else None,
        'beside_p50': float(np.median(received.beside)) if case.window else None,
        'windows_per_second': counts['windows'] / seconds,
        'sent': sent,
        'lost': sent - counts['received'],
        **counts,
        'messages': received.messages,
        'cpu_share': cpu / seconds,
        'windows_per_cpu_second': counts['windows'] / cpu,
        'memory_bytes': resident_memory(children[0].pid),
        'cpu_ms_per_window': node_work(lines[_WARM_UP : _WARM_UP + counts['windows']]),
    }


def _subscribe(node: Node, case: Case, received: ReceivedTopics) -> None:
    qos = QoSProfile(depth=100)

    def count_message(topic: str, _message: bytes) -> None:
        received.messages[topic] = received.messages.get(topic, 0) + 1

    def receive_window(message: WindowReport) -> None:
        received.window.add(time.time_ns(), ns_from_time(message.header.stamp))
        received.beside.append(message.total_seconds - message.inference_seconds)

    def receive_truth(_message: PoseStamped) -> None:
        received.sent += 1

    def receive_diagnostics(message: DiagnosticArray) -> None:
        for pair in message.status[0].values:
            if pair.key in _COUNTED:
                received.counts[pair.key] = int(pair.value)
        received.diagnostics += 1

    for topic in case.topics:  # raw: the cost of decoding is not the node's
        node.create_subscription(
            TOPICS[topic],
            names.resolve_private(topic),
            partial(count_message, topic),
            qos,
            raw=True,
        )
    if case.window:
        window = names.resolve_private(names.WINDOW)
        node.create_subscription(WindowReport, window, receive_window, qos)
    node.create_subscription(PoseStamped, names.TRUTH, receive_truth, qos)
    node.create_subscription(DiagnosticArray, names.DIAGNOSTICS, receive_diagnostics, qos)


def node_work(lines: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """
    Compute the node's work outside of the network, CPU ms for each window.

    :param lines: of `timed_node`, in the order of the windows, at least two.
    :returns: medians: `worker` from the end of one forward pass to the next (decoding,
        selection and preprocessing of frames; reconstruction, registration, publication),
        `executor` (receiving images from DDS, diagnostics), `both` of them, and `other_threads`,
        mostly those of DDS, while the network does not run. `both_least`: the tenth percentile.
        `forward`: of the worker alone.
    """
    worker, executor, others, forward = [], [], [], []
    for one, two in pairwise(lines):
        forward.append(one['end']['worker'] - one['begin']['worker'])
        worker.append(two['begin']['worker'] - one['end']['worker'])
        executor.append(two['begin']['executor'] - one['begin']['executor'])
        while_idle = two['begin']['executor'] - one['end']['executor']
        process = two['begin']['process'] - one['end']['process']
        others.append(process - worker[-1] - while_idle)
    both = np.add(worker, executor)
    return {
        'worker': 1e3 * float(np.median(worker)),
        'executor': 1e3 * float(np.median(executor)),
        'both': 1e3 * float(np.median(both)),
        'both_least': 1e3 * float(np.percentile(both, 10)),
        'other_threads': 1e3 * float(np.median(others)),
        'forward': 1e3 * float(np.median(forward)),
    }


def cpu_seconds(process: int) -> float:
    """Read the CPU time of a process, all threads, in user and kernel mode."""
    fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def resident_memory(process: int) -> int:
    """Read the resident memory of a process in bytes."""
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return 1024 * int(line.split()[1])
    raise BenchmarkError(f'process {process} has ended')


def main() -> None:
    """Measure the case given as JSON on standard input; write the figures to a file."""
    case = json.loads(sys.stdin.read())
    figures = measure_node(Case(**{**case, 'topics': tuple(case['topics'])}))
    Path(sys.argv[1]).write_text(json.dumps(figures))


if __name__ == '__main__':
    main()
