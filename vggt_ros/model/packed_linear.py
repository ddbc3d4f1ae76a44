# SPDX-License-Identifier: Apache-2.0
"""
Large linear layers on a CPU, with weights laid out for oneDNN's kernels.

`nn.Linear` hands float32 to the BLAS library that torch was built with, which packs the weights
anew at every call. oneDNN, which torch brings too, takes weights that were packed once; results
differ by rounding. How much it gains depends on the processor: see docs/speed.md.

Source: the operators to which torch's own compiler brings frozen linear layers
(torch/_inductor/fx_passes/mkldnn_fusion.py). They are not documented; without them, layers stay.
So they do on other processors than x86, where nobody has measured it.
"""

from __future__ import annotations

import platform
from typing import cast

import torch
from torch import Tensor, nn

_PROCESSORS = ('x86_64', 'AMD64')
_PACK = '_reorder_linear_weight'
_WORTH_IT = 1 << 17  # weights of a layer; with fewer, the call itself costs what is gained
_ROWS = 1024  # that the layout is made for; for 4 to 2,400 it is as fast as one made for them


class PackedLinear(nn.Module):
    """What `linear` computes, without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Not parameters: there is nothing to train or to save in this layout.
        packed = getattr(torch.ops.mkldnn, _PACK)(linear.weight.detach(), _ROWS)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer('weight', packed, persistent=False)
        self.register_buffer('bias', bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        made = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return cast(Tensor, made)


def pack_linear_layers(*modules: nn.Module) -> int:
    """
    Replace the large linear layers that hold float32 on the CPU; their own weights are freed.

    :returns: how many were replaced; none where processor or torch do not have what it takes.
    """
    known = platform.machine() in _PROCESSORS and torch.backends.mkldnn.is_available()
    if not known or not hasattr(torch.ops.mkldnn, _PACK):
        return 0
    packed = 0
    for parent in [each for module in modules for each in module.modules()]:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _can_gain(layer.weight):
                setattr(parent, name, PackedLinear(layer))
                packed += 1
    return packed


def _can_gain(weight: Tensor) -> bool:
    # not a tensor of a type of its own, as those in int8 are
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32
    return plain and weight.device.type == 'cpu' and weight.numel() >= _WORTH_IT
