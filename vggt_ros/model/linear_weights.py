# SPDX-License-Identifier: Apache-2.0
"""
How linear layers store their weights: in half precision, in int8, or packed for oneDNN on a CPU.

`nn.Linear` passes float32 to the BLAS library that torch was built with, which packs the weights
at every call. oneDNN, which torch includes too, takes weights that were packed once; results
differ by rounding. How much is gained depends on the processor, see docs/performance.md. On other
processors than x86 this was not measured, and nothing is packed.

Source of the packing: the operators that torch's own compiler uses for frozen linear layers
(torch/_inductor/fx_passes/mkldnn_fusion.py). They are not documented; without them, nothing is
packed.
"""

from __future__ import annotations

import platform
from typing import cast

import torch
from torch import Tensor, nn

from vggt_ros.model.vggt import VGGT

PACKING_PROCESSORS = ('x86_64', 'AMD64')
MIN_PACKED_WEIGHTS = 1 << 17  # of a layer; with fewer, the call itself costs what is gained
_PACK = '_reorder_linear_weight'
_ROWS = 1024  # of the input that the layout is optimised for; equally fast for 4 to 2,400 rows


def cast_linear_weights(model: VGGT, dtype: torch.dtype) -> None:
    """Store the linear and convolution weights of the encoder and the aggregator in `dtype`.

    They take nearly all of the memory. Autocast, which is enabled here, would round the same
    weights to `dtype` at every use, so results are bit-identical to those of autocast over float32
    weights. Norms, layer scales, tokens and all heads stay float32.
    """
    for module in model.aggregator.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
    model.autocast_dtype = dtype


def quantize_int8(model: nn.Module, mode: str) -> None:
    """
    Quantize all linear layers to int8 with torchao: a scale per row, without calibration.

    :param mode: 'weights': weights are dequantized for each product; 'dynamic': activations are
        quantized too, per token, and products are of integers.
    :raises ValueError: if torchao is not installed.
    """
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise ValueError(
            f"int8 is '{mode}', which needs torchao: pip install torchao ({error})"
        ) from error
    dynamic = mode == 'dynamic'
    quantize_(
        model, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    )


class PackedLinear(nn.Module):
    """Computes the same as `linear`, without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Not parameters: this layout can be neither trained nor saved.
        packed = getattr(torch.ops.mkldnn, _PACK)(linear.weight.detach(), _ROWS)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer('weight', packed, persistent=False)
        self.register_buffer('bias', bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        out = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return cast(Tensor, out)


def pack_linear_layers(*modules: nn.Module) -> int:
    """
    Replace large linear layers with float32 weights on the CPU; the original weights are freed.

    :returns: the number of replaced layers; 0 if the processor or torch does not support it.
    """
    supported = platform.machine() in PACKING_PROCESSORS and torch.backends.mkldnn.is_available()
    if not supported or not hasattr(torch.ops.mkldnn, _PACK):
        return 0
    packed = 0
    for parent in [module for root in modules for module in root.modules()]:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _is_packable(layer.weight):
                setattr(parent, name, PackedLinear(layer))
                packed += 1
    return packed


def _is_packable(weight: Tensor) -> bool:
    # A plain parameter: int8 weights are of a tensor subclass.
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32
    return plain and weight.device.type == 'cpu' and weight.numel() >= MIN_PACKED_WEIGHTS
