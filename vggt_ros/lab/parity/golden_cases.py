# SPDX-License-Identifier: Apache-2.0
"""
Compare the network with golden outputs and intermediate tensors of the reference.

A golden case is a small network with a `config.json`; the full size is compared by stored samples
and statistics. Weights come from `weight_recipe`.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose
from vggt_ros.lab.parity.intermediates import named_intermediates, record_calls, record_outputs
from vggt_ros.lab.parity.weight_recipe import fill_weights, uniform_from_name
from vggt_ros.model import VGGT, Prediction, VGGTConfig

LIMIT = 5e-5
TRACK_LIMIT = 1e-3
UPDATE_INPUT_LIMIT = 1e-2  # the flow embedding magnifies rounding by up to 1000 rad/px
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
    """The deviation of one tensor from the reference."""

    case: str
    name: str
    head: str
    error: float  # see `relative_deviation`
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class FullSizeRun:
    """Deviations, time and memory of one full-size case."""

    case: str
    deviations: list[Deviation]
    seconds: float  # of the forward pass
    peak_gigabytes: float  # peak resident memory of the process, weights included


def limit_of(name: str) -> float:
    """Return the limit on the deviation of a golden tensor."""
    if name.endswith('update_in'):
        return UPDATE_INPUT_LIMIT
    tracked = name in ('track', 'vis', 'conf') or name.startswith(('track.pred', 'track.iter'))
    return TRACK_LIMIT if tracked else LIMIT


def head_of(name: str) -> str:
    """Return the part of the network that a golden tensor belongs to."""
    for prefix, head in HEAD_OF_PREFIX:
        if name.startswith(prefix) or (prefix == 'trinsic' and prefix in name):
            return head
    raise ValueError(f'{name} belongs to no known part of the network')


def relative_deviation(golden: Tensor, ours: Tensor) -> float:
    """
    Return the largest difference over the golden's largest deviation from its mean.

    Infinite if shapes differ, or values are not finite where the golden's are.
    """
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
    """Return the network of a golden case, with its weights."""
    description = json.loads((folder / 'config.json').read_text())
    case = description['_case']
    model = VGGT(VGGTConfig.from_dict(description))
    model.eval()
    fill_weights(model, case['salt'], case['probe_scale'])
    return model


def check_case(folder: Path) -> list[Deviation]:
    """Compare every output and intermediate of a golden case."""
    inputs = load_file(folder / 'inputs.safetensors')
    golden: dict[str, Tensor] = {}
    for name in ('outputs', 'intermediates'):
        if (folder / f'{name}.safetensors').exists():
            golden.update(load_file(folder / f'{name}.safetensors'))
    ours = run_model(build_case(folder), inputs['images'], inputs['query_points'])
    return [
        Deviation(
            folder.name, name, head_of(name), relative_deviation(value, ours[name]), limit_of(name)
        )
        for name, value in sorted(golden.items())
        if name != 'world_points_from_depth'  # geometry, with goldens of its own
    ]


@torch.no_grad()
def run_model(model: VGGT, images: Tensor, query_points: Tensor) -> dict[str, Tensor]:
    """Return all tensors of one forward pass under the golden names."""
    with record_calls(model) as calls:
        prediction = model(images, query_points)
    image_size = images.shape[-2], images.shape[-1]
    tensors = named_outputs(prediction, image_size)
    tensors.update(named_intermediates(model, calls, model.patch_grid(image_size)))
    return tensors


def named_outputs(prediction: Prediction, image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the tensors of a prediction under the golden names."""
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
    """Return VGGT-1B with recipe weights."""
    with torch.device('meta'):
        model = VGGT(VGGTConfig.vggt_1b())
    model.to_empty(device='cpu').eval()
    fill_weights(model, FULL_SALT)
    return model


@torch.no_grad()
def check_full_size(model: VGGT, reference: Path) -> FullSizeRun:
    """Compare one full-size case with the samples and statistics in a JSON file."""
    golden = json.loads(reference.read_text())
    case = golden['case']
    shape = golden['images']['shape']
    images = torch.from_numpy(uniform_from_name('images', shape, f'full-{case}'))
    start = time.perf_counter()
    with record_outputs(model, golden['outputs']) as recorded:
        prediction = model(images, torch.tensor([golden['query_points']]))
    seconds = time.perf_counter() - start
    ours = {**recorded, **named_outputs(prediction, (images.shape[-2], images.shape[-1]))}
    deviations = [
        Deviation(case, name, head_of(name), sample_deviation(expected, ours[name]), FULL_LIMIT)
        for name, expected in golden['outputs'].items()
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return FullSizeRun(case, deviations, seconds, peak)


def sample_deviation(golden: dict[str, Any], ours: Tensor) -> float:
    """Return the worst deviation of samples, mean and std, in standard deviations."""
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
    """Return for each part of the network the deviation closest to its limit."""
    worst: dict[str, Deviation] = {}
    for deviation in deviations:
        known = worst.get(deviation.head)
        if known is None or not deviation.error / deviation.limit <= known.error / known.limit:
            worst[deviation.head] = deviation
    return worst


def write_deviations(deviations: list[Deviation], runs: list[FullSizeRun], path: Path) -> None:
    """Write all deviations, and the cost of the full-size runs, as JSON."""
    record = {
        'torch': torch.__version__,
        'deviations': [asdict(each) for each in deviations],
        'full_size': [
            {'case': run.case, 'seconds': run.seconds, 'peak_gigabytes': run.peak_gigabytes}
            for run in runs
        ],
    }
    path.write_text(json.dumps(record, indent=1) + '\n')
