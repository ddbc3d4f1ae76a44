# SPDX-License-Identifier: Apache-2.0
"""Compare the network with recorded outputs of the reference, down to named intermediates.

Intermediates are taken by forward hooks, so the network carries nothing for this. A golden case
is a small network described by its `config.json`; the full size is checked on stored samples and
statistics. Weights come from `weight_recipe`.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vggt_ros.evaluation.weight_recipe import fill, uniform
from vggt_ros.geometry.camera import decode_pose
from vggt_ros.model import VGGT, Prediction, VGGTConfig
from vggt_ros.model.attention import patch_positions

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
    golden, ours = golden[finite], ours[finite]
    if golden.numel() == 0:
        return 0.0
    spread = (golden - golden.mean()).abs().max() if golden.numel() > 1 else golden.abs().max()
    return float((golden - ours).abs().max() / spread.clamp(min=1e-12))


def build_case(folder: Path) -> VGGT:
    """The network of a golden case, with its weights."""
    description = json.loads((folder / 'config.json').read_text())
    case = description['_case']
    model = VGGT(VGGTConfig.from_dict(description)).eval()
    fill(model, case['salt'], case['probe_scale'])
    return model


def check_case(folder: Path) -> list[Deviation]:
    """Every output and intermediate that a golden case has."""
    inputs = load_file(folder / 'inputs.safetensors')
    golden: dict[str, Tensor] = {}
    for name in ('outputs', 'intermediates'):
        if (folder / f'{name}.safetensors').exists():
            golden.update(load_file(folder / f'{name}.safetensors'))
    ours = run(build_case(folder), inputs['images'], inputs['query_points'])
    return [
        Deviation(folder.name, name, head_of(name), deviation(value, ours[name]), limit_of(name))
        for name, value in sorted(golden.items())
        if name != 'world_points_from_depth'  # geometry, with goldens of its own
    ]


@torch.no_grad()
def run(model: VGGT, images: Tensor, query_points: Tensor) -> dict[str, Tensor]:
    """All tensors of one forward pass under the goldens' names."""
    with recorded(model) as calls:
        prediction = model(images, query_points)
    image_size = images.shape[-2], images.shape[-1]
    tensors = outputs(prediction, image_size)
    tensors.update(intermediates(model, calls, images.shape[0], model.grid(image_size)))
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


class Calls:
    """Inputs and outputs of modules, in the order of their calls."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """A forward hook that keeps first input and output if they are tensors."""

        def keep(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.inputs.setdefault(name, []).append(args[0])
                self.outputs.setdefault(name, []).append(output)

        return keep


# What the goldens name: blocks, first norms and rotations, decoder stages, tracker steps.
RECORDED_LEAVES = (
    'q_norm',
    'k_norm',
    'rope',
    'token_norm',
    'pose_branch',
    'output_conv1',
    'output_conv2',
    'corr_mlp',
    'updateformer',
    'feature_extractor',
    'refinenet1',
    'refinenet2',
    'refinenet3',
    'refinenet4',
)
RECORDED_PARENTS = ('blocks', 'frame_blocks', 'global_blocks', 'trunk', 'resize_layers')


@contextmanager
def recorded(model: VGGT) -> Iterator[Calls]:
    """Record calls of the modules that the goldens name."""
    calls = Calls()
    handles = []
    for name, module in model.named_modules():
        parent, _, leaf = f'.{name}'.rpartition('.')
        listed = parent.rsplit('.', 1)[-1] in RECORDED_PARENTS
        whole = name in ('aggregator.patch_embed', 'aggregator.patch_embed.patch_embed')
        if listed or whole or leaf in RECORDED_LEAVES:
            handles.append(module.register_forward_hook(calls.hook(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def intermediates(
    model: VGGT, calls: Calls, batch: int, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Recorded calls under the goldens' names."""
    named = _encoder_tensors(model, calls, grid)
    named.update(_aggregator_tensors(model, calls, batch, grid))
    named['camera.normed_tokens'] = calls.outputs['camera_head.token_norm'][0]
    for i, pose_input in enumerate(calls.inputs['camera_head.trunk.0']):
        named[f'camera.iter{i}.trunk_in'] = pose_input
        named[f'camera.iter{i}.delta'] = calls.outputs['camera_head.pose_branch'][i]
    decoders = {
        'depth': 'depth_head',
        'point': 'point_head',
        'trackfeat': 'track_head.feature_extractor',
    }
    for short, path in decoders.items():
        named.update(_decoder_tensors(f'dpt.{short}', path, calls))
    tracker = 'track_head.tracker'
    named['track.fmaps'] = calls.outputs['track_head.feature_extractor'][0]
    for i, correlation in enumerate(calls.inputs[f'{tracker}.corr_mlp']):
        # Ours has frames before points.
        named[f'track.iter{i}.corr'] = correlation.transpose(1, 2).flatten(0, 1)
        named[f'track.iter{i}.update_in'] = calls.inputs[f'{tracker}.updateformer'][i]
        named[f'track.iter{i}.update_out'] = calls.outputs[f'{tracker}.updateformer'][i]
    return named


def _encoder_tensors(model: VGGT, calls: Calls, grid: tuple[int, int]) -> dict[str, Tensor]:
    encoder = 'aggregator.patch_embed'
    named = {
        'dino.pos_embed': model.aggregator.patch_embed.position_code(*grid),
        'dino.patch_conv': calls.outputs[f'{encoder}.patch_embed'][0],
        'dino.tokens_in': calls.inputs[f'{encoder}.blocks.0'][0],
        'dino.patch_tokens': calls.outputs[encoder][0],
    }
    for i in range(model.config.vit.depth):
        named[f'dino.block{i}'] = calls.outputs[f'{encoder}.blocks.{i}'][0]
    return named


def _aggregator_tensors(
    model: VGGT, calls: Calls, batch: int, grid: tuple[int, int]
) -> dict[str, Tensor]:
    tokens_in = calls.inputs['aggregator.frame_blocks.0'][0]
    shape = (batch, -1, *tokens_in.shape[1:])
    named = {'agg.tokens_in': tokens_in}
    for i in range(model.config.agg.depth):
        within = calls.outputs[f'aggregator.frame_blocks.{i}'][0]
        across = calls.outputs[f'aggregator.global_blocks.{i}'][0]
        named[f'agg.layer{i}'] = torch.cat((within.reshape(shape), across.reshape(shape)), dim=-1)
    positions = patch_positions(*grid, model.aggregator.special_tokens, tokens_in.device)
    for kind in ('frame', 'global'):
        path = f'aggregator.{kind}_blocks.0.attn'
        for index, side in enumerate(('q', 'k')):
            named[f'agg.{kind}0.{side}_before_rope'] = calls.outputs[f'{path}.{side}_norm'][0]
            named[f'agg.{kind}0.{side}_after_rope'] = calls.outputs[f'{path}.rope'][index]
        rows, tokens = named[f'agg.{kind}0.q_after_rope'].shape[0:3:2]
        named[f'agg.{kind}0.rope_pos'] = positions.repeat(tokens // len(positions), 1).expand(
            rows, -1, -1
        )
    return named


def _decoder_tensors(short: str, path: str, calls: Calls) -> dict[str, Tensor]:
    named = {f'{short}.output_conv1': calls.outputs[f'{path}.scratch.output_conv1'][-1]}
    if f'{path}.scratch.output_conv2' in calls.outputs:
        named[f'{short}.logits'] = calls.outputs[f'{path}.scratch.output_conv2'][-1]
    for i in range(4):
        named[f'{short}.level{i}'] = calls.outputs[f'{path}.resize_layers.{i}'][-1]
        named[f'{short}.refine{i + 1}'] = calls.outputs[f'{path}.scratch.refinenet{i + 1}'][-1]
    return named


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


@contextmanager
def recorded_outputs(model: VGGT, names: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Record only the intermediates in `names`, as gigabytes would be kept otherwise."""
    kept: dict[str, Tensor] = {}
    encoder = model.aggregator.patch_embed

    def keep_tokens(_module: nn.Module, _args: Any, output: Tensor) -> None:
        kept['dino.patch_tokens'] = output

    handles = [encoder.register_forward_hook(keep_tokens)]
    within: dict[int, Tensor] = {}
    for name in names:
        if name.startswith('agg.layer'):
            index = int(name.removeprefix('agg.layer'))

            def keep_frame(_m: nn.Module, _a: Any, output: Tensor, index: int = index) -> None:
                within[index] = output

            def keep_global(
                _m: nn.Module, _a: Any, output: Tensor, index: int = index, name: str = name
            ) -> None:
                frames = within.pop(index)
                batch = output.shape[0]
                shape = (batch, -1, *frames.shape[1:])
                kept[name] = torch.cat((frames.reshape(shape), output.reshape(shape)), dim=-1)

            agg = model.aggregator
            handles.append(agg.frame_blocks[index].register_forward_hook(keep_frame))
            handles.append(agg.global_blocks[index].register_forward_hook(keep_global))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


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
    return worst / max(golden['std'], 1e-9)


def worst_by_head(deviations: list[Deviation]) -> dict[str, Deviation]:
    """For each part of the network the deviation that comes closest to its limit."""
    worst: dict[str, Deviation] = {}
    for found in deviations:
        known = worst.get(found.head)
        if known is None or not found.error / found.limit <= known.error / known.limit:
            worst[found.head] = found
    return worst
