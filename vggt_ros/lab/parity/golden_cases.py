# SPDX-License-Identifier: Apache-2.0
"""Compare the network with recorded outputs of the reference, down to named intermediates.

A golden case is a small network described by its `config.json`; the full size is checked on
stored samples and statistics. Weights come from `weight_recipe`.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose
from vggt_ros.lab.parity.intermediates import intermediates, record_calls, recorded_outputs
from vggt_ros.lab.parity.weight_recipe import fill, uniform
from vggt_ros.model import VGGT, Prediction, VGGTConfig

LIMIT = 5e-5
TRACK_LIMIT = 1e-3
UPDATE_INPUT_LIMIT = 1e-2  # the flow code magnifies rounding by up to 1000 rad/px
FULL_LIMIT = 1e-4
FULL_SALT = 'full-1'
HEAD_OF_PREFIX = (
    ('dino', 'encoder'),
    ('agg', 'aggregator'),
    ('camera', 'camera'),
    ('pose_enc', 'camera'),
    ('trinsic', 'camera'),
    ('depth', 'depth'),
    ('dpt.depth', 'depth'),
    ('world_points', 'points'),
    ('dpt.point', 'points'),
    ('track', 'tracks'),
    ('dpt.trackfeat', 'tracks'),
    ('vis', 'tracks'),
    ('conf', 'tracks'),
)


@dataclass(frozen=True, slots=True)
class Deviation:
    """One tensor against the reference."""

    case: str
    name: str
    head: str
    error: float  # largest difference over the golden's largest distance from its mean
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class FullSizeRun:
    """One full-size case: its deviations and what it cost."""

    case: str
    deviations: list[Deviation]
    seconds: float  # of the forward pass
    peak_gigabytes: float  # resident memory of the process so far, weights included


def limit_of(name: str) -> float:
    """How far a golden tensor of this name may be missed."""
    if name.endswith('update_in'):
        return UPDATE_INPUT_LIMIT
    tracked = name in ('track', 'vis', 'conf') or name.startswith(('track.pred', 'track.iter'))
    return TRACK_LIMIT if tracked else LIMIT


def head_of(name: str) -> str:
    """The part of the network that a tensor belongs to."""
    for prefix, head in HEAD_OF_PREFIX:
        if name.startswith(prefix) or (prefix == 'trinsic' and prefix in name):
            return head
    raise ValueError(f'{name} belongs to no known part of the network')


def deviation(golden: Tensor, ours: Tensor) -> float:
    """The largest difference in units of the golden's spread; infinite if they cannot match."""
    if golden.shape != ours.shape:
        return float('inf')
    golden, ours = golden.double(), ours.double()
    finite = golden.isfinite()
    if not torch.equal(golden[~finite], ours[~finite]) or not ours[finite].isfinite().all():
        return float('inf')
    golden, ours = golden[finite], ours[finite].detach()
    if golden.numel() == 0:
        return 0.0
    spread = (golden - golden.mean()).abs().max() if golden.numel() > 1 else golden.abs().max()
    return float((golden - ours).abs().max() / spread.clamp(min=1e-12))


def build_case(folder: Path) -> VGGT:
    """The network of a golden case, with its weights."""
    description = json.loads((folder / 'config.json').read_text())
    case = description['_case']
    model = VGGT(VGGTConfig.from_dict(description))
    model.eval()
    fill(model, case['salt'], case['probe_scale'])
    return model


def check_case(folder: Path) -> list[Deviation]:
    """Every output and intermediate that a golden case has."""
    inputs = load_file(folder / 'inputs.safetensors')
    golden: dict[str, Tensor] = {}
    for name in ('outputs', 'intermediates'):
        if (folder / f'{name}.safetensors').exists():
            golden.update(load_file(folder / f'{name}.safetensors'))
    ours = run_model(build_case(folder), inputs['images'], inputs['query_points'])
    return [
        Deviation(folder.name, name, head_of(name), deviation(value, ours[name]), limit_of(name))
        for name, value in sorted(golden.items())
        if name != 'world_points_from_depth'  # geometry, with goldens of its own
    ]


@torch.no_grad()
def run_model(model: VGGT, images: Tensor, query_points: Tensor) -> dict[str, Tensor]:
    """All tensors of one forward pass under the goldens' names."""
    with record_calls(model) as calls:
        prediction = model(images, query_points)
    image_size = images.shape[-2], images.shape[-1]
    tensors = outputs(prediction, image_size)
    tensors.update(intermediates(model, calls, model.grid(image_size)))
    return tensors


def outputs(prediction: Prediction, image_size: tuple[int, int]) -> dict[str, Tensor]:
    """A prediction under the goldens' names."""
    p = prediction
    poses, iterations = p.pose_encodings or [], p.track_iterations or []
    if p.depth is None or p.points is None or p.tracks is None or not poses:
        raise ValueError('prediction lacks a head; expected all four')
    extrinsic, intrinsic = decode_pose(poses[-1], *image_size)
    named: dict[str, Tensor | None] = {
        'pose_enc': poses[-1],
        'depth': p.depth[..., None],
        'depth_conf': p.depth_confidence,
        'world_points': p.points,
        'world_points_conf': p.points_confidence,
        'track': p.tracks,
        'vis': p.visibility,
        'conf': p.track_confidence,
        'extrinsic': extrinsic,
        'intrinsic': intrinsic,
    }
    named.update({f'pose_enc.iter{i}': pose for i, pose in enumerate(poses)})
    named.update({f'track.pred.iter{i}': track for i, track in enumerate(iterations)})
    return {name: value for name, value in named.items() if value is not None}


def build_full_size() -> VGGT:
    """VGGT-1B with recipe weights."""
    with torch.device('meta'):
        model = VGGT(VGGTConfig.vggt_1b())
    model.to_empty(device='cpu').eval()
    fill(model, FULL_SALT)
    return model


@torch.no_grad()
def check_full_size(model: VGGT, reference: Path) -> FullSizeRun:
    """One full-size case against the samples and statistics in a JSON file."""
    golden = json.loads(reference.read_text())
    case = golden['case']
    images = torch.from_numpy(uniform('images', golden['images']['shape'], f'full-{case}'))
    start = time.perf_counter()
    with recorded_outputs(model, golden['outputs']) as kept:
        prediction = model(images, torch.tensor([golden['query_points']]))
    seconds = time.perf_counter() - start
    ours = {**kept, **outputs(prediction, (images.shape[-2], images.shape[-1]))}
    deviations = [
        Deviation(case, name, head_of(name), sample_deviation(expected, ours[name]), FULL_LIMIT)
        for name, expected in golden['outputs'].items()
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return FullSizeRun(case, deviations, seconds, peak)


def sample_deviation(golden: dict[str, Any], ours: Tensor) -> float:
    """The worst of samples, mean and standard deviation, in standard deviations."""
    if list(ours.shape) != golden['shape']:
        return float('inf')
    flat = ours.double().flatten()
    samples = flat[torch.tensor(golden['index'])] - torch.tensor(golden['value']).double()
    worst = max(
        float(samples.abs().max()),
        abs(float(flat.mean()) - golden['mean']),
        abs(float(flat.std()) - golden['std']),
    )
    return float(worst / max(golden['std'], 1e-9))


def worst_by_head(deviations: list[Deviation]) -> dict[str, Deviation]:
    """For each part of the network the deviation that comes closest to its limit."""
    worst: dict[str, Deviation] = {}
    for found in deviations:
        known = worst.get(found.head)
        if known is None or not found.error / found.limit <= known.error / known.limit:
            worst[found.head] = found
    return worst
