# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers share the cores already


def pytest_configure(config) -> None:
    """
    Let DDS participants believe in each other for an hour instead of 20 s.

    A test process that a full machine holds up for longer than the lease is taken for dead, and
    Fast DDS does not always find it again when it goes on: services then wait in vain.
    """
    profile = Path(__file__).parents[1] / 'config' / 'fastdds.xml'
    lease = '<leaseDuration><sec>3600</sec></leaseDuration>'
    text = profile.read_text().replace(
        '<rtps>', f'<rtps><builtin><discovery_config>{lease}</discovery_config></builtin>'
    )
    folder = tempfile.TemporaryDirectory(prefix='vggt_ros_test_')
    config.add_cleanup(folder.cleanup)
    patient = Path(folder.name) / 'fastdds.xml'
    patient.write_text(text)
    for variable in ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE'):
        os.environ[variable] = str(patient)


def pytest_collection_finish() -> None:
    """Leave what imports made to itself: each collection would visit all of torch."""
    gc.collect()
    gc.freeze()
