#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
A camera at 30 Hz and a network that is much too slow, for many minutes.

    python3 test/soak.py --minutes 10

Latency must stay bounded, images must be dropped and counted, no window may be dropped, memory
must not grow. The test of the node does the same for some seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from node_process import SIZE, STRIDE, Driver, NodeProcess, make_image, stamp_of
from ros_domain import Use, own_domain

from vggt_ros.io.message_reading import ns_from_time

RATE = 30.0  # images per second
STAMP_STEP = 1 / 3  # image numbers per image: stamps of 30 Hz, as `make_image` counts 10 Hz

_SLACK = 0.5  # seconds of transport


@dataclass(frozen=True)
class Figures:
    """The measurements of one soak."""

    sent: int
    windows: int
    dropped: int
    median_latency: float  # seconds from the newest image of a window to its publication
    worst_latency: float
    memory_growth: float  # MiB, over the second half

    def __str__(self) -> str:
        return (
            f'{self.sent} images sent, {self.windows} windows, {self.dropped} images dropped, '
            f'latency median {self.median_latency:.2f} s, worst {self.worst_latency:.2f} s, '
            f'memory grew by {self.memory_growth:.1f} MiB in the second half'
        )


def run_soak(node: NodeProcess, driver: Driver, minutes: float) -> Figures:
    """
    Stream images into a node and check its output.

    :raises AssertionError: if a window is missing, the latency grows or an image is not counted.
    """
    assert driver.change('configure', 'activate')
    driver.settle()
    sent, halfway = 0, 0
    sent_at = {}
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < 60 * minutes:
        if elapsed > 30 * minutes and not halfway:
            halfway = node.status('VmRSS')
        if sent <= elapsed * RATE:
            sent_at[stamp_of(sent * STAMP_STEP)] = time.monotonic()
            driver.images.publish(make_image(sent * STAMP_STEP))
            sent += 1
        driver.spin_for(max(started + sent / RATE - time.monotonic(), 0.0005))
    growth = (node.status('VmRSS') - halfway) / 1024
    _, values = driver.wait_health(received=sent, waiting=0)
    dropped = int(values['dropped'])
    reports = driver.got['window']

    def count_left() -> int:
        return sent - dropped - SIZE - STRIDE * (len(reports) - 1)

    driver.spin_until(lambda: count_left() < STRIDE, what='last window')
    assert count_left() >= 0, (sent, dropped, len(reports))
    latencies = np.array([report.total_seconds for report in reports])
    assert [report.window_id for report in reports] == list(range(len(reports)))
    assert {report.map_id for report in reports} == {0}
    assert {report.overlap for report in reports[1:]} == {SIZE - STRIDE}
    # the images of a window were sent while the previous one was computed, or later
    arrived = np.array([sent_at[ns_from_time(report.stamps[-1])] for report in reports])
    published = arrived + latencies
    assert (arrived[2:] > published[:-2] - _SLACK).all(), latencies
    assert growth < 20
    median = float(np.median(latencies))
    return Figures(sent, len(reports), dropped, median, float(latencies.max()), growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('--minutes', type=float, default=10.0)
    parser.add_argument('--network-seconds', type=float, default=2.0)
    arguments = parser.parse_args()
    domain = own_domain(Use.SLOW_NODE)
    with tempfile.TemporaryDirectory() as folder:
        node = NodeProcess(domain, Path(folder) / 'log', seconds=arguments.network_seconds)
        driver = Driver(node, domain, topics=('~/window', '~/poses'))
        try:
            print(run_soak(node, driver, arguments.minutes))
            code, seconds = node.leave()
            print(f'left with exit code {code} after {seconds:.2f} s')
        finally:
            driver.close()
            node.kill()


if __name__ == '__main__':
    main()
