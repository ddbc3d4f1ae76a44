# SPDX-License-Identifier: Apache-2.0
"""
The demo: synthetic camera, node and recorder as three processes in a ROS graph of their own.

The camera plays when node and recorder have subscribed. The recorder ends the demo with a table,
a plot and, beside it, a bag of what the camera published. Stops only processes that it started,
also on Ctrl-C. Imports neither ROS nor torch: the processes do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_NEEDED = ('rclpy', 'vggt_ros.ros', 'vggt_ros.msg')
GRACE = 5.0  # s from SIGINT to SIGKILL


class DemoError(RuntimeError):
    """A process of the demo that failed."""


@dataclass(frozen=True)
class DemoOptions:
    """What the camera plays and where the results go."""

    frames: int = 60
    """Images to publish."""
    size: str = '320x240'
    """Image size, pixels."""
    rate: float = 10.0
    """Images per second."""
    seed: int = 0
    """Seed of the room and the camera trajectory."""
    output: Path = Path('demo_output/demo.png')
    """Plot to write; the bag lies beside it."""
    checkpoint: str = ''
    """Weights, as the parameter of that name; default: the node's own."""
    quiet: float = 5.0
    """Seconds without a message after which the recorder ends."""
    timeout: float = 600.0
    """Seconds until the demo fails."""

    @property
    def bag(self) -> Path:
        """Folder of the bag of the camera's topics."""
        return self.output.with_name(f'{self.output.stem}_bag')


def run_demo(options: DemoOptions) -> None:
    """
    Run the processes until the recorder ends.

    :raises ValueError: if the size is not WIDTHxHEIGHT.
    :raises DemoError: if a process fails or takes too long.
    """
    width, _, height = options.size.partition('x')
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f'--size is {options.size!r}, expected WIDTHxHEIGHT')
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise DemoError(f'it needs ROS 2 and the built package: there is no {missing[0]}')
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    begin = time.monotonic()
    try:
        _start_all(options, width, height, processes)
        processes.wait_for('bring-up', options.timeout)
        report('the node is active')
        processes.wait_for('recorder', options.timeout + 60)
    except KeyboardInterrupt:
        report('interrupted')
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave children
        processes.stop()
    if processes.returncode('node'):
        raise DemoError(f'the node ended with code {processes.returncode("node")}')
    report(f'done in {time.monotonic() - begin:.0f} s')
    command = os.path.relpath(shutil.which('vggt') or 'vggt')
    report(f'the same without the node: {command} reconstruct {options.bag} --output demo_map')


def _start_all(options: DemoOptions, width: str, height: str, processes: Processes) -> None:
    report('starting node, camera and recorder')
    node = ['--ros-args', '--log-level', 'info']
    if options.checkpoint:
        node += ['-p', f'checkpoint:={options.checkpoint}']
    processes.start('node', 'vggt_ros.ros.node', *node)
    processes.start('bring-up', 'vggt_ros.lab.node.lifecycle', '/vggt', str(options.timeout))
    parameters = {
        'width': width,
        'height': height,
        'rate': float(options.rate),
        'frames': options.frames,
        'seed': options.seed,
        'subscribers': 2,  # the node and the recorder
        'wait': float(options.timeout),
    }
    camera = ['--ros-args']
    for name, value in parameters.items():
        camera += ['-p', f'{name}:={value}']
    processes.start('camera', 'vggt_ros.lab.node.synthetic_camera', *camera)
    processes.start(
        'recorder',
        'vggt_ros.lab.node.recorder',
        *('--output', str(options.output)),
        *('--bag', str(options.bag)),
        *('--quiet', str(options.quiet)),
        *('--timeout', str(options.timeout)),
    )


class Processes:
    """The child processes, by name."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Start a module of this package with this Python, in a process group of its own."""
        self._running[name] = subprocess.Popen(
            [sys.executable, '-m', module, *arguments], start_new_session=True
        )

    def wait_for(self, name: str, timeout: float) -> None:
        """
        Wait until a child has ended successfully.

        :raises DemoError: if it, or another child meanwhile, fails, or after the timeout, s.
        """
        deadline = time.monotonic() + timeout
        while self._running[name].poll() is None:
            for other, child in self._running.items():
                if child.poll():
                    raise DemoError(f'the {other} ended with code {child.returncode}')
            if time.monotonic() > deadline:
                raise DemoError(f'the {name} did not end within {timeout:.0f} s')
            time.sleep(0.1)
        if self._running[name].returncode:
            raise DemoError(f'the {name} ended with code {self._running[name].returncode}')

    def stop(self) -> None:
        """Send SIGINT to all children, and SIGKILL to those that do not end."""
        for child in self._running.values():
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for name, child in self._running.items():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                report(f'the {name} did not end within {GRACE:.0f} s: killing it')
                child.kill()
                child.wait()

    def returncode(self, name: str) -> int | None:
        """Return the exit code of a child that has ended."""
        return self._running[name].returncode


def report(line: str) -> None:
    """Print a line of progress."""
    print(f'demo: {line}', flush=True)
