# SPDX-License-Identifier: Apache-2.0
"""
The losses of VGGT (section 3.4): cameras, depth, points, tracks.

    total = sum of weight * loss over the heads that predicted something

Dense heads are trained with their own uncertainty: an error `e` with confidence `c` costs
`gamma * e * c - alpha * log c`, so that the network may give up on a pixel at a price. The
largest errors are left out. Camera and track losses weigh later refinement steps more.

Everything here takes a normalised `Truth`. Errors beyond 100 units count as 100, NaN and infinity
as 0; the gradient of a value that is not a number is still not a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vggt_ros.lab.training.truth import Truth
from vggt_ros.model.prediction import Prediction

LARGEST = 100.0  # of any single error
_FEWEST_PIXELS = 100  # in a scene's first frame, or in a batch: fewer teach nothing
_FEWEST_FOR_FILTER = 1000  # values; below, nothing is left out
_FEWEST_NORMALS = 10
_CLOSE = 3.0  # pixels: a track that is nearer than this deserves confidence


@dataclass(frozen=True)
class CameraLoss:
    """How cameras are compared."""

    weight: float = 5.0
    norm: str = 'l1'  # 'l1', 'l2' or 'huber' (the paper's)
    decay: float = 0.6  # of the weight of a refinement step against the next
    translation: float = 1.0
    rotation: float = 1.0
    field_of_view: float = 0.5

    def __post_init__(self) -> None:
        if self.norm not in ('l1', 'l2', 'huber'):
            raise ValueError(f"norm is {self.norm!r}; expected 'l1', 'l2' or 'huber'")


@dataclass(frozen=True)
class DenseLoss:
    """How depth or points are compared."""

    weight: float = 1.0
    shape: str = 'gradient'  # what else is compared: 'gradient', 'normal' or ''
    shape_confidence: bool = False  # weigh that by the confidence, always by the defaults below
    kept: float = 0.98  # share of the smallest errors that count; 0: all
    gamma: float = 1.0
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if self.shape not in ('gradient', 'normal', ''):
            raise ValueError(f"shape is {self.shape!r}; expected 'gradient', 'normal' or ''")


@dataclass(frozen=True)
class TrackLoss:
    """How tracks are compared."""

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
    prediction: Prediction, truth: Truth, settings: LossSettings
) -> dict[str, Tensor]:
    """
    Compare a prediction with the normalised truth.

    :returns: scalars: `total`, which is to be minimised, and its parts by name, unweighted.
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
    for name, how, found, confidence, expected in dense:
        if how and found is not None and confidence is not None:
            if found.ndim == truth.depth.ndim:
                found, expected = found[..., None], expected[..., None]
            losses = dense_loss(found, expected, confidence, truth.valid, how)
            parts |= {f'{name}_{key}': value for key, value in losses.items()}
            totals.append(how.weight * sum(losses.values(), found.new_zeros(())))
    if settings.tracks and prediction.track_iterations is not None:
        parts |= track_loss(prediction, truth, settings.tracks)
        totals.append(settings.tracks.weight * parts['tracks'])
    if not totals:
        raise ValueError('there is nothing to train: no head has both an output and a loss')
    return {'total': torch.stack(totals).sum(), **parts}


# --- cameras


def camera_loss(encodings: list[Tensor], truth: Truth, settings: CameraLoss) -> dict[str, Tensor]:
    """
    Compare the cameras of every refinement step.

    :param encodings: per step (B, S, 9). Scenes whose first frame has hardly a valid pixel do not
        count: their unit means nothing.
    """
    chosen = truth.valid[:, 0].sum(dim=(-1, -2)) > _FEWEST_PIXELS
    expected = truth.pose_encodings()[chosen]
    sums = dict.fromkeys(('translation', 'rotation', 'field_of_view'), encodings[0].new_zeros(()))
    for step, encoding in enumerate(encodings):
        weight = settings.decay ** (len(encodings) - 1 - step) / len(encodings)
        if not bool(chosen.any()):
            # A loss of zero that still reaches every parameter, as parallel training wants it.
            sums = {name: value + 0.0 * encoding.mean() for name, value in sums.items()}
            continue
        found = encoding[chosen]
        for name, part in (
            ('translation', slice(0, 3)),
            ('rotation', slice(3, 7)),
            ('field_of_view', slice(7, 9)),
        ):
            error = _camera_error(found[..., part], expected[..., part], settings.norm)
            if name == 'translation':
                error = error.clamp(max=LARGEST)
            sums[name] = sums[name] + weight * _sane(error).mean()
    total = (
        settings.translation * sums['translation']
        + settings.rotation * sums['rotation']
        + settings.field_of_view * sums['field_of_view']
    )
    return {'camera': total, **{f'camera_{name}': value for name, value in sums.items()}}


def _camera_error(found: Tensor, expected: Tensor, norm: str) -> Tensor:
    if norm == 'l1':
        return (found - expected).abs()
    if norm == 'l2':
        return (found - expected).norm(dim=-1, keepdim=True)
    return F.huber_loss(found, expected, reduction='none', delta=0.1)


# --- depth and points


def dense_loss(
    found: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> dict[str, Tensor]:
    """
    Compare depth (C = 1) or points (C = 3).

    :param found: (B, S, H, W, C), `expected` likewise.
    :param confidence: (B, S, H, W), at least 1.
    :param valid: (B, S, H, W) bool.
    :returns: `confidence`, the error weighed by it, `error`, the plain one, and `shape`.
    """
    expected = _sane(expected)
    if int(valid.sum()) < _FEWEST_PIXELS:
        nothing = 0.0 * found.mean() + 0.0 * confidence.mean()
        return {'confidence': nothing, 'error': nothing, 'shape': nothing}
    error = _sane((expected - found)[valid].norm(dim=-1))
    weighed = _sane(_weigh(error, confidence[valid], settings.gamma, settings.alpha))
    shape = found.new_zeros(())
    if settings.shape:
        compare = _gradient_loss if settings.shape == 'gradient' else _normal_loss
        scales = 4 if settings.shape == 'gradient' else 3
        images = [tensor.flatten(0, 1) for tensor in (found, expected, confidence, valid)]
        for scale in range(scales):
            step = 2**scale
            here, there, trust, known = (image[:, ::step, ::step] for image in images)
            shape = shape + compare(here, there, trust, known, settings) / scales
    return {
        'confidence': _mean_of_smallest(weighed, settings.kept),
        'error': _mean_of_smallest(error, settings.kept),
        'shape': shape,
    }


def _weigh(
    error: Tensor,
    confidence: Tensor,
    gamma: float = DenseLoss.gamma,
    alpha: float = DenseLoss.alpha,
) -> Tensor:
    return gamma * error * confidence - alpha * confidence.log()


def _mean_of_smallest(values: Tensor, share: float) -> Tensor:
    """Average, without the largest values if there are many."""
    if share > 0 and values.numel() > _FEWEST_FOR_FILTER:
        values = values.clamp(max=LARGEST)
        rank = round(share * (values.numel() - 1)) + 1
        threshold = values.detach().kthvalue(rank).values.clamp(max=LARGEST)
        smaller = values[values < threshold]
        if smaller.numel() > _FEWEST_FOR_FILTER:
            values = smaller
    return _sane(values).mean()


def _gradient_loss(
    found: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> Tensor:
    """Compare the differences between neighbours; images (N, H, W, C)."""
    mask = valid[..., None].to(found.dtype)
    difference = mask * (found - expected)
    total = found.new_zeros(())
    for axis in (1, 2):
        size = difference.shape[axis]
        step = difference.diff(dim=axis).abs()
        both = mask.narrow(axis, 1, size - 1) * mask.narrow(axis, 0, size - 1)
        step = (both * step).clamp(max=LARGEST)
        if settings.shape_confidence:
            later = confidence[..., None].narrow(axis, 1, size - 1)
            step = _weigh(step, later.expand_as(step))
        total = total + step.sum()
    count = mask.sum() * found.shape[-1]
    return total / count if bool(count > 0) else 0.0 * total


def _normal_loss(
    found: Tensor, expected: Tensor, confidence: Tensor, valid: Tensor, settings: DenseLoss
) -> Tensor:
    """Compare the normals of the four triangles around each pixel; images (N, H, W, 3)."""
    normals, chosen = _normals(found, valid)
    true_normals, _ = _normals(expected, valid)
    if int(chosen.sum()) < _FEWEST_NORMALS:
        return 0.0 * found.sum()
    limit = 1 - 1e-8
    cosine = (normals[chosen] * true_normals[chosen]).sum(-1).clamp(-limit, limit)
    loss = 1 - cosine
    if settings.shape_confidence:
        loss = _weigh(loss, confidence.expand(4, *confidence.shape)[chosen])
    return loss.mean()


def _normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (4, N, H, W, 3) unit normals and (4, N, H, W) where all three corners are valid."""
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))
    known = F.pad(valid, (1, 1, 1, 1))
    middle = slice(1, -1)
    sides = (
        (slice(None, -2), middle),  # up
        (middle, slice(None, -2)),  # left
        (slice(2, None), middle),  # down
        (middle, slice(2, None)),  # right
    )
    arms = [padded[:, rows, columns] - points for rows, columns in sides]
    there = [known[:, rows, columns] for rows, columns in sides]
    following = (1, 2, 3, 0)
    normals = torch.stack([torch.linalg.cross(arms[i], arms[j]) for i, j in enumerate(following)])
    chosen = torch.stack([valid & there[i] & there[j] for i, j in enumerate(following)])
    return F.normalize(normals, dim=-1, eps=1e-8), chosen


# --- tracks


def track_loss(prediction: Prediction, truth: Truth, settings: TrackLoss) -> dict[str, Tensor]:
    """
    Compare tracks, visibility and confidence.

    The positions of every iteration count where the point is seen in its frame and in the first.
    Confidence should say whether the last position is within a few pixels.

    :raises ValueError: if the truth has no tracks.
    """
    iterations, visibility = prediction.track_iterations, prediction.visibility
    confidence = prediction.track_confidence
    if truth.tracks is None or truth.visible is None:
        raise ValueError('the truth has no tracks; expected tracks and visible')
    if iterations is None or visibility is None or confidence is None:
        raise ValueError('the prediction has no tracks')
    seen = (truth.visible & truth.visible[:, :1]).to(visibility.dtype)
    count = seen.sum().clamp(min=1)
    position = visibility.new_zeros(())
    for step, tracks in enumerate(iterations):
        weight = settings.decay ** (len(iterations) - 1 - step) / len(iterations)
        error = _sane((tracks - truth.tracks).abs().mean(-1))
        position = position + weight * (error * seen).sum() / count
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


def _sane(values: Tensor) -> Tensor:
    """Replace what is not a number by 0 and limit the rest."""
    values = torch.where(values.isfinite(), values, 0.0)
    return values.clamp(-LARGEST, LARGEST)
