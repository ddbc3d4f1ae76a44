# SPDX-License-Identifier: Apache-2.0
"""
The windows of a map as a pose graph over Sim(3), optimised when a loop closes.

Each window is a node, map from window. Between-factors connect neighbours, from their
registration, and the two ends of a closed loop. GTSAM optimises all nodes but the first
(Levenberg-Marquardt; Huber's loss for loops). It is a PyPI package (`gtsam`), imported only with
`loop_closure`: ROS distributions have no Python package of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from vggt_ros.geometry.sim3 import Sim3

_PRIOR_SIGMA = 1e-6  # of the first window, which defines the map
_HUBER = 1.345  # standard deviations from which on a loop factor is down-weighted


@dataclass(frozen=True, slots=True)
class NoiseSigmas:
    """Standard deviations of the relative pose of two windows."""

    rotation: float  # rad, about each axis
    translation: float  # along each axis, map units
    scale: float  # of the logarithm of the scale

    def __add__(self, other: NoiseSigmas) -> NoiseSigmas:
        return NoiseSigmas(
            float(np.hypot(self.rotation, other.rotation)),
            float(np.hypot(self.translation, other.translation)),
            float(np.hypot(self.scale, other.scale)),
        )


@dataclass(frozen=True, slots=True)
class BetweenFactor:
    """A measured relative pose of two nodes."""

    one: int  # nodes
    other: int
    one_from_other: Sim3
    sigmas: tuple[float, ...]  # seven, in the order and units of GTSAM's tangent space


@dataclass(slots=True)
class PoseGraph:
    """The nodes and factors of one map."""

    map_from_window: list[Sim3] = field(default_factory=list)  # of each node
    registrations: list[BetweenFactor] = field(default_factory=list)
    loops: list[BetweenFactor] = field(default_factory=list)

    def add(self, map_from_window: Sim3, sigmas: NoiseSigmas | None) -> int:
        """
        Append a window.

        :param sigmas: of its registration to the one before; None: it starts the map.
        :returns: its node.
        """
        node = len(self.map_from_window)
        self.map_from_window.append(map_from_window)
        if sigmas is not None:
            before = self.map_from_window[node - 1].inverse() @ map_from_window
            self.registrations.append(self._factor(node - 1, node, before, sigmas))
        return node

    def close_loop(
        self, one: int, other: int, one_from_other: Sim3, sigmas: NoiseSigmas
    ) -> list[Sim3]:
        """
        Add a loop factor and optimise.

        :returns: the correction of each node, new from old pose in the map.
        :raises ValueError: if GTSAM is not installed.
        """
        self.loops.append(self._factor(one, other, one_from_other, sigmas))
        old = self.map_from_window
        self.map_from_window = _optimise(self)
        return [
            new @ before.inverse() for new, before in zip(self.map_from_window, old, strict=True)
        ]

    def _factor(
        self, one: int, other: int, one_from_other: Sim3, sigmas: NoiseSigmas
    ) -> BetweenFactor:
        """GTSAM's errors are in the frame of `other`, whose scale is not that of the map."""
        translation = sigmas.translation / self.map_from_window[other].scale
        tangent = (*[sigmas.rotation] * 3, *[translation] * 3, sigmas.scale)
        return BetweenFactor(one, other, one_from_other, tangent)


def _optimise(graph: PoseGraph) -> list[Sim3]:
    gtsam: Any = import_gtsam()
    factors, initial = gtsam.NonlinearFactorGraph(), gtsam.Values()
    prior = gtsam.noiseModel.Isotropic.Sigma(7, _PRIOR_SIGMA)
    first = _to_gtsam(gtsam, graph.map_from_window[0])
    factors.add(gtsam.PriorFactorSimilarity3(0, first, prior))
    for node, pose in enumerate(graph.map_from_window):
        initial.insert(node, _to_gtsam(gtsam, pose))
    huber = gtsam.noiseModel.mEstimator.Huber.Create(_HUBER)
    robust = [False] * len(graph.registrations) + [True] * len(graph.loops)
    for factor, is_loop in zip((*graph.registrations, *graph.loops), robust, strict=True):
        noise = gtsam.noiseModel.Diagonal.Sigmas(np.array(factor.sigmas))
        if is_loop:
            noise = gtsam.noiseModel.Robust.Create(huber, noise)
        measured = _to_gtsam(gtsam, factor.one_from_other)
        factors.add(gtsam.BetweenFactorSimilarity3(factor.one, factor.other, measured, noise))
    result = gtsam.LevenbergMarquardtOptimizer(factors, initial).optimize()
    return [_from_gtsam(result.atSimilarity3(i)) for i in range(len(graph.map_from_window))]


def _to_gtsam(gtsam: Any, pose: Sim3) -> Any:
    """GTSAM scales after the rigid motion: x -> s (R x + t)."""
    rotation = gtsam.Rot3(pose.rotation)
    return gtsam.Similarity3(rotation, pose.translation / pose.scale, pose.scale)


def _from_gtsam(similarity: Any) -> Sim3:
    scale = similarity.scale()
    return Sim3(scale, similarity.rotation().matrix(), scale * similarity.translation())


def import_gtsam() -> ModuleType:
    """
    Import GTSAM.

    :raises ValueError: if it is not installed.
    """
    try:
        import gtsam
    except ImportError as error:
        raise ValueError(
            f'loop_closure needs GTSAM, which cannot be imported ({error}): pip install gtsam'
        ) from error
    module: ModuleType = gtsam
    return module
