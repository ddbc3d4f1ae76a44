# SPDX-License-Identifier: Apache-2.0
"""
The losses of VGGT (section 3.4): cameras, depth, points, tracks.

    total = sum of weight * loss over the heads with a prediction

Dense heads are trained with their own uncertainty: the loss of an error `e` with confidence `c` is
`gamma * e * c - alpha * log c`. The largest errors are excluded. Camera and track losses weigh
later refinement steps more.

All functions take a normalised `GroundTruth`. Errors are clamped to 100 units, NaN and infinity
count as 0; the gradient of a NaN is still NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_ros.lab.training.dataset import GroundTruth
from vggt_ros.model.prediction import Prediction

MAX_ERROR = 100.0  # of any single value
_MIN_PIXELS = 100  # valid ones in a scene's first frame, or in a batch
_MIN_FOR_QUANTILE = 1000  # values; of fewer, none is excluded
_MIN_NORMALS = 10
_CLOSE = 3.0  # pixels; the target confidence of a track with a smaller error is 1


@dataclass(frozen=True)
class CameraLoss:
    """The loss of cameras."""

    weight: float = 5.0
    norm: str = 'l1'  # 'l1', 'l2' or 'huber' (the paper's)
    decay: float = 0.6  # weight of a refinement step relative to the next
    translation: float = 1.0
    rotation: float = 1.0
    field_of_view: float = 0.5

    def __post_init__(self) -> None:
        if self.norm not in ('l1', 'l2', 'huber'):
            raise ValueError(f"norm is {self.norm!r}; expected 'l1', 'l2' or 'huber'")


@dataclass(frozen=True)
class DenseLoss:
    """The loss of depth or points."""

    weight: float = 1.0
    shape: str = 'gradient'  # additional local loss: 'gradient', 'normal' or ''
    shape_confidence: bool = False  # weight it by confidence, with the default gamma and alpha
    quantile: float = 0.98  # larger errors are excluded; 0: none
    gamma: float = 1.0
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if self.shape not in ('gradient', 'normal', ''):
            raise ValueError(f"shape is {self.shape!r}; expected 'gradient', 'normal' or ''")


@dataclass(frozen=True)
class TrackLoss:
    """The loss of tracks."""

    weight: float = 0.05
    decay: float = 0.8


@dataclass(frozen=True)
class LossSettings:
    """The losses of all heads; None leaves a head untrained."""

    camera: CameraLoss | None = field(default_factory=CameraLoss)
    depth: DenseLoss | None = field(default_factory=DenseLoss)
    points: DenseLoss | None = None
    tracks: TrackLoss | None = None


def compute_losses(
    prediction: Prediction, truth: GroundTruth, settings: LossSettings
) -> dict[str, Tensor]:
    """
    Compute the losses of a prediction against the normalised ground truth.

    :returns: scalars: `total`, to be minimised, and its parts by name, unweighted.
    :raises ValueError: if no head has both a prediction and a loss.
    """
    parts: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    if settings.camera and prediction.pose_encodings is not None:
        parts |= camera_loss(prediction.pose_encodings, truth, settings.camera)
        totals.append(settings.camera.weight * parts['camera'])
    dense = (
        ('depth', settings.depth, prediction.depth, prediction.depth_confidence, truth.depth),
        ('points', settings.points, prediction.points, prediction.points_confidence, truth.points),
    )
    for name, loss, predicted, confidence, expected in dense:
        if loss and predicted is not None and confidence is not None:
            if predicted.ndim == truth.depth.ndim:
                predicted, expected = predicted[..., None], expected[..., None]
            losses = dense_loss(predicted, expected, confidence, truth.valid, loss)
            parts |= {f'{name}_{key}': value for key, value in losses.items()}
            totals.append(loss.weight * sum(losses.values(), predicted.new_zeros(())))
    if settings.tracks and prediction.track_iterations is not None:
        parts |= track_loss(prediction, truth, settings.tracks)
        totals.append(settings.tracks.weight * parts['tracks'])
    if not totals:
        raise ValueError('nothing to train: no head has both a prediction and a loss')
    return {'total': torch.stack(totals).sum(), **parts}


# --- cameras


def camera_loss(
    encodings: list[Tensor], truth: GroundTruth, settings: CameraLoss
) -> dict[str, Tensor]:
    """
    Compute the loss of the cameras of every refinement step.

    :param encodings: per step (B, S, 9). Scenes whose first frame has hardly a valid pixel are
        excluded: their unit is arbitrary.
    """
    included = truth.valid[:, 0].sum(dim=(-1, -2)) > _MIN_PIXELS
    expected = truth.pose_encodings()[included]
    sums = dict.fromkeys(('translation', 'rotation', 'field_of_view'), encodings[0].new_zeros(()))
    for step, encoding in enumerate(encodings):
        weight = settings.decay ** (len(encodings) - 1 - step) / len(encodings)
        if not bool(included.any()):
            # A loss of zero with a gradient for every parameter, which parallel training needs.
            sums = {name: value + 0.0 * encoding.mean() for name, value in sums.items()}
            continue
        predicted = encoding[included]
        for name, part in (
            ('translation', slice(0, 3)),
            ('rotation', slice(3, 7)),
            ('field_of_view', slice(7, 9)),
        ):
            error = _camera_error(predicted[..., part], expected[..., part], settings.norm)
            if name == 'translation':
                error = error.clamp(max=MAX_ERROR)
            sums[name] = sums[name] + weight * _finite(error).mean()
    total = (
        settings.translation * sums['translation']
        + settings.rotation * sums['rotation']
        + settings.field_of_view * sums['field_of_view']
    )
    return {'camera': total, **{f'camera_{name}': value for name, value in sums.items()}}


def _camera_error(predicted: Tensor, expected: Tensor, norm: str) -> Tensor:
    if norm == 'l1':
        return (predicted - expected).abs()
    if norm == 'l2':
        return (predicted - expected).norm(dim=-1, keepdim=True)
    return F.huber_loss(predicted, expected, reduction='none', delta=0.1)


# --- depth and points


def dense_loss(
    predicted: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> dict[str, Tensor]:
    """
    Compute the loss of depth (C = 1) or points (C = 3).

    :param predicted: (B, S, H, W, C), `expected` likewise.
    :param confidence: (B, S, H, W), at least 1.
    :param valid: (B, S, H, W) bool.
    :returns: `confidence`, the confidence-weighted error, `error`, the plain one, and `shape`.
    """
    expected = _finite(expected)
    if int(valid.sum()) < _MIN_PIXELS:
        zero = 0.0 * predicted.mean() + 0.0 * confidence.mean()
        return {'confidence': zero, 'error': zero, 'shape': zero}
    error = _finite((expected - predicted)[valid].norm(dim=-1))
    weighted = _finite(_weight(error, confidence[valid], settings.gamma, settings.alpha))
    shape = predicted.new_zeros(())
    if settings.shape:
        shape_loss = _gradient_loss if settings.shape == 'gradient' else _normal_loss
        scales = 4 if settings.shape == 'gradient' else 3
        images = [tensor.flatten(0, 1) for tensor in (predicted, expected, confidence, valid)]
        for scale in range(scales):
            step = 2**scale
            p, e, c, v = (image[:, ::step, ::step] for image in images)
            shape = shape + shape_loss(p, e, c, v, settings) / scales
    return {
        'confidence': _mean_below_quantile(weighted, settings.quantile),
        'error': _mean_below_quantile(error, settings.quantile),
        'shape': shape,
    }


def _weight(
    error: Tensor,
    confidence: Tensor,
    gamma: float = DenseLoss.gamma,
    alpha: float = DenseLoss.alpha,
) -> Tensor:
    return gamma * error * confidence - alpha * confidence.log()


def _mean_below_quantile(values: Tensor, quantile: float) -> Tensor:
    """Return the mean of the values below a quantile; of all, if there are few."""
    if quantile > 0 and values.numel() > _MIN_FOR_QUANTILE:
        values = values.clamp(max=MAX_ERROR)
        rank = round(quantile * (values.numel() - 1)) + 1
        threshold = values.detach().kthvalue(rank).values.clamp(max=MAX_ERROR)
        smaller = values[values < threshold]
        if smaller.numel() > _MIN_FOR_QUANTILE:
            values = smaller
    return _finite(values).mean()


def _gradient_loss(
    predicted: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> Tensor:
    """Compare image gradients; images (N, H, W, C)."""
    mask = valid[..., None].to(predicted.dtype)
    difference = mask * (predicted - expected)
    total = predicted.new_zeros(())
    for axis in (1, 2):
        size = difference.shape[axis]
        step = difference.diff(dim=axis).abs()
        both = mask.narrow(axis, 1, size - 1) * mask.narrow(axis, 0, size - 1)
        step = (both * step).clamp(max=MAX_ERROR)
        if settings.shape_confidence:
            next_confidence = confidence[..., None].narrow(axis, 1, size - 1)
            step = _weight(step, next_confidence.expand_as(step))
        total = total + step.sum()
    count = mask.sum() * predicted.shape[-1]
    return total / count if bool(count > 0) else 0.0 * total


def _normal_loss(
    predicted: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> Tensor:
    """Compare the normals of the four triangles around each pixel; images (N, H, W, 3)."""
    normals, defined = _normals(predicted, valid)
    true_normals, _ = _normals(expected, valid)
    if int(defined.sum()) < _MIN_NORMALS:
        return 0.0 * predicted.sum()
    limit = 1 - 1e-8
    cosine = (normals[defined] * true_normals[defined]).sum(-1).clamp(-limit, limit)
    loss = 1 - cosine
    if settings.shape_confidence:
        loss = _weight(loss, confidence.expand(4, *confidence.shape)[defined])
    return loss.mean()


def _normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (4, N, H, W, 3) unit normals and (4, N, H, W) where all three corners are valid."""
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))
    padded_valid = F.pad(valid, (1, 1, 1, 1))
    middle = slice(1, -1)
    sides = (
        (slice(None, -2), middle),  # up
        (middle, slice(None, -2)),  # left
        (slice(2, None), middle),  # down
        (middle, slice(2, None)),  # right
    )
    edges = [padded[:, rows, columns] - points for rows, columns in sides]
    corners = [padded_valid[:, rows, columns] for rows, columns in sides]
    pairs = tuple(enumerate((1, 2, 3, 0)))
    normals = torch.stack([torch.linalg.cross(edges[i], edges[j]) for i, j in pairs])
    defined = torch.stack([valid & corners[i] & corners[j] for i, j in pairs])
    return F.normalize(normals, dim=-1, eps=1e-8), defined


# --- tracks


def track_loss(
    prediction: Prediction, truth: GroundTruth, settings: TrackLoss
) -> dict[str, Tensor]:
    """
    Compute the loss of tracks, visibility and confidence.

    The positions of every iteration count where the point is visible in its frame and in the
    first. The target of the confidence is whether the last position is within a few pixels.

    :raises ValueError: if truth or prediction have no tracks.
    """
    iterations, visibility = prediction.track_iterations, prediction.visibility
    confidence = prediction.track_confidence
    if truth.tracks is None or truth.visible is None:
        raise ValueError('the ground truth has no tracks; expected tracks and visible')
    if iterations is None or visibility is None or confidence is None:
        raise ValueError('the prediction has no tracks')
    visible = (truth.visible & truth.visible[:, :1]).to(visibility.dtype)
    count = visible.sum().clamp(min=1)
    position = visibility.new_zeros(())
    for step, tracks in enumerate(iterations):
        weight = settings.decay ** (len(iterations) - 1 - step) / len(iterations)
        error = _finite((tracks - truth.tracks).abs().mean(-1))
        position = position + weight * (error * visible).sum() / count
    with torch.no_grad():
        close = ((iterations[-1] - truth.tracks).norm(dim=-1) < _CLOSE).to(visibility.dtype)
    parts = {
        'tracks_position': position,
        'tracks_visibility': F.binary_cross_entropy(
            visibility.float(), truth.visible.to(torch.float32)
        ),
        'tracks_confidence': F.binary_cross_entropy(confidence.float(), close.float()),
    }
    return {'tracks': torch.stack(list(parts.values())).sum(), **parts}


def _finite(values: Tensor) -> Tensor:
    """Replace NaN and infinity by 0 and clamp the rest."""
    values = torch.where(values.isfinite(), values, 0.0)
    return values.clamp(-MAX_ERROR, MAX_ERROR)
