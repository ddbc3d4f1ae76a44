# SPDX-License-Identifier: Apache-2.0
"""Which kernels run: the attention backend on CUDA, TF32, and compiled layers.

Torch's own priority of attention backends changes with its version, and their speed differs by up
to half at the 64 channels of VGGT's heads. On a CPU, torch chooses.

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
from vggt_ros.model.dpt_head import Scratch

_HOPPER = 9  # compute capability from which cuDNN's attention is the fastest

# The last two take what the others do not support, such as the float32 of the camera head.
_FLASH_FIRST = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_CUDNN_FIRST = (_FLASH_FIRST[1], _FLASH_FIRST[0], *_FLASH_FIRST[2:])

# Before torch 2.6 the priority was fixed: flash, efficient, math.
_HAS_PRIORITY = 'set_priority' in inspect.signature(sdpa_kernel).parameters


def attention_backends(device: torch.device) -> tuple[SDPBackend, ...]:
    """List the backends to try on a device, best first; () leaves the choice to torch."""
    if device.type != 'cuda' or not _HAS_PRIORITY:
        return ()
    capability = torch.cuda.get_device_capability(device)
    return _CUDNN_FIRST if capability[0] >= _HOPPER else _FLASH_FIRST


def prefer_backends(backends: Sequence[SDPBackend]) -> AbstractContextManager[object]:
    """Return a context with this priority of backends; meant to be entered once per window."""
    if not backends:
        return nullcontext()
    context: AbstractContextManager[object] = sdpa_kernel(list(backends), set_priority=True)
    return context


def selected_backend(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """
    Return the attention backend that torch selects in the current context.

    :returns: 'cudnn', 'flash', 'efficient' or 'math'.
    """
    tokens = torch.zeros(1, 1, 64, head_dim, dtype=dtype, device=device)
    # What scaled_dot_product_attention itself calls, on any device; the documented can_use_...
    # functions are for CUDA only and ignore the priority.
    backend = SDPBackend(torch._fused_sdp_choice(tokens, tokens, tokens))
    return str(backend.name).lower().removesuffix('_attention')


def configure_tf32(precision: torch.dtype) -> None:
    """
    Let float32 convolutions on CUDA use TF32, unless float32 was requested; for the whole process.

    This concerns the DPT heads. Torch allows it by default, and the published networks were run
    with it; it is set explicitly because results depend on it.
    """
    torch.backends.cudnn.allow_tf32 = precision != torch.float32


def compile_layers(model: nn.Module) -> None:
    """
    Compile the layers that take nearly all of the time, at their first use with each shape.

    Whole blocks and the convolutions of the DPT heads are compiled one by one: the code between
    them caches tables and selects frames, and blocks of one kind and shape share a graph.
    """
    for module in model.modules():
        if isinstance(module, (Block, Scratch)):
            module.compile(dynamic=False)
