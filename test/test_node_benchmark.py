# SPDX-License-Identifier: Apache-2.0
"""The figures of the node's benchmark, from known times."""

from __future__ import annotations

import mmap
import os
import time

import pytest

from vggt_ros.lab.node.node_benchmark import cpu_seconds, node_work, resident_memory


def test_own_work_is_the_time_between_the_calls_of_the_network() -> None:
    lines = []
    worker = executor = process = 0.0
    for _ in range(5):
        clocks = []
        # 3 ms of own work with 2 of the executor and 1 of DDS, then 40 ms of the network, with 4
        # of the executor meanwhile
        for own, spun, other in ((3, 2, 1), (40, 4, 100)):
            worker, executor = worker + own, executor + spun
            process += own + spun + other
            times = {'worker': worker, 'executor': executor, 'process': process}
            clocks.append({name: 1e-3 * value for name, value in times.items()})
        lines.append({'begin': clocks[0], 'end': clocks[1]})
    work = node_work(lines)
    expected = {
        'worker': 3,
        'executor': 6,
        'both': 9,
        'both_least': 9,
        'other_threads': 1,
        'forward': 40,
    }
    assert work == pytest.approx(expected)


def test_time_and_memory_are_those_of_the_process() -> None:
    before = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < before[1] + 0.2:
        pass
    took = cpu_seconds(os.getpid()) - before[0]
    assert took == pytest.approx(time.process_time() - before[1], abs=0.05)
    memory = resident_memory(os.getpid())
    # mapped anew: the allocator would reuse what other tests have freed
    with mmap.mmap(-1, 64_000_000) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        grown = resident_memory(os.getpid()) - memory
    assert grown == pytest.approx(64_000_000, rel=0.1)
