# SPDX-License-Identifier: Apache-2.0
"""Trajectories as text, in the format of the TUM RGB-D benchmark, which evo and others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import quaternion_from_matrix


def write_trajectory(
    file: Path | BinaryIO, stamps: Sequence[float], world_from_camera: Array
) -> None:
    """
    Write lines of stamp, tx ty tz, qx qy qz qw.

    :param file: a path, or a file that is open for writing.
    :param stamps: (S,), s.
    :param world_from_camera: (S, 4, 4).
    """
    quaternions = quaternion_from_matrix(torch.from_numpy(world_from_camera[:, :3, :3])).numpy()
    rows = np.column_stack([stamps, world_from_camera[:, :3, 3], quaternions])
    np.savetxt(file, rows, fmt=['%.9f', *['%.17g'] * 7], header='stamp tx ty tz qx qy qz qw')
