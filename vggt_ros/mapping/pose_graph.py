# SPDX-License-Identifier: Apache-2.0
"""
The windows of a map as a graph of similarities, in which a loop can be closed.

Each window is a node, map from window. Neighbours are tied by how they were joined; a closed loop
ties two more. GTSAM then moves all but the first until the ties are strained least (Levenberg and
Marquardt; Huber's loss for loops). It comes from PyPI (`gtsam`) and is imported only here, by who
asks for loops: ROS distributions have no Python package of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from vggt_ros.geometry.sim3 import Sim3

_FIXED = 1e-6  # deviation of the first window, which defines the map
_HUBER = 1.345  # deviations up to which a loop pulls with all its force


@dataclass(frozen=True, slots=True)
class NoiseSigmas:
    """How well it is known where one window lies in another's frame: standard deviations."""

    turn: float  # rad, about each axis
    shift: float  # along each axis, map units
    stretch: float  # of the logarithm of the scale

    def __add__(self, other: NoiseSigmas) -> NoiseSigmas:
        return NoiseSigmas(
            float(np.hypot(self.turn, other.turn)),
            float(np.hypot(self.shift, other.shift)),
            float(np.hypot(self.stretch, other.stretch)),
        )


@dataclass(frozen=True, slots=True)
class _Tie:
    one: int  # nodes
    other: int
    one_from_other: Sim3
    deviations: tuple[float, ...]  # seven, in the order and units of GTSAM's tangent space


class PoseGraph:
    """The windows of one map."""

    def __init__(self) -> None:
        """
        Begin with nothing.

        :raises ValueError: if GTSAM is not installed.
        """
        self._gtsam = _import_gtsam()
        self.places: list[Sim3] = []  # map_from_window of each node
        self._joints: list[_Tie] = []
        self._loops: list[_Tie] = []

    def add(self, map_from_window: Sim3, deviations: NoiseSigmas | None) -> int:
        """
        Append a window.

        :param deviations: of its joint with the one before; None: it begins the map.
        :returns: its node.
        """
        node = len(self.places)
        self.places.append(map_from_window)
        if deviations is not None:
            before = self.places[node - 1].inverse() @ map_from_window
            self._joints.append(self._tie(node - 1, node, before, deviations))
        return node

    def close(
        self, one: int, other: int, one_from_other: Sim3, deviations: NoiseSigmas
    ) -> list[Sim3]:
        """
        Tie two windows and move all to where the ties are strained least.

        :returns: of each node, what takes it from where it was to where it is now, in the map.
        """
        self._loops.append(self._tie(one, other, one_from_other, deviations))
        moved = self._optimise()
        corrections = [new @ old.inverse() for new, old in zip(moved, self.places, strict=True)]
        self.places = moved
        return corrections

    def _tie(self, one: int, other: int, one_from_other: Sim3, known: NoiseSigmas) -> _Tie:
        """GTSAM's errors lie in the frame of `other`, whose unit is not that of the map."""
        shift = known.shift / self.places[other].scale
        deviations = (*[known.turn] * 3, *[shift] * 3, known.stretch)
        return _Tie(one, other, one_from_other, deviations)

    def _optimise(self) -> list[Sim3]:
        gtsam: Any = self._gtsam
        graph, start = gtsam.NonlinearFactorGraph(), gtsam.Values()
        fixed = gtsam.noiseModel.Isotropic.Sigma(7, _FIXED)
        graph.add(gtsam.PriorFactorSimilarity3(0, self._similarity(self.places[0]), fixed))
        for node, place in enumerate(self.places):
            start.insert(node, self._similarity(place))
        for tie in self._joints:
            graph.add(
                self._factor(tie, gtsam.noiseModel.Diagonal.Sigmas(np.array(tie.deviations)))
            )
        for tie in self._loops:
            plain = gtsam.noiseModel.Diagonal.Sigmas(np.array(tie.deviations))
            huber = gtsam.noiseModel.mEstimator.Huber.Create(_HUBER)
            graph.add(self._factor(tie, gtsam.noiseModel.Robust.Create(huber, plain)))
        found = gtsam.LevenbergMarquardtOptimizer(graph, start).optimize()
        return [_sim3(found.atSimilarity3(node)) for node in range(len(self.places))]

    def _factor(self, tie: _Tie, noise: Any) -> Any:
        return self._gtsam.BetweenFactorSimilarity3(
            tie.one, tie.other, self._similarity(tie.one_from_other), noise
        )

    def _similarity(self, place: Sim3) -> Any:
        """GTSAM scales after it has moved: x -> s (R x + t)."""
        rotation = self._gtsam.Rot3(place.rotation)
        return self._gtsam.Similarity3(rotation, place.translation / place.scale, place.scale)


def _sim3(similarity: Any) -> Sim3:
    scale = similarity.scale()
    return Sim3(scale, similarity.rotation().matrix(), scale * similarity.translation())


def _import_gtsam() -> ModuleType:
    try:
        import gtsam
    except ImportError as error:
        raise ValueError(
            f'loop_closure needs GTSAM, which cannot be imported ({error}): pip install gtsam'
        ) from error
    found: ModuleType = gtsam
    return found
