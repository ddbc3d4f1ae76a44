# SPDX-License-Identifier: Apache-2.0
"""
What goes wrong while the node runs: each fault is counted, logged and remembered.

The log is rate-limited per kind of fault: a fault at 30 Hz becomes one line and, later, a count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class WarningLog(Protocol):
    """The part of a logger that is needed here."""

    def warning(self, message: str) -> object:
        """Log one line."""
        ...


@dataclass(frozen=True)
class Fault:
    """One event."""

    time: float  # of the clock given to `Faults`, s
    text: str


class Faults:
    """The faults of one configured node; any thread may report and read."""

    def __init__(
        self, log: WarningLog, period: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Begin without faults.

        :param period: s, the shortest time between two log lines about one kind.
        """
        self._log = log
        self._period = period
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, float] = {}  # time of the last line by kind
        self._suppressed: Counter[str] = Counter()  # by kind, since that line
        self._latest: Fault | None = None

    def report(self, kind: str, text: str) -> None:
        """
        Report a fault that the node survives.

        :param kind: key of its count in the diagnostics.
        :param text: one sentence for people.
        """
        now = self._clock()
        with self._lock:
            self._counts[kind] += 1
            self._latest = Fault(now, text)
            if kind in self._logged and now - self._logged[kind] < self._period:
                self._suppressed[kind] += 1
                return
            self._logged[kind] = now
            suppressed = self._suppressed.pop(kind, 0)
        self._log.warning(text + (f' ({suppressed} more since the last line)' * bool(suppressed)))

    @property
    def counts(self) -> Counter[str]:
        """How often each kind was reported: a copy."""
        with self._lock:
            return self._counts.copy()

    @property
    def latest(self) -> Fault | None:
        """The fault that was reported last."""
        return self._latest
