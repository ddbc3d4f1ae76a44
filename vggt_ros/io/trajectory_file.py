# SPDX-License-Identifier: Apache-2.0
"""Camera paths as text, in the format of the TUM RGB-D benchmark, which evo and others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import quaternion_from_matrix


def write_trajectory(path: Path, stamps: Sequence[float], world_from_camera: Array) -> None:
    """
    Write lines of stamp, tx ty tz, qx qy qz qw.

    :param stamps: (S,), s.
    :param world_from_camera: (S, 4, 4).
    """
    turns = quaternion_from_matrix(torch.from_numpy(world_from_camera[:, :3, :3])).numpy()
    rows = np.column_stack([stamps, world_from_camera[:, :3, 3], turns])
    np.savetxt(path, rows, fmt=['%.9f', *['%.17g'] * 7], header='stamp tx ty tz qx qy qz qw')
