# SPDX-License-Identifier: Apache-2.0
"""Files that are there as a whole or not at all: written beside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = '.partial'  # ends the names of what is being written


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that gets its name only when all of it is written."""
    with atomic_path(path) as beside, beside.open('wb') as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path to write to, for who wants no open file; its ending is that of the file."""
    beside = path.with_name(f'{path.stem}{PARTIAL}{path.suffix}')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
