# SPDX-License-Identifier: Apache-2.0
"""
How far what was said about single windows is from the truth.

Cameras are compared in pairs, all pairs of a window, as VGGT and its predecessors report them
(Jin et al., Image Matching across Wide Baselines, IJCV 2021): the angle between the true and the
found relative rotation, and the angle between the directions of translation, of which the sign
counts here. Depth is compared after one scale for each window, the median ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.geometry.camera import invert_rigid
from vggt_ros.geometry.rotation import rotation_angle

AUC_LIMITS = (5, 10, 30)  # degrees
_STANDING = 0.02  # share of the scene's size below which a translation has no direction
QUARTILES = 4


@dataclass
class WindowErrors:
    """Errors gathered over windows, one array for each call."""

    rotation: list[npt.NDArray[np.float64]] = field(default_factory=list)  # deg, for each pair
    direction: list[npt.NDArray[np.float64]] = field(default_factory=list)  # deg; NaN: standing
    focal: list[npt.NDArray[np.float64]] = field(default_factory=list)  # percent, for each frame
    depth: list[npt.NDArray[np.float64]] = field(default_factory=list)  # AbsRel, for each window
    delta1: list[npt.NDArray[np.float64]] = field(default_factory=list)  # share below 1.25

    def add_cameras(self, found: Tensor, true: Tensor) -> None:
        """
        Compare camera_from_world (B, S, 3, 4).

        :param found: any frame and unit for each window.
        :param true: normalised: lengths in the scene's size.
        """
        self.add_motions(relative_motion(found), true)

    def add_motions(self, found: Tensor, true: Tensor) -> None:
        """Compare motions (B · pairs, 3, 4), as of `relative_motion`, with true cameras."""
        true = relative_motion(true)
        turn = found[..., :3].mT @ true[..., :3]
        self.rotation.append(_numpy(rotation_angle(turn).rad2deg()))
        direction = _direction_angle(found[..., 3], true[..., 3])
        moved = true[..., 3].norm(dim=-1) > _STANDING
        self.direction.append(_numpy(torch.where(moved, direction, torch.nan)))

    def add_focal(self, found: Tensor, true: Tensor) -> None:
        """Compare fields of view (B, S), rad, by the focal lengths that they stand for."""
        ratio = (true / 2).tan() / (found / 2).tan().clamp(min=1e-6)
        self.focal.append(_numpy(100 * (ratio - 1).abs().flatten()))

    def add_depth(self, found: Tensor, true: Tensor, valid: Tensor) -> None:
        """Compare depth (B, S, H, W) after one scale for each window."""
        relative = found * depth_ratio(found, true, valid) / true
        for window, known in zip(relative, valid, strict=True):
            if bool(known.any()):
                error = window[known]
                self.depth.append(_numpy((error - 1).abs().mean()[None]))
                close = torch.maximum(error, 1 / error) < 1.25
                self.delta1.append(_numpy(close.double().mean()[None]))

    def figures(self) -> dict[str, float]:
        """Return the figures that the errors allow, by their usual names."""
        found: dict[str, float] = {}
        if self.rotation:
            rotation, direction = (np.concatenate(e) for e in (self.rotation, self.direction))
            # A pair that stands still is judged by its rotation alone.
            worst = np.fmax(rotation, direction)
            for limit in AUC_LIMITS:
                found[f'auc{limit}'] = area_under_curve(worst, limit)
            found['rotation_median_deg'] = float(np.median(rotation))
            moved = direction[~np.isnan(direction)]
            found['translation_direction_median_deg'] = (
                float(np.median(moved)) if len(moved) else math.nan
            )
        if self.focal:
            found['focal_error_percent'] = float(np.median(np.concatenate(self.focal)))
        if self.depth:
            found['absrel'] = float(np.concatenate(self.depth).mean())
            found['delta1'] = float(np.concatenate(self.delta1).mean())
        return found


def area_under_curve(errors: npt.NDArray[np.float64], limit: int) -> float:
    """
    Return the area under the share of errors below a threshold, over thresholds 1 to `limit`.

    :param errors: (N,) degrees.
    :returns: in [0, 1]; by whole degrees, as VGGT counts it.
    """
    counts, _ = np.histogram(errors, bins=np.arange(limit + 1))
    return float((counts.cumsum() / len(errors)).mean())


def relative_motion(camera_from_world: Tensor) -> Tensor:
    """Return the motion between all pairs i < j of cameras (B, S, 3, 4): (B · pairs, 3, 4)."""
    frames = camera_from_world.shape[1]
    first, second = torch.triu_indices(frames, frames, offset=1).to(camera_from_world.device)
    world_from_camera = invert_rigid(camera_from_world.double())
    motion: Tensor = camera_from_world[:, second].double() @ world_from_camera[:, first]
    return motion.flatten(0, 1)


def depth_ratio(found: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """Return (B, 1, 1, 1): the median of true over found (B, S, H, W) where it is valid."""
    ratio = torch.where(valid, true / found, torch.nan)
    median: Tensor = ratio.flatten(1).nanmedian(dim=1).values
    return median.view(-1, 1, 1, 1)


def error_by_confidence(error: Tensor, confidence: Tensor) -> list[float]:
    """Return the mean error of each quartile of confidence, least confident first."""
    order = confidence.flatten().argsort()
    return [float(part.mean()) for part in error.flatten()[order].tensor_split(QUARTILES)]


def _direction_angle(found: Tensor, true: Tensor) -> Tensor:
    """A translation of nothing has no direction, and counts as 90 degrees wrong."""
    along = (found * true).sum(-1)
    across = torch.linalg.cross(found, true).norm(dim=-1)
    angle = torch.atan2(across, along).rad2deg()
    return torch.where(found.norm(dim=-1) > 0, angle, 90.0)


def _numpy(values: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array
