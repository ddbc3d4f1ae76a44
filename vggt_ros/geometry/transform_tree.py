# SPDX-License-Identifier: Apache-2.0
"""
Where frames are in each other over time, as /tf tells it (REP-105: a tree, each has one parent).

`tf2_ros.Buffer` does the same where tf2 is installed; this one also serves bags and machines
without it, looks up all stamps of a window at once, and never waits.
"""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.poses import Array, interpolate_poses, matrices_from_poses

_LATEST = 2.0  # s; what is older than the newest by more is not late: time began again


@dataclass
class _Link:
    """Where a frame is in its parent."""

    parent: str
    static: bool
    stamps: list[float] = field(default_factory=list)  # increasing
    poses: list[list[float]] = field(default_factory=list)


class TransformTree:
    """Frames that hang on each other; any thread may use it."""

    def __init__(self, largest_gap: float, beyond: float, memory: float = np.inf) -> None:
        """
        Start without any frame.

        :param largest_gap: s between poses of a frame that may be bridged.
        :param beyond: s before a frame's first and after its last pose for which that is taken.
        :param memory: s that poses are kept; older ones are forgotten.
        """
        self._largest_gap = largest_gap
        self._beyond = beyond
        self._memory = memory
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()

    def add(
        self, parent: str, child: str, stamp: float, pose: list[float], static: bool = False
    ) -> None:
        """
        Take one transform.

        A frame that gets another parent forgets the one it had, and one whose stamps jump back by
        more than 2 s (a simulator or a bag began again) what it was told before.

        :param stamp: s; a static transform holds at all times, whatever its stamp.
        :param pose: of the child in its parent: position, quaternion x, y, z, w.
        """
        with self._lock:
            link = self._links.get(child)
            jumped_back = link is not None and link.stamps and stamp < link.stamps[-1] - _LATEST
            if link is None or static or link.parent != parent or link.static or jumped_back:
                link = self._links[child] = _Link(parent, static)
            place = bisect.bisect(link.stamps, stamp)
            link.stamps.insert(place, stamp)
            link.poses.insert(place, pose)
            forgotten = bisect.bisect(link.stamps, link.stamps[-1] - self._memory)
            del link.stamps[:forgotten], link.poses[:forgotten]

    def look_up(self, target: str, source: str, stamps: Array) -> Array:
        """
        Find where one frame is in another.

        :param stamps: (N,), s.
        :returns: `target_from_source` (N, 4, 4), NaN where it is not known.
        :raises ValueError: if nothing connects the two.
        """
        with self._lock:
            up, down = self._walk(source), self._walk(target)
            common = next((name for name in up if name in down), None)
            if common is None:
                raise ValueError(
                    f'nothing connects {target!r} and {source!r}: the one hangs on '
                    f'{down[-1]!r}, the other on {up[-1]!r}'
                )
            common_from_source = self._chain(up[: up.index(common)], stamps)
            common_from_target = self._chain(down[: down.index(common)], stamps)
        target_from_common = invert_rigid(torch.from_numpy(common_from_target)).numpy()
        found: Array = target_from_common @ common_from_source
        return found

    def parent(self, frame: str) -> str | None:
        """Say what a frame hangs on; None if on nothing."""
        with self._lock:
            link = self._links.get(frame)
            return None if link is None else link.parent

    def root(self, frame: str) -> str:
        """
        Find what a frame hangs on in the end; itself if it has no parent.

        :raises ValueError: if the frames go round.
        """
        with self._lock:
            return self._walk(frame)[-1]

    def is_static(self, target: str, source: str) -> bool:
        """
        Say whether one frame cannot move in another that it hangs on.

        :raises ValueError: if it does not hang on it.
        """
        with self._lock:
            walked = self._walk(source)
            if target not in walked:
                raise ValueError(f'{source!r} does not hang on {target!r} but on {walked[1:]}')
            return all(self._links[name].static for name in walked[: walked.index(target)])

    def _walk(self, frame: str) -> list[str]:
        """List a frame, its parent and so on."""
        walked = [frame]
        while walked[-1] in self._links:
            parent = self._links[walked[-1]].parent
            if parent in walked:
                raise ValueError(f'the frames go round: {[*walked, parent]}')
            walked.append(parent)
        return walked

    def _chain(self, names: list[str], stamps: Array) -> Array:
        poses = np.tile(np.eye(4), (len(stamps), 1, 1))
        for name in names:
            poses = self._at(self._links[name], stamps) @ poses
        return poses

    def _at(self, link: _Link, stamps: Array) -> Array:
        if link.static:
            return np.tile(matrices_from_poses(np.array(link.poses)), (len(stamps), 1, 1))
        return interpolate_poses(
            np.array(link.stamps), np.array(link.poses), stamps, self._largest_gap, self._beyond
        )
