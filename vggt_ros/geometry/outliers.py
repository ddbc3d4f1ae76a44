# SPDX-License-Identifier: Apache-2.0
"""Stray points, which a plot must leave out to show the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def without_outliers(points: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Keep the middle 98 % along each axis: one stray point would shrink all others to a dot."""
    low, high = np.percentile(points, (1, 99), axis=0)
    kept: npt.NDArray[np.bool_] = ((points >= low) & (points <= high)).all(axis=1)
    return kept
