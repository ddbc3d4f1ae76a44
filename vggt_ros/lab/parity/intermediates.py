# SPDX-License-Identifier: Apache-2.0
"""
Intermediate tensors of a forward pass under the names of the golden data.

Recorded by forward hooks: the network has no code for this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vggt_ros.model import VGGT
from vggt_ros.model.attention import patch_positions

# Modules with golden outputs: blocks, first norms and RoPE, decoder stages, tracker steps.
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


class ModuleCalls:
    """Inputs and outputs of modules, in the order of their calls."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Return a forward hook that records first input and output of calls that return one."""

        def record(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.inputs.setdefault(name, []).append(args[0])
                self.outputs.setdefault(name, []).append(output)

        return record


@contextmanager
def record_calls(model: VGGT) -> Iterator[ModuleCalls]:
    """Record the calls of modules with golden outputs."""
    calls = ModuleCalls()
    handles = []
    for name, module in model.named_modules():
        parent, _, leaf = f'.{name}'.rpartition('.')
        is_child = parent.rsplit('.', 1)[-1] in RECORDED_PARENTS
        is_encoder = name in ('aggregator.patch_embed', 'aggregator.patch_embed.patch_embed')
        if is_child or is_encoder or leaf in RECORDED_LEAVES:
            handles.append(module.register_forward_hook(calls.hook(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def named_intermediates(
    model: VGGT, calls: ModuleCalls, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the recorded tensors under the golden names."""
    named = _encoder_tensors(model, calls, grid)
    named.update(_aggregator_tensors(model, calls, grid))
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


def _encoder_tensors(model: VGGT, calls: ModuleCalls, grid: tuple[int, int]) -> dict[str, Tensor]:
    encoder = 'aggregator.patch_embed'
    named = {
        'dino.pos_embed': model.aggregator.patch_embed.pos_encoding(*grid),
        'dino.patch_conv': calls.outputs[f'{encoder}.patch_embed'][0],
        'dino.tokens_in': calls.inputs[f'{encoder}.blocks.0'][0],
        'dino.patch_tokens': calls.outputs[encoder][0],
    }
    for i in range(model.config.vit.depth):
        named[f'dino.block{i}'] = calls.outputs[f'{encoder}.blocks.{i}'][0]
    return named


def _aggregator_tensors(
    model: VGGT, calls: ModuleCalls, grid: tuple[int, int]
) -> dict[str, Tensor]:
    tokens_in = calls.inputs['aggregator.frame_blocks.0'][0]
    named = {'agg.tokens_in': tokens_in}
    for i in range(model.config.agg.depth):
        within = calls.outputs[f'aggregator.frame_blocks.{i}'][0]
        across = calls.outputs[f'aggregator.global_blocks.{i}'][0]
        named[f'agg.layer{i}'] = _layer_output(within, across)
    positions = patch_positions(*grid, model.aggregator.num_special_tokens, tokens_in.device)
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


def _decoder_tensors(short: str, path: str, calls: ModuleCalls) -> dict[str, Tensor]:
    named = {f'{short}.output_conv1': calls.outputs[f'{path}.scratch.output_conv1'][-1]}
    if f'{path}.scratch.output_conv2' in calls.outputs:
        named[f'{short}.logits'] = calls.outputs[f'{path}.scratch.output_conv2'][-1]
    for i in range(4):
        named[f'{short}.level{i}'] = calls.outputs[f'{path}.resize_layers.{i}'][-1]
        named[f'{short}.refine{i + 1}'] = calls.outputs[f'{path}.scratch.refinenet{i + 1}'][-1]
    return named


@contextmanager
def record_outputs(model: VGGT, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Record only the encoder's output and the `agg.layerN` in `names`, for large networks."""
    recorded: dict[str, Tensor] = {}
    aggregator = model.aggregator

    def record_encoder(_module: nn.Module, _args: Any, output: Tensor) -> None:
        recorded['dino.patch_tokens'] = output

    def layer_hooks(index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        halves: list[Tensor] = []

        def record_frame(_module: nn.Module, _args: Any, output: Tensor) -> None:
            halves.append(output)

        def record_global(_module: nn.Module, _args: Any, output: Tensor) -> None:
            recorded[f'agg.layer{index}'] = _layer_output(halves.pop(), output)

        return record_frame, record_global

    handles = [aggregator.patch_embed.register_forward_hook(record_encoder)]
    for index in range(model.config.agg.depth):
        if f'agg.layer{index}' in names:
            record_frame, record_global = layer_hooks(index)
            handles.append(aggregator.frame_blocks[index].register_forward_hook(record_frame))
            handles.append(aggregator.global_blocks[index].register_forward_hook(record_global))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _layer_output(within: Tensor, across: Tensor) -> Tensor:
    """Concatenate frame (B·S, T, C) and global output (B, S·T, C) to (B, S, T, 2C)."""
    shape = (across.shape[0], -1, *within.shape[1:])
    return torch.cat((within.reshape(shape), across.reshape(shape)), dim=-1)
