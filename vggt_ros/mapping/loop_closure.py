# SPDX-License-Identifier: Apache-2.0
"""
The camera comes back to a place, and the map learns of it.

- A candidate is the earlier window whose frames look most alike to the network: the mean of its
  patch tokens over a frame, about the mean of all windows. It has to be as alike as windows
  three apart mostly are, so that no number has to be found for each network.
- Half of the frames of both windows then go through the network together. They show the same
  place if what one half sees lies, by the joint window's cameras, in sight of the other half, at
  the depth that the other half has there, and looks the same. On ways through furnished rooms
  with the embedded weights, right candidates differ by 5 % of depth and correlate with 0.74 at
  the worst tenth; wrong ones by 7 % and with 0.59 at the best tenth (`docs/map.md`).
- The joint window is aligned to both places like any other window, which ties them in the graph
  of windows (`pose_graph`).

What is kept of a window is small: images at the network's size of half of its frames, and depth
dropped out for registration. Beyond a number of windows every second one is forgotten.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vggt_ros.frames.preprocessor import Batch, PreprocessedImage, stack_images
from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.inference.network import Network
from vggt_ros.mapping.pose_graph import NoiseSigmas, PoseGraph
from vggt_ros.mapping.reconstruction import PredictionError, Reconstruction, reconstruct
from vggt_ros.mapping.registration import (
    FrameGeometry,
    RegisteredFrames,
    Registration,
    register,
    subsample,
)
from vggt_ros.settings import RegistrationSettings

_APART = 20  # windows between the two ends of a loop
_REST = 5  # windows after an attempt in which none is made, with what is near if it was refused
_NEAR = 3  # windows; so far apart, the camera still sees much of the same
_ALIKE = 0.1  # share of windows so near that are less alike than a candidate must be
_FEWEST = 20  # pixels in common; with fewer, two frames tell nothing of each other
# What two halves of a joint window must have in common, as medians over pairs of frames.
_IN_SIGHT = 0.4  # share of pixels
_SAME_DEPTH = 0.06  # median relative difference
_SAME_LOOK = 0.65  # correlation of grey levels
# The least that a joint may be believed to err by: what all frames of a window have in common
# does not show in their scatter.
_LEAST = 1e-3  # rad, of the depth, of the scale

HEADS = ('camera', 'depth')

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """What is remembered of a window."""

    node: int  # of the pose graph
    window_id: int
    descriptor: Array  # (C,), mean over its frames
    batch: Batch  # of half of its frames, which have the network's images; no tensor of them
    geometry: tuple[FrameGeometry, ...]  # of these frames, in the window
    intrinsics: Array  # (F, 3, 3), of these frames, pixels of the network's image


@dataclass(frozen=True, slots=True)
class LoopClosure:
    """A loop that was closed."""

    with_window: int  # the window at its other end
    # By window of this map: what takes it from where it was to where it is now, in the map.
    corrections: dict[int, Sim3]


class LoopCloser:
    """The windows of the map that is being made."""

    def __init__(self, settings: RegistrationSettings, network: Network) -> None:
        """
        Begin.

        :raises ValueError: if GTSAM is not installed.
        """
        self.counts: Counter[str] = Counter()
        self._network = network
        self._max_residual = settings.max_registration_residual
        self._most = settings.loop_windows
        self.start_map()

    def start_map(self) -> None:
        """Forget all windows: they lie in another map."""
        self._graph = PoseGraph()
        self._windows: list[int] = []  # ids, by node
        self._kept: list[StoredWindow] = []
        self._every = 1  # of how many windows one is kept
        self._before: deque[Array] = deque(maxlen=_NEAR)  # descriptors of the last windows
        self._likeness: deque[float] = deque(maxlen=self._most)  # of windows that are near
        self._rest_until = 0  # node
        self._refused, self._refused_until = 0, 0  # nodes

    def add(
        self,
        batch: Batch,
        placed: RegisteredFrames,
        intrinsics: Array,
        descriptors: torch.Tensor | None,
        registration: Registration,
    ) -> LoopClosure | None:
        """
        Take a window that has been joined to the map; close a loop if it ends one.

        :param placed: its frames in the map; the newest of them are enough.
        :param intrinsics: (S, 3, 3), of its frames.
        :param descriptors: (S, C), of its frames; None: the network has none, no loop is found.
        """
        there = [i for i, number in enumerate(batch.ids) if number in placed.frames]
        half = [there[i] for i in _halve(len(there))]
        window_from_map = registration.map_from_window.inverse()
        geometry = tuple(placed.frames[batch.ids[i]].moved(window_from_map) for i in half)
        known = None if not self._windows else _judge(registration, geometry)
        node = self._graph.add(registration.map_from_window, known)
        self._windows.append(batch.window_id)
        if descriptors is None:
            return None
        own = descriptors[half].double().mean(0).numpy()
        window = StoredWindow(
            node=node,
            window_id=batch.window_id,
            descriptor=own,
            batch=_without_tensors(batch, half),
            geometry=geometry,
            intrinsics=intrinsics[half],
        )
        candidate = self._find_candidate(window)
        self._keep(window)
        if candidate is None:
            return None
        closure = self._try(candidate, window)
        if closure is None:
            self._refused, self._refused_until = candidate.node, node + _REST
        else:
            self._rest_until = node + _REST
        return closure

    def _find_candidate(self, window: StoredWindow) -> StoredWindow | None:
        """Find the window that looks most alike, if it does so enough."""
        middle = np.mean([kept.descriptor for kept in self._kept], axis=0) if self._kept else 0.0
        if len(self._before) == _NEAR:
            self._likeness.append(_correlate(self._before[0] - middle, window.descriptor - middle))
        self._before.append(window.descriptor)
        if window.node <= self._rest_until:
            return None
        there = [kept for kept in self._kept if kept.node <= window.node - _APART]
        if window.node <= self._refused_until:
            there = [kept for kept in there if abs(kept.node - self._refused) > _NEAR]
        if not there:
            return None
        alike = [
            _correlate(kept.descriptor - middle, window.descriptor - middle) for kept in there
        ]
        best = int(np.argmax(alike))
        return there[best] if alike[best] >= np.quantile(self._likeness, _ALIKE) else None

    def _keep(self, window: StoredWindow) -> None:
        if window.node % self._every:
            return
        self._kept.append(window)
        if len(self._kept) > self._most:
            self._every *= 2
            self._kept = [kept for kept in self._kept if kept.node % self._every == 0]

    def _try(self, there: StoredWindow, here: StoredWindow) -> LoopClosure | None:
        """Let a joint window decide."""
        batch = _join(there.batch, here.batch)
        try:
            joint = reconstruct(self._network(batch, HEADS), batch)
        except (PredictionError, torch.cuda.OutOfMemoryError) as error:
            self._refuse(there, here, str(error))
            return None
        # those by which these frames lie in the map
        intrinsics = np.concatenate([there.intrinsics, here.intrinsics])
        joint = replace(joint, intrinsics=intrinsics)
        objection = _find_objection(joint, batch.fitted, len(there.batch.ids))
        if objection:
            self._refuse(there, here, objection)
            return None
        ends = [self._align(window, joint, batch.ids) for window in (there, here)]
        for end in ends:
            if not end.trusted:
                self._refuse(there, here, end.note)
                return None
        one, other = (
            self._graph.places[window.node].inverse() @ end.map_from_window
            for window, end in zip((there, here), ends, strict=True)
        )
        known = _judge(ends[0], there.geometry) + _judge(ends[1], here.geometry)
        moved = self._graph.close(there.node, here.node, one @ other.inverse(), known)
        self.counts['closed_loops'] += 1
        logger.info('window %d closes a loop with window %d', here.window_id, there.window_id)
        return LoopClosure(there.window_id, dict(zip(self._windows, moved, strict=True)))

    def _align(
        self, window: StoredWindow, joint: Reconstruction, ids: tuple[int, ...]
    ) -> Registration:
        place = self._graph.places[window.node]
        frames = {
            number: geometry.moved(place)
            for number, geometry in zip(window.batch.ids, window.geometry, strict=True)
        }
        return register(ids, joint, RegisteredFrames(frames, place.scale), self._max_residual)

    def _refuse(self, there: StoredWindow, here: StoredWindow, why: str) -> None:
        self.counts['rejected_loops'] += 1
        logger.debug(
            'window %d does not close a loop with %d: %s', here.window_id, there.window_id, why
        )


def _halve(frames: int) -> list[int]:
    """Choose half of the frames, spread over the window."""
    return [int(i) for i in np.linspace(0, frames - 1, max(frames // 2, 1)).round()]


def _without_tensors(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Keep frames with the network's images in the place of the camera's."""
    fitted = tuple(batch.fitted[i] for i in chosen)
    return Batch(
        images=torch.empty(0),
        fitted=fitted,
        frames=tuple(
            replace(batch.frames[i], image=image.pixels)
            for i, image in zip(chosen, fitted, strict=True)
        ),
        ids=tuple(batch.ids[i] for i in chosen),
        window_id=batch.window_id,
    )


def _join(one: Batch, other: Batch) -> Batch:
    fitted = (*one.fitted, *other.fitted)
    return Batch(
        images=stack_images([image.pixels for image in fitted]),
        fitted=fitted,
        frames=(*one.frames, *other.frames),
        ids=(*one.ids, *other.ids),
        window_id=other.window_id,
    )


def _correlate(one: Array, other: Array) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / max(lengths, 1e-30)


def _judge(registration: Registration, geometry: Sequence[FrameGeometry]) -> NoiseSigmas:
    """Say how well an registration is known, by how its shared frames scatter."""
    middle = float(np.median(np.stack([each.depth for each in geometry])))
    depth = registration.map_from_window.scale * middle
    if registration.shared > 1:
        turn = (registration.rotation_variance / registration.shared) ** 0.5
        shift = (registration.translation_variance / registration.shared) ** 0.5
        stretch = float(np.nan_to_num(registration.scale_variance) / registration.shared) ** 0.5
    else:  # one frame agrees with itself; its points tell a little
        turn = stretch = registration.residual
        shift = registration.residual * depth
    return NoiseSigmas(
        turn=max(turn, _LEAST),
        shift=max(shift, _LEAST * depth),
        stretch=max(stretch, _LEAST),
    )


def _find_objection(
    joint: Reconstruction, fitted: Sequence[PreprocessedImage], first_half: int
) -> str:
    """Say why both halves of a joint window do not show the same place, '' if they do."""
    in_sight, depth, look = [], [], []
    frames = range(len(fitted))
    grey = [image.pixels.mean(-1) for image in fitted]
    for one, other in (
        (a, b) for a in frames for b in frames if (a < first_half) != (b < first_half)
    ):
        share, ratio, seen = _look_from(joint, one, other, grey)
        in_sight.append(share)
        if len(ratio) >= _FEWEST:
            depth.append(float(np.median(np.abs(ratio - 1))))
            look.append(_likeness(*seen))
    if np.median(in_sight) < _IN_SIGHT:
        return f'{np.median(in_sight):.0%} of what is seen is in common'
    if np.median(depth) > _SAME_DEPTH:
        return f'depths differ by {np.median(depth):.1%}'
    if np.median(look) < _SAME_LOOK:
        return f'the views correlate with {np.median(look):.2f}'
    return ''


def _look_from(
    joint: Reconstruction, one: int, other: int, grey: Sequence[Array]
) -> tuple[float, Array, tuple[Array, Array]]:
    """
    See the more confident points of one frame from another one.

    :returns: the share that is in its picture; of these its depth there over that by the points
        (P,); and the grey levels in both pictures, (P,) each.
    """
    thin = subsample(joint, one)
    chosen = np.flatnonzero(thin.confidence >= np.median(thin.confidence))
    points = thin.points(chosen)
    camera_from_window = invert_rigid(torch.from_numpy(joint.window_from_camera[other]))
    found, in_camera = project(
        torch.from_numpy(points), camera_from_window, torch.from_numpy(joint.intrinsics[other])
    )
    height, width = joint.image_size
    column, row = found.round().T.numpy()
    ahead = in_camera[:, 2].numpy()
    seen = (ahead > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    at = row[seen].astype(np.intp), column[seen].astype(np.intp)
    ratio = joint.depth[other][at] / ahead[seen]
    step = round(height / thin.depth.shape[0])
    mine: Array = grey[one][::step, ::step].ravel()[chosen][seen]
    return float(seen.mean()), ratio, (mine, grey[other][at])


def _likeness(one: Array, other: Array) -> float:
    """Correlate; a picture of one colour is like nothing."""
    return _correlate(one - one.mean(), other - other.mean())
