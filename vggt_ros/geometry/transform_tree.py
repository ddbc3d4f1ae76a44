# SPDX-License-Identifier: Apache-2.0
"""
Transforms between coordinate frames over time, from /tf (REP-105: a tree, one parent per frame).

`tf2_ros.Buffer` does the same where tf2 is installed; this one also works for bags and on machines
without tf2, looks up all stamps of a window at once, and never waits.
"""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.poses import Array, interpolate_poses, matrices_from_poses

_MAX_DELAY = 2.0  # s; a stamp older than the newest by more is a jump back in time


@dataclass
class _TimeCache:
    """The transforms of a frame in its parent."""

    parent: str
    static: bool
    stamps: list[float] = field(default_factory=list)  # increasing
    poses: list[list[float]] = field(default_factory=list)


class TransformTree:
    """A thread-safe buffer of transforms."""

    def __init__(
        self, max_gap: float, max_extrapolation: float, cache_time: float = np.inf
    ) -> None:
        """
        Create an empty tree.

        :param max_gap: s between two transforms of a frame to interpolate over.
        :param max_extrapolation: s before the first and after the last transform of a frame for
            which that transform is used.
        :param cache_time: s for which transforms are kept.
        """
        self._max_gap = max_gap
        self._max_extrapolation = max_extrapolation
        self._cache_time = cache_time
        self._frames: dict[str, _TimeCache] = {}
        self._lock = threading.Lock()

    def set_transform(
        self, parent: str, child: str, stamp: float, pose: list[float], static: bool = False
    ) -> None:
        """
        Add one transform.

        The earlier transforms of a frame are dropped if its parent changes, or if its stamps jump
        back by more than 2 s (a simulation or a bag was restarted).

        :param stamp: s; a static transform is valid at all times, whatever its stamp.
        :param pose: of the child in its parent: position, quaternion x, y, z, w.
        """
        with self._lock:
            cache = self._frames.get(child)
            jumped_back = (
                cache is not None and cache.stamps and stamp < cache.stamps[-1] - _MAX_DELAY
            )
            if cache is None or static or cache.parent != parent or cache.static or jumped_back:
                cache = self._frames[child] = _TimeCache(parent, static)
            index = bisect.bisect(cache.stamps, stamp)
            cache.stamps.insert(index, stamp)
            cache.poses.insert(index, pose)
            expired = bisect.bisect(cache.stamps, cache.stamps[-1] - self._cache_time)
            del cache.stamps[:expired], cache.poses[:expired]

    def lookup_transforms(self, target: str, source: str, stamps: Array) -> Array:
        """
        Compute the transform between two frames at several times.

        :param stamps: (N,), s.
        :returns: `target_from_source` (N, 4, 4), NaN where it is unknown.
        :raises ValueError: if the frames are not connected.
        """
        with self._lock:
            source_chain, target_chain = self._ancestors(source), self._ancestors(target)
            common = next((name for name in source_chain if name in target_chain), None)
            if common is None:
                raise ValueError(
                    f'{target!r} and {source!r} are not connected: their roots are '
                    f'{target_chain[-1]!r} and {source_chain[-1]!r}'
                )
            common_from_source = self._compose(source_chain[: source_chain.index(common)], stamps)
            common_from_target = self._compose(target_chain[: target_chain.index(common)], stamps)
        target_from_common = invert_rigid(torch.from_numpy(common_from_target)).numpy()
        transforms: Array = target_from_common @ common_from_source
        return transforms

    def parent(self, frame: str) -> str | None:
        """Return the parent of a frame, or None."""
        with self._lock:
            cache = self._frames.get(frame)
            return None if cache is None else cache.parent

    def root(self, frame: str) -> str:
        """
        Return the last ancestor of a frame; the frame itself if it has no parent.

        :raises ValueError: if the frames form a loop.
        """
        with self._lock:
            return self._ancestors(frame)[-1]

    def is_static(self, target: str, source: str) -> bool:
        """
        Return whether all transforms from a frame up to one of its ancestors are static.

        :raises ValueError: if `target` is not an ancestor of `source`.
        """
        with self._lock:
            chain = self._ancestors(source)
            if target not in chain:
                raise ValueError(
                    f'{target!r} is not an ancestor of {source!r}, whose ancestors are {chain[1:]}'
                )
            return all(self._frames[name].static for name in chain[: chain.index(target)])

    def _ancestors(self, frame: str) -> list[str]:
        """List a frame, its parent, and so on up to the root."""
        chain = [frame]
        while chain[-1] in self._frames:
            parent = self._frames[chain[-1]].parent
            if parent in chain:
                raise ValueError(f'the frames form a loop: {[*chain, parent]}')
            chain.append(parent)
        return chain

    def _compose(self, chain: list[str], stamps: Array) -> Array:
        poses = np.tile(np.eye(4), (len(stamps), 1, 1))
        for name in chain:
            poses = self._parent_from_frame(self._frames[name], stamps) @ poses
        return poses

    def _parent_from_frame(self, cache: _TimeCache, stamps: Array) -> Array:
        if cache.static:
            return np.tile(matrices_from_poses(np.array(cache.poses)), (len(stamps), 1, 1))
        return interpolate_poses(
            np.array(cache.stamps),
            np.array(cache.poses),
            stamps,
            self._max_gap,
            self._max_extrapolation,
        )
