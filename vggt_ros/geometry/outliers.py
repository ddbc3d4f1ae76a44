# SPDX-License-Identifier: Apache-2.0
"""Outliers of point clouds, which plots hide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def inlier_mask(points: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Select the middle 98 % along each axis, so that outliers do not set the range of a plot."""
    low, high = np.percentile(points, (1, 99), axis=0)
    mask: npt.NDArray[np.bool_] = ((points >= low) & (points <= high)).all(axis=1)
    return mask
