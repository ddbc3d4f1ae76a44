# SPDX-License-Identifier: Apache-2.0
"""Which kernels run: torch's fused attention, chosen by us on CUDA, TF32, and compiled layers.

Torch's own order of preference changes with its version, and the kernels differ by up to half in
speed at the 64 channels of VGGT's heads. On a CPU torch's choice stands.

Source: torch.nn.attention; FlashAttention-3 (arXiv 2407.08608) for the order.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_ros.model.block import Block
from vggt_ros.model.dense_head import Scratch

_HOPPER = 9  # compute capability from which cuDNN's attention is the fastest

# The last two take what the others refuse, such as the float32 of the camera head.
_FLASH_FIRST = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_CUDNN_FIRST = (_FLASH_FIRST[1], _FLASH_FIRST[0], *_FLASH_FIRST[2:])

# Before torch 2.6 the order was fixed: flash, efficient, math.
_HAS_PRIORITY = 'set_priority' in inspect.signature(sdpa_kernel).parameters


def attention_order(device: torch.device) -> tuple[SDPBackend, ...]:
    """List the kernels that are to be tried on a device, best first; () leaves it to torch."""
    if device.type != 'cuda' or not _HAS_PRIORITY:
        return ()
    capability = torch.cuda.get_device_capability(device)
    return _CUDNN_FIRST if capability[0] >= _HOPPER else _FLASH_FIRST


def prefer(order: Sequence[SDPBackend]) -> AbstractContextManager[object]:
    """Try the kernels in this order inside; meant to be entered once for a whole window."""
    if not order:
        return nullcontext()
    context: AbstractContextManager[object] = sdpa_kernel(list(order), set_priority=True)
    return context


def chosen_kernel(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """
    Ask torch which kernel it takes where the caller stands, inside of `prefer` or not.

    :returns: 'cudnn', 'flash', 'efficient' or 'math'.
    """
    tokens = torch.zeros(1, 1, 64, head_dim, dtype=dtype, device=device)
    # What scaled_dot_product_attention itself asks, so that it also holds where torch knows
    # better; the documented can_use_... functions answer for CUDA alone and know no order.
    chosen = SDPBackend(torch._fused_sdp_choice(tokens, tokens, tokens))
    return str(chosen.name).lower().removesuffix('_attention')


def allow_tf32(precision: torch.dtype) -> None:
    """
    Let convolutions of float32 on CUDA round their inputs to TF32, unless float32 was asked for.

    It concerns the dense heads. Torch allows it by itself, and the published networks were run so;
    it is said here because results depend on it. For the whole process.
    """
    torch.backends.cudnn.allow_tf32 = precision != torch.float32


def compile_layers(model: nn.Module) -> None:
    """
    Compile, at their first use with each shape, the layers that take nearly all of the time.

    Whole blocks and the dense heads' convolutions, each by itself: what lies between them keeps
    tables and picks frames, and blocks of one kind and shape share what was compiled.
    """
    for module in model.modules():
        if isinstance(module, (Block, Scratch)):
            module.compile(dynamic=False)
