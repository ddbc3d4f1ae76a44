# SPDX-License-Identifier: Apache-2.0
"""Configuration of all tests."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers already occupy the cores


def pytest_configure(config) -> None:
    """
    Set the lease of DDS participants to an hour instead of 20 s.

    On a busy machine a test process may stall for longer than its lease. The others then remove
    it, Fast DDS does not always discover it again, and service calls time out.
    """
    profile = Path(__file__).parents[1] / 'config' / 'fastdds.xml'
    lease = '<leaseDuration><sec>3600</sec></leaseDuration>'
    text = profile.read_text().replace(
        '<rtps>', f'<rtps><builtin><discovery_config>{lease}</discovery_config></builtin>'
    )
    folder = tempfile.TemporaryDirectory(prefix='vggt_ros_test_')
    config.add_cleanup(folder.cleanup)
    with_long_lease = Path(folder.name) / 'fastdds.xml'
    with_long_lease.write_text(text)
    for variable in ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE'):
        os.environ[variable] = str(with_long_lease)


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which would traverse all of torch."""
    gc.collect()
    gc.freeze()
