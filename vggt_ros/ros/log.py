# SPDX-License-Identifier: Apache-2.0
"""
Log lines that help: the same complaint at 30 Hz becomes one line now and a count later.

The core logs through Python's `logging`; `RosLogHandler` carries its lines to the node's log.
rclpy refuses a severity that changes at one place of the code, hence a line per severity.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any


class RateLimitedLog:
    """Says each kind of complaint at once, then at most once in `period` seconds."""

    def __init__(
        self, logger: Any, period: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._period = period
        self._clock = clock
        self._last: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def warn(self, kind: str, sentence: str) -> None:
        """Say something that the node can live with."""
        if self._is_due(kind):
            self._logger.warning(sentence + self._count(kind))

    def _is_due(self, kind: str) -> bool:
        now = self._clock()
        if kind in self._last and now - self._last[kind] < self._period:
            self._unsaid[kind] += 1
            return False
        self._last[kind] = now
        return True

    def _count(self, kind: str) -> str:
        unsaid = self._unsaid.pop(kind, 0)
        return f' ({unsaid} more of this kind since the last time)' if unsaid else ''


class RosLogHandler(logging.Handler):
    """Hands the lines of Python's `logging` to a node's logger."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one line on, at the severity nearest to its own."""
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        elif record.levelno >= logging.INFO:
            self._logger.info(text)
        else:
            self._logger.debug(text)
