# SPDX-License-Identifier: Apache-2.0
"""
Measure the node under 30 Hz of images, with the Fast DDS profile of the package and without.

    python3 -m vggt_ros.cli.benchmark_node --seconds 60 --json docs/bench/node.json

Two tables: the node with the embedded network at two sizes of images, everything subscribed; and
what it does beside the network, which is a stand-in there, at two sizes of the network's images.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vggt_ros.lab.node.node_benchmark import Case
from vggt_ros.ros.publish import TOPICS

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / 'config' / 'fastdds.xml'
VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
EVERYTHING = tuple(topic for topic in TOPICS if topic not in ('~/window', '~/tracks'))
MAPPING = ('~/points', '~/depth/image_rect', '~/poses')


def run_case(case: Case, with_profile: bool) -> dict[str, Any]:
    """Measure in a process of its own: Fast DDS reads its profile once."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if with_profile:
        environment.update(dict.fromkeys(VARIABLES, str(PROFILE)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'figures.json'
        subprocess.run(
            [sys.executable, '-m', 'vggt_ros.lab.node.node_benchmark', str(file)],
            input=json.dumps(asdict(case)).encode(),
            env=environment,
            check=True,
        )
        figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def row(told: dict[str, Any]) -> str:
    """Lay out one measurement."""
    work = told['cpu_ms_per_window']
    p50, p95, beside = (
        '-' if told[key] is None else f'{1e3 * told[key]:.0f}'
        for key in ('latency_p50', 'latency_p95', 'beside_p50')
    )
    cells = (
        f'{told["width"]}x{told["height"]}',
        'embedded' if not told['wall'] else f'none, {told["wall"]} wide',
        'fast' if told['fast_resize'] else 'exact',
        len(told['topics']) + told['window'],
        'yes' if told['profile'] else 'no',
        f'{told["windows_per_second"]:.1f}',
        p50,
        p95,
        beside,
        told['sent'],
        told['lost'],
        told['dropped'],
        f'{told["cpu_share"]:.2f}',
        f'{told["windows_per_cpu_second"]:.1f}',
        f'{work["both"]:.1f} ({work["both_least"]:.1f})',
        f'{told["memory_bytes"] / 1e6:.0f}',
    )
    return '| ' + ' | '.join(map(str, cells)) + ' |'


HEADER = (
    '| images | network | resize | topics | profile | windows/s | p50 ms | p95 ms | beside ms '
    '| sent | lost | dropped | CPU | windows/CPU s | own ms | MB |\n'
    '|---|---|---|--:|---|' + '--:|' * 11
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seconds', type=float, default=60.0, help='of each measurement')
    parser.add_argument('--only', choices=('node', 'own'), help='one of the two tables')
    parser.add_argument('--json', type=Path, help='file for all figures')
    return parser.parse_args()


def main() -> None:
    """Measure everything, one after the other."""
    asked = parse()
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    vga, hd = (640, 480), (1920, 1080)
    cases: list[tuple[Case, bool]] = []
    if asked.only != 'own':
        for size, pictures in ((vga, 16), (hd, 4)):
            case = Case(*size, asked.seconds, EVERYTHING, images=pictures)
            cases += [(case, True), (replace(case, fast_resize=True), True), (case, False)]
    if asked.only != 'node':
        for width in (112, 518):
            cases += [
                (Case(*vga, asked.seconds, MAPPING, width), True),
                (Case(*vga, asked.seconds, MAPPING, width, fast_resize=True), True),
                (Case(*vga, asked.seconds, (), width, window=False), True),
            ]
    about = {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'torch': torch.__version__,
        'ros': os.environ.get('ROS_DISTRO', ''),
    }
    found = []
    print(HEADER)
    for case, with_profile in cases:
        found.append(run_case(case, with_profile))
        print(row(found[-1]), flush=True)
        if asked.json is not None:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps({**about, 'results': found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
