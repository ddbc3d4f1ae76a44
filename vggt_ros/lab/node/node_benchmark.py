# SPDX-License-Identifier: Apache-2.0
"""
One measurement of the node, as its users have it: camera, node and listener are three processes.

The camera plays pictures of a ray-cast room at 30 Hz, this process listens. Latencies are by the
wall clock, from the stamp of a window's newest image to the arrival of `~/window`, which is the
last message about a window but for /tf. What the node costs is CPU time, which other programs on
the machine disturb less.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.qos import QoSProfile

from vggt_ros.io.message_reading import ns_from_time
from vggt_ros.lab.benchmarks.timing import TopicTiming
from vggt_ros.lab.node.lifecycle import bring_up
from vggt_ros.ros.publish import TOPICS

RATE = 30.0  # images per second
_STEP = 0.12  # metres from picture to picture: each shows enough that is new
_PATIENCE = 300.0  # seconds until everything runs: rendering takes its time
_WARM = 20  # windows before the measurement
_COUNTED = ('received', 'dropped', 'no_parallax', 'windows', 'maps')


@dataclass(frozen=True)
class Case:
    """What is measured."""

    width: int  # of the camera's images, pixels
    height: int
    seconds: float
    topics: tuple[str, ...]  # that are listened to, as in `TOPICS`, besides ~/window
    wall: int = 0  # the network's width where it is to cost nothing; 0: the embedded one
    window: bool = True  # listen to ~/window; without, latencies are not known
    pictures: int = 24  # that the camera plays to and fro
    fast_resize: bool = False


class BenchmarkError(RuntimeError):
    """A process that did not do its part."""


@dataclass
class ReceivedTopics:
    """What the listener got."""

    window: TopicTiming = field(default_factory=TopicTiming)
    beside: list[float] = field(default_factory=list)  # s that windows took beside the network
    messages: dict[str, int] = field(default_factory=dict)
    sent: int = 0  # images, by the camera's own poses
    counts: dict[str, int] = field(default_factory=dict)  # of the last diagnostics
    diagnostics: int = 0


def measure_node(case: Case) -> dict[str, Any]:
    """
    Start camera and node, listen, and say what it took.

    :returns: the case, `latency_p50` and `latency_p95` in s (None without ~/window), `beside_p50`
        (what of it is neither DDS nor the network: from the arrival of the image that completes a
        window to the publication of ~/window, by the wall clock), `windows`
        and `windows_per_second`, images `sent`, `received`, `lost` on the way, `dropped` and
        without parallax, `cpu_share` (1: one core), `windows_per_cpu_second`, `memory_bytes`, and
        `cpu_ms_per_window`, see `node_work`.
    :raises BenchmarkError: if a process ends or nothing comes.
    """
    with tempfile.TemporaryDirectory() as folder:
        clocks = Path(folder) / 'clocks'
        node = {'checkpoint': 'embedded', 'fast_resize': str(case.fast_resize).lower()}
        timed = ('--clocks', str(clocks), '--wall', str(case.wall))
        camera = {
            'width': case.width,
            'height': case.height,
            'rate': RATE,
            'frames': case.pictures,
            'step': _STEP,
            'loop': 'true',
            'wait': _PATIENCE,
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
    return subprocess.Popen([sys.executable, '-m', f'vggt_ros.ros.{module}', *arguments])


def _parameters(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in ('-p', f'{name}:={value}')]


def _listen(
    case: Case, children: Sequence[subprocess.Popen[bytes]], clocks: Path
) -> dict[str, Any]:
    node = rclpy.create_node('benchmark')
    heard = ReceivedTopics()
    _subscribe(node, case, heard)
    bring_up(node, '/vggt', _PATIENCE)
    deadline = time.monotonic() + _PATIENCE

    def spin_to_diagnostics(enough: Any) -> None:
        """Go on to the first diagnostics after something is true."""
        while not enough():
            rclpy.spin_once(node, timeout_sec=0.1)
            if any(child.poll() is not None for child in children):
                raise BenchmarkError('the node or the camera ended; their logs say why')
            if time.monotonic() > deadline:
                raise BenchmarkError(f'{heard.counts} after {_PATIENCE:.0f} s')
        seen = heard.diagnostics
        while heard.diagnostics == seen:
            rclpy.spin_once(node, timeout_sec=0.1)

    spin_to_diagnostics(lambda: heard.counts.get('windows', 0) >= _WARM)
    before, cpu, sent = dict(heard.counts), cpu_seconds(children[0].pid), heard.sent
    heard.window, heard.beside, heard.messages = TopicTiming(), [], {}
    begin = time.monotonic()
    deadline += case.seconds
    spin_to_diagnostics(lambda: time.monotonic() > begin + case.seconds)
    seconds = time.monotonic() - begin
    cpu = cpu_seconds(children[0].pid) - cpu
    counts = {name: heard.counts.get(name, 0) - before.get(name, 0) for name in _COUNTED}
    sent = heard.sent - sent
    lines = [json.loads(line) for line in clocks.read_text().splitlines()]
    latencies = [heard.window.latency_ms(percent) / 1e3 for percent in (50, 95)]
    return {
        **asdict(case),
        'profile': bool(os.environ.get('FASTRTPS_DEFAULT_PROFILES_FILE')),
        'measured_seconds': seconds,
        'latency_p50': latencies[0] if case.window else None,
        'latency_p95': latencies[1] if case.window else None,
        'beside_p50': float(np.median(heard.beside)) if case.window else None,
        'windows_per_second': counts['windows'] / seconds,
        'sent': sent,
        'lost': sent - counts['received'],
        **counts,
        'messages': heard.messages,
        'cpu_share': cpu / seconds,
        'windows_per_cpu_second': counts['windows'] / cpu,
        'memory_bytes': resident_memory(children[0].pid),
        'cpu_ms_per_window': node_work(lines[_WARM : _WARM + counts['windows']]),
    }


def _subscribe(node: Any, case: Case, heard: ReceivedTopics) -> None:
    qos = QoSProfile(depth=100)

    def count(topic: str) -> None:
        heard.messages[topic] = heard.messages.get(topic, 0) + 1

    def take_window(message: Any) -> None:
        heard.window.add(time.time_ns(), ns_from_time(message.header.stamp))
        heard.beside.append(message.total_seconds - message.inference_seconds)

    def take_sent(_message: Any) -> None:
        heard.sent += 1

    def take_diagnostics(message: Any) -> None:
        for pair in message.status[0].values:
            if pair.key in _COUNTED:
                heard.counts[pair.key] = int(pair.value)
        heard.diagnostics += 1

    for topic in case.topics:  # not decoded: the listener is not what is measured
        node.create_subscription(
            TOPICS[topic],
            topic.replace('~', '/vggt'),
            lambda _message, topic=topic: count(topic),
            qos,
            raw=True,
        )
    if case.window:
        node.create_subscription(TOPICS['~/window'], '/vggt/window', take_window, qos)
    node.create_subscription(PoseStamped, 'truth', take_sent, qos)
    node.create_subscription(DiagnosticArray, '/diagnostics', take_diagnostics, qos)


def node_work(lines: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """
    Find what the node does beside the network, CPU ms for each window.

    :param lines: of `timed_node`, in the order of the windows, at least two.
    :returns: medians: `worker` from the end of one forward to the begin of the next one (decoding,
        choosing frames, fitting them to the network; reconstruction, registration, messages and
        their publication), `executor` (taking images from DDS, diagnostics), `both` of them, and
        `other_threads`, mostly those of DDS, while the network does not run. `both_least`:
        the tenth of windows that was disturbed least. `forward`: of the worker alone.
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
    """Read the CPU time that a process has taken, all threads, in user and in kernel mode."""
    fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def resident_memory(process: int) -> int:
    """Read the bytes of memory that a process holds."""
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return 1024 * int(line.split()[1])
    raise BenchmarkError(f'process {process} has ended')


def main() -> None:
    """Measure the case on standard input, as JSON; write the figures to the file that is named."""
    case = json.loads(sys.stdin.read())
    figures = measure_node(Case(**{**case, 'topics': tuple(case['topics'])}))
    Path(sys.argv[1]).write_text(json.dumps(figures))


if __name__ == '__main__':
    main()
