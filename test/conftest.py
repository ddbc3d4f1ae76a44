# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import gc
import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers share the cores already


def pytest_collection_finish() -> None:
    """Leave what imports made to itself: each collection would visit all of torch."""
    gc.collect()
    gc.freeze()
