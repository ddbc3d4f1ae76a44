# SPDX-License-Identifier: Apache-2.0
"""
Errors of the predicted cameras and depth of single windows.

Cameras are compared in pairs, all pairs of a window, as VGGT and its predecessors report them
(Jin et al., Image Matching across Wide Baselines, IJCV 2021): the angle between true and predicted
relative rotation, and the angle between true and predicted direction of translation, whose sign
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
_STATIONARY = 0.02  # share of the scene's size; a shorter translation has no direction
QUARTILES = 4


@dataclass
class WindowErrors:
    """Errors accumulated over windows, one array for each call."""

    rotation: list[npt.NDArray[np.float64]] = field(default_factory=list)  # deg, for each pair
    direction: list[npt.NDArray[np.float64]] = field(default_factory=list)  # deg; NaN: stationary
    focal: list[npt.NDArray[np.float64]] = field(default_factory=list)  # percent, for each frame
    depth: list[npt.NDArray[np.float64]] = field(default_factory=list)  # AbsRel, for each window
    delta1: list[npt.NDArray[np.float64]] = field(default_factory=list)  # share below 1.25

    def add_cameras(self, predicted: Tensor, true: Tensor) -> None:
        """
        Compare camera_from_world (B, S, 3, 4).

        :param predicted: in any frame and scale for each window.
        :param true: normalised: lengths in the scene's size.
        """
        self.add_relative_poses(relative_poses(predicted), true)

    def add_relative_poses(self, predicted: Tensor, true: Tensor) -> None:
        """Compare relative poses (B · pairs, 3, 4), as of `relative_poses`, with true cameras."""
        true = relative_poses(true)
        difference = predicted[..., :3].mT @ true[..., :3]
        self.rotation.append(_numpy(rotation_angle(difference).rad2deg()))
        direction = _direction_angle(predicted[..., 3], true[..., 3])
        moved = true[..., 3].norm(dim=-1) > _STATIONARY
        self.direction.append(_numpy(torch.where(moved, direction, torch.nan)))

    def add_focal(self, predicted: Tensor, true: Tensor) -> None:
        """Compare fields of view (B, S), rad, by their focal lengths."""
        ratio = (true / 2).tan() / (predicted / 2).tan().clamp(min=1e-6)
        self.focal.append(_numpy(100 * (ratio - 1).abs().flatten()))

    def add_depth(self, predicted: Tensor, true: Tensor, valid: Tensor) -> None:
        """Compare depth (B, S, H, W) after one scale for each window."""
        relative = predicted * median_depth_ratio(predicted, true, valid) / true
        for window, mask in zip(relative, valid, strict=True):
            if bool(mask.any()):
                error = window[mask]
                self.depth.append(_numpy((error - 1).abs().mean()[None]))
                close = torch.maximum(error, 1 / error) < 1.25
                self.delta1.append(_numpy(close.double().mean()[None]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all errors added so far, by their usual names."""
        metrics: dict[str, float] = {}
        if self.rotation:
            rotation, direction = (np.concatenate(e) for e in (self.rotation, self.direction))
            # A stationary pair is rated by its rotation alone.
            worst = np.fmax(rotation, direction)
            for limit in AUC_LIMITS:
                metrics[f'auc{limit}'] = area_under_curve(worst, limit)
            metrics['rotation_median_deg'] = float(np.median(rotation))
            moved = direction[~np.isnan(direction)]
            metrics['translation_direction_median_deg'] = (
                float(np.median(moved)) if len(moved) else math.nan
            )
        if self.focal:
            metrics['focal_error_percent'] = float(np.median(np.concatenate(self.focal)))
        if self.depth:
            metrics['absrel'] = float(np.concatenate(self.depth).mean())
            metrics['delta1'] = float(np.concatenate(self.delta1).mean())
        return metrics


def area_under_curve(errors: npt.NDArray[np.float64], limit: int) -> float:
    """
    Return the area under the share of errors below a threshold, over thresholds 1 to `limit`.

    :param errors: (N,) degrees.
    :returns: in [0, 1]; in steps of one degree, as VGGT reports it.
    """
    counts, _ = np.histogram(errors, bins=np.arange(limit + 1))
    return float((counts.cumsum() / len(errors)).mean())


def relative_poses(camera_from_world: Tensor) -> Tensor:
    """Return j_from_i of all pairs i < j of cameras (B, S, 3, 4): (B · pairs, 3, 4)."""
    frames = camera_from_world.shape[1]
    first, second = torch.triu_indices(frames, frames, offset=1).to(camera_from_world.device)
    world_from_camera = invert_rigid(camera_from_world.double())
    relative: Tensor = camera_from_world[:, second].double() @ world_from_camera[:, first]
    return relative.flatten(0, 1)


def median_depth_ratio(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """Return (B, 1, 1, 1): the median of true over predicted (B, S, H, W) where it is valid."""
    ratio = torch.where(valid, true / predicted, torch.nan)
    median: Tensor = ratio.flatten(1).nanmedian(dim=1).values
    return median.view(-1, 1, 1, 1)


def error_by_confidence(error: Tensor, confidence: Tensor) -> list[float]:
    """Return the mean error of each quartile of confidence, least confident first."""
    order = confidence.flatten().argsort()
    return [float(part.mean()) for part in error.flatten()[order].tensor_split(QUARTILES)]


def _direction_angle(predicted: Tensor, true: Tensor) -> Tensor:
    """Return the angle in degrees; a zero translation has no direction and counts as 90."""
    along = (predicted * true).sum(-1)
    across = torch.linalg.cross(predicted, true).norm(dim=-1)
    angle = torch.atan2(across, along).rad2deg()
    return torch.where(predicted.norm(dim=-1) > 0, angle, 90.0)


def _numpy(values: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array
