# SPDX-License-Identifier: Apache-2.0
"""Attention functions, 2-D rotary position embedding (RoPE), and the two attention modules.

`SelfAttention` (fused qkv projection) is used by the ViT, the aggregator and the camera trunk,
`CrossAttention` (weights as in torch's MultiheadAttention) by the tracker. Both call a plain
function of q, k, v, which `use_attention` replaces; `eager_attention` is the reference that all
others are tested against.

Source: VGGT (arXiv 2503.11651); RoFormer (arXiv 2104.09864) for the rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# (..., N, D) queries, (..., M, D) keys and values → (..., N, D)
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
# Cosine and sine, each (T, 2, D / 4) float32: token, axis (y, x), frequency.
RopeTable = tuple[Tensor, Tensor]


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q kᵀ / √D) v by torch's fused kernels."""
    return functional.scaled_dot_product_attention(q, k, v)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without fused kernels: the reference for every other attention function."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return cast(Tensor, scores.softmax(dim=-1).to(v.dtype) @ v)


def use_attention(model: nn.Module, attend: AttentionFunction) -> None:
    """Set the attention function of every attention module in `model`."""
    for module in model.modules():
        if isinstance(module, (SelfAttention, CrossAttention)):
            module.attend = attend


def patch_positions(h: int, w: int, num_special: int, device: torch.device) -> Tensor:
    """Integer (y, x) of each token of a frame: (num_special + h·w, 2).

    Special tokens are at (0, 0), where the rotation is the identity; patches count from 1.
    """
    rows = torch.arange(1, h + 1, device=device)
    columns = torch.arange(1, w + 1, device=device)
    patches = torch.cartesian_prod(rows, columns)
    return torch.cat((patches.new_zeros(num_special, 2), patches))


def rope_table(positions: Tensor, head_dim: int, base: float) -> RopeTable:
    """Angles position · base^(-2k / (D/2)) for k < D/4, as cosine and sine, always in float32.

    Float32 even under autocast: the reference implementation rounds the angles to bfloat16 under
    CUDA autocast, which alone changes outputs by 0.2 to 0.7 % and is not intended.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    # Broadcast product: einsum or matmul would run in bfloat16 under autocast.
    angles = positions.to(torch.float32)[..., None] * base**-exponents
    return angles.cos(), angles.sin()


class Rope(nn.Module):
    """Rotates the first half of the channels by y and the second by x; has no parameters."""

    def forward(self, tokens: Tensor, table: RopeTable) -> Tensor:
        """
        Rotate queries or keys.

        :param tokens: (B, heads, S·T, D), S frames of T tokens each.
        :param table: of the T positions of a frame.
        """
        cos, sin = table
        # (B, heads, S, T, axis, element of the pair, frequency)
        pairs = tokens.unflatten(2, (-1, cos.shape[0])).unflatten(-1, (2, 2, -1))
        first, second = pairs.unbind(dim=-2)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
        return rotated.flatten(-3).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """The tokens of a window whose output is computed; all tokens still serve as keys and values.

    Selected are all tokens of some frames and the first token (the camera token) of every frame.
    """

    frames: tuple[int, ...]  # indices of the frames of which all tokens are selected
    tokens_per_frame: int

    def select(self, tokens: Tensor, dim: int) -> Tensor:
        """Return all tokens of the selected frames, then the first token of every frame."""
        all_frames = tokens.split(self.tokens_per_frame, dim)
        whole = [all_frames[i] for i in self.frames]
        return torch.cat([*whole, *(frame.narrow(dim, 0, 1) for frame in all_frames)], dim)

    def split(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Split the result of `select` on axis 1: (B, F, tokens_per_frame, C) and (B, S, C)."""
        count = len(self.frames) * self.tokens_per_frame
        whole = selected[:, :count].unflatten(1, (len(self.frames), self.tokens_per_frame))
        return whole, selected[:, count:]


class SelfAttention(nn.Module):
    """Multi-head self-attention with optional q/k norm, and RoPE if a table is passed."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attend: AttentionFunction = fused_attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.rope = Rope()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, table: RopeTable | None = None, selected: SelectedTokens | None = None
    ) -> Tensor:
        """x: (B, N, C) → (B, N, C), or only the selected tokens."""
        q, k, v = self.project(x, table)
        if selected is not None:
            q = selected.select(q, dim=2)
        attended = self.attend(q, k, v)
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))

    def project(self, x: Tensor, table: RopeTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) → queries, keys and values, each (B, heads, N, D)."""
        # (B, N, 3, heads, D) → 3 × (B, heads, N, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = apply_norm(self.q_norm, q), apply_norm(self.k_norm, k)
        if table is not None:
            q, k = self.rope(q, table), self.rope(k, table)
        return q, k, v

    def attend_in_chunks(
        self,
        chunks: Sequence[Tensor],
        norm: nn.Module,
        table: RopeTable | None,
        selected: SelectedTokens | None,
    ) -> Tensor:
        """
        Attend over one sequence given as chunks (B, n, C) of whole frames, without `proj`.

        Queries and keys are stored in the dtype of the values, to which autocast would cast them.

        :returns: (B, N, C), or only the selected tokens.
        """
        count = sum(chunk.shape[1] for chunk in chunks)
        qkv: Tensor | None = None
        begin = 0
        for chunk in chunks:
            q, k, v = self.project(norm(chunk), table)
            if qkv is None:
                qkv = v.new_empty(3, *v.shape[:2], count, v.shape[-1])
            for target, source in zip(qkv, (q, k, v), strict=True):
                target[:, :, begin : begin + chunk.shape[1]] = source
            begin += chunk.shape[1]
        assert qkv is not None  # a sequence has tokens
        q, k, v = qkv.unbind(0)
        attended = self.attend(q if selected is None else selected.select(q, dim=2), k, v)
        del qkv, q, k, v, target, source  # transpose and flatten may need a copy
        return attended.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context; parameters are named as in MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend: AttentionFunction = fused_attention
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, N, C), context: (B, M, C) → (B, N, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(source, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for source, weight, bias in zip((x, context, context), weights, biases, strict=True)
        )
        attended = self.attend(q, k, v)
        return cast(Tensor, self.out_proj(attended.transpose(1, 2).flatten(2)))


def apply_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` in the dtype of the norm, as CUDA autocast does it and CPU autocast does not."""
    if isinstance(norm, nn.LayerNorm):
        x = x.to(norm.weight.dtype)
    return cast(Tensor, norm(x))
