# SPDX-License-Identifier: Apache-2.0
"""
Weights to begin with when a small network is trained from nothing.

VGGT-1B begins with a pre-trained encoder, and its other blocks nearly switched off (layer scales
of 0.01). A shallow network without one learns sooner if every branch speaks from the start:
linear layers keep the variance of their input, patches know their place, special tokens differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vggt_ros.model import VGGT
from vggt_ros.model.block import Block

_BRANCH = 0.5  # layer scale of every block
_PLACE = 0.7  # strength of the position code of patches
_TOKEN = 0.5  # spread of the special tokens


@torch.no_grad()
def start_from_nothing(model: VGGT, seed: int) -> None:
    """Draw the weights of encoder and aggregator anew; the heads keep theirs."""
    random = torch.Generator().manual_seed(seed)

    def draw(target: Tensor, std: float) -> None:
        target.copy_(torch.randn(target.shape, generator=random) * std)

    aggregator = model.aggregator
    encoder = aggregator.patch_embed
    for module in aggregator.modules():
        if isinstance(module, Block):
            module.ls1.gamma.fill_(_BRANCH)
            module.ls2.gamma.fill_(_BRANCH)
        if isinstance(module, nn.Linear):
            draw(module.weight, module.in_features**-0.5)
            module.bias.zero_()
    projection = encoder.patch_embed.proj
    draw(projection.weight, math.prod(projection.weight.shape[1:]) ** -0.5)
    projection.bias.zero_()
    encoder.pos_embed[:, 1:] = _PLACE * _place_code(encoder.grid_size, encoder.pos_embed.shape[-1])
    for token in (encoder.cls_token, encoder.register_tokens):
        draw(token, _TOKEN)
    for token in (aggregator.camera_token, aggregator.register_token):
        draw(token, _TOKEN)


def _place_code(side: int, channels: int) -> Tensor:
    """Return (side², channels): sines and cosines of row and column, rows slow."""
    count = channels // 4
    waves = math.pi * 2 ** (torch.arange(count) / max(count - 1, 1) * math.log2(side / 2))
    angles = torch.linspace(-1, 1, side)[:, None] * waves
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (side, 2·count)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    code = torch.zeros(side * side, channels)
    code[:, : 4 * count] = torch.cat((rows, columns), dim=-1)
    return code * math.sqrt(2)
