# SPDX-License-Identifier: Apache-2.0
"""
Windows joined by their camera centres alone, as a baseline for `registration`.

Peers do this: the similarity that brings the centres of the shared cameras together (Umeyama, PAMI
13(4), 1991). Where the shared centres lie on a line, the roll about it is whatever noise makes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.lab.evaluation.trajectory import fit_sim3
from vggt_ros.mapping.reconstruction import Reconstruction


def join_by_centres(windows: Sequence[tuple[Sequence[int], Reconstruction]]) -> list[Sim3]:
    """
    Chain windows.

    :param windows: frame numbers and geometry; each shares at least three with the one before.
    :returns: map_from_window of each.
    :raises ValueError: if shared centres do not determine a similarity at all.
    """
    joined: list[Sim3] = []
    before: dict[int, Array] = {}
    for ids, reconstruction in windows:
        map_from_window = Sim3()
        if before:
            here = [i for i, number in enumerate(ids) if number in before]
            there = np.stack([before[ids[i]][:3, 3] for i in here])
            map_from_window = fit_sim3(there, reconstruction.window_from_camera[here, :3, 3])
        placed = map_from_window.transform_poses(reconstruction.window_from_camera)
        before = dict(zip(ids, placed, strict=True))
        joined.append(map_from_window)
    return joined
