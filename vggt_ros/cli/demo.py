# SPDX-License-Identifier: Apache-2.0
"""
The demo: a synthetic camera, the node and a recorder as three processes that talk over DDS.

    python3 -m vggt_ros.cli.demo --output demo.png

Starts them all and brings the node to *active*; the camera plays when node and recorder listen.
Ends with the recorder, whose table and picture are the result; beside the picture lies a bag of
what the camera sent. Stops only what it started, also
on Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 5.0  # s between the request to end and the end by force


class DemoError(RuntimeError):
    """A process of the demo that did not do its part."""


class Processes:
    """The children of the demo, by name."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a module of this package with this Python, in a process group of its own."""
        child = subprocess.Popen(
            [sys.executable, '-m', module, *arguments], start_new_session=True
        )
        self._running[name] = child
        return child

    def wait_for(self, name: str, timeout: float) -> None:
        """Wait until a child has ended well, while the others go on (or have ended well, too)."""
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
        """Ask all children to end, as Ctrl-C does; end by force who does not."""
        for child in self._running.values():
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for name, child in self._running.items():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f'the {name} did not end within {GRACE:.0f} s: killing it')
                child.kill()
                child.wait()

    def returncode(self, name: str) -> int | None:
        """Return the exit code of a child that has ended."""
        return self._running[name].returncode


def say(line: str) -> None:
    """Print a line of progress."""
    print(f'demo: {line}', flush=True)


def run_demo(options: argparse.Namespace, processes: Processes) -> None:
    """Start the processes in order and wait for the recorder."""
    width, _, height = options.size.partition('x')
    parameters = {
        'width': width,
        'height': height,
        'rate': float(options.rate),
        'frames': options.frames,
        'seed': options.seed,
        'subscribers': 2,  # the node and the recorder
        'wait': float(options.timeout),
    }
    say('starting node, camera and recorder')
    node = ['--ros-args', '--log-level', 'info']
    if options.checkpoint:
        node += ['-p', f'checkpoint:={options.checkpoint}']
    processes.start('node', 'vggt_ros.ros.node', *node)
    processes.start('bring-up', 'vggt_ros.lab.node.lifecycle', '/vggt', str(options.timeout))
    camera = ['--ros-args']
    for name, value in parameters.items():
        camera += ['-p', f'{name}:={value}']
    processes.start('camera', 'vggt_ros.lab.node.synthetic_camera', *camera)
    processes.start(
        'recorder',
        'vggt_ros.lab.node.recorder',
        *('--output', str(options.output)),
        *('--bag', str(bag_of(options))),
        *('--quiet', str(options.quiet)),
        *('--timeout', str(options.timeout)),
    )
    processes.wait_for('bring-up', options.timeout)
    say('the node is active')
    processes.wait_for('recorder', options.timeout + 60)


def bag_of(options: argparse.Namespace) -> Path:
    """Name the bag of what the camera sent."""
    output: Path = options.output
    return output.with_name(f'{output.stem}_bag')


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='camera, node and recorder over DDS')
    parser.add_argument('--frames', type=int, default=60, help='images that the camera plays')
    parser.add_argument('--size', default='320x240', help='of the images, pixels')
    parser.add_argument('--rate', type=float, default=10.0, help='images per second')
    parser.add_argument('--seed', type=int, default=0, help='which room and which path')
    parser.add_argument(
        '--output', type=Path, default=Path('demo_output/demo.png'), help='the picture'
    )
    parser.add_argument('--checkpoint', default='', help="weights; default: the node's own")
    parser.add_argument('--quiet', type=float, default=5.0, help='s without a message: the end')
    parser.add_argument('--timeout', type=float, default=600.0, help='s for the run')
    return parser.parse_args()


def main() -> int:
    """Run the demo in a ROS graph of its own."""
    options = parse_arguments()
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    begin = time.monotonic()
    try:
        run_demo(options, processes)
    except DemoError as error:
        sys.stderr.write(f'the demo failed: {error}\n')
        return 1
    except KeyboardInterrupt:
        say('interrupted')
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave children
        processes.stop()
    if processes.returncode('node'):
        sys.stderr.write(f'the node ended with code {processes.returncode("node")}\n')
        return 1
    say(f'done in {time.monotonic() - begin:.0f} s')
    say(f'the same without a robot: reconstruct {bag_of(options)} --output demo_map')
    return 0


if __name__ == '__main__':
    sys.exit(main())
