# SPDX-License-Identifier: Apache-2.0
"""
The cases of the node's benchmark, each measured in a process of its own, and their table.

Fast DDS reads its profile once per process.
"""

from __future__ import annotations

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

from vggt_ros.lab.node.node_benchmark import BenchmarkError, Case
from vggt_ros.ros.publish import TOPICS

ROOT = Path(__file__).resolve().parents[3]
PROFILE = ROOT / 'config' / 'fastdds.xml'
VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
EVERYTHING = tuple(topic for topic in TOPICS if topic not in ('~/window', '~/tracks'))
MAPPING = ('~/points', '~/depth/image_rect', '~/poses')
HEADER = (
    '| images | network | resize | topics | profile | windows/s | p50 ms | p95 ms | beside ms '
    '| sent | lost | dropped | CPU | windows/CPU s | own ms | MB |\n'
    '|---|---|---|--:|---|' + '--:|' * 11
)


def benchmark_node(seconds: float, only: str | None = None, output: Path | None = None) -> None:
    """
    Measure all cases in a ROS graph of their own and print a table.

    :param seconds: of each measurement.
    :param only: 'node' (with the embedded network), 'own' (its work beside the network) or None.
    :param output: JSON file of all figures, written after each case.
    :raises BenchmarkError: if a measurement fails.
    """
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    about = {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'torch': torch.__version__,
        'ros': os.environ.get('ROS_DISTRO', ''),
    }
    found = []
    print(HEADER)
    for case, with_profile in list_cases(seconds, only):
        found.append(measure_case(case, with_profile))
        print(table_row(found[-1]), flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({**about, 'results': found}, indent=1) + '\n')


def list_cases(seconds: float, only: str | None) -> list[tuple[Case, bool]]:
    """List the cases, each with whether the Fast DDS profile is used; see `benchmark_node`."""
    vga, hd = (640, 480), (1920, 1080)
    cases: list[tuple[Case, bool]] = []
    if only != 'own':
        for size, images in ((vga, 16), (hd, 4)):
            case = Case(*size, seconds, EVERYTHING, images=images)
            cases += [(case, True), (replace(case, fast_resize=True), True), (case, False)]
    if only != 'node':
        for width in (112, 518):
            cases += [
                (Case(*vga, seconds, MAPPING, width), True),
                (Case(*vga, seconds, MAPPING, width, fast_resize=True), True),
                (Case(*vga, seconds, (), width, window=False), True),
            ]
    return cases


def measure_case(case: Case, with_profile: bool) -> dict[str, Any]:
    """
    Measure a case in a process of its own.

    :returns: see `measure_node`.
    :raises BenchmarkError: if that process fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if with_profile:
        environment.update(dict.fromkeys(VARIABLES, str(PROFILE)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'figures.json'
        ended = subprocess.run(
            [sys.executable, '-m', 'vggt_ros.lab.node.node_benchmark', str(file)],
            input=json.dumps(asdict(case)).encode(),
            env=environment,
        )
        if ended.returncode:
            raise BenchmarkError(f'the measurement ended with code {ended.returncode}')
        figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def table_row(figures: dict[str, Any]) -> str:
    """Format one measurement as a row of the Markdown table."""
    work = figures['cpu_ms_per_window']
    p50, p95, beside = (
        '-' if figures[key] is None else f'{1e3 * figures[key]:.0f}'
        for key in ('latency_p50', 'latency_p95', 'beside_p50')
    )
    cells = (
        f'{figures["width"]}x{figures["height"]}',
        'embedded' if not figures['wall'] else f'none, {figures["wall"]} wide',
        'fast' if figures['fast_resize'] else 'exact',
        len(figures['topics']) + figures['window'],
        'yes' if figures['profile'] else 'no',
        f'{figures["windows_per_second"]:.1f}',
        p50,
        p95,
        beside,
        figures['sent'],
        figures['lost'],
        figures['dropped'],
        f'{figures["cpu_share"]:.2f}',
        f'{figures["windows_per_cpu_second"]:.1f}',
        f'{work["both"]:.1f} ({work["both_least"]:.1f})',
        f'{figures["memory_bytes"] / 1e6:.0f}',
    )
    return '| ' + ' | '.join(map(str, cells)) + ' |'
