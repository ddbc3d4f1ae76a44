# SPDX-License-Identifier: Apache-2.0
"""Message counts, rates and latencies per topic, and a table of them for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class TopicTiming:
    """What arrived on one topic. Latency is the time from the header stamp to the arrival."""

    arrivals_ns: list[int] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)

    def add(self, arrival_ns: int, stamp_ns: int | None) -> None:
        """
        Count one message.

        :param stamp_ns: None if the message has no stamp of acquisition.
        """
        self.arrivals_ns.append(arrival_ns)
        if stamp_ns is not None:
            self.latencies_ns.append(arrival_ns - stamp_ns)

    @property
    def rate(self) -> float:
        """Return messages per second between the first and the last; NaN for fewer than two."""
        if len(self.arrivals_ns) < 2 or self.arrivals_ns[-1] == self.arrivals_ns[0]:
            return float('nan')
        return (len(self.arrivals_ns) - 1) / (self.arrivals_ns[-1] - self.arrivals_ns[0]) * 1e9

    def latency_ms(self, percent: float) -> float:
        """Return a percentile of the latency in milliseconds; NaN without stamps."""
        if not self.latencies_ns:
            return float('nan')
        return float(np.percentile(self.latencies_ns, percent)) / 1e6


def timing_table(topics: Mapping[str, TopicTiming]) -> str:
    """Lay out the table."""

    def number(value: float, digits: int) -> str:
        return '-' if np.isnan(value) else f'{value:.{digits}f}'

    rows = [('topic', 'messages', 'rate Hz', 'latency p50 ms', 'latency p95 ms')]
    for name, timing in topics.items():
        count = len(timing.arrivals_ns)
        p50, p95 = (number(timing.latency_ms(percent), 0) for percent in (50, 95))
        rows.append((name, str(count), number(timing.rate, 1), p50, p95))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        '  '.join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    ]
    lines.insert(1, '-' * len(lines[0]))
    return '\n'.join(lines)
