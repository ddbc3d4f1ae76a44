# SPDX-License-Identifier: Apache-2.0
"""Attention, 2-D rotary positions, and the two attention modules of the network.

`SelfAttention` (one fused projection) serves the ViT, the aggregator and the camera trunk;
`CrossAttention` (torch's MultiheadAttention layout of weights) serves the tracker. Both hand
q, k, v to a plain function, so that another kernel can be put in with `use_attention`;
`explicit_attention` is the one that all others are tested against.

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


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, written out: the reference for every other attention function."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return cast(Tensor, scores.softmax(dim=-1).to(v.dtype) @ v)


def use_attention(model: nn.Module, attend: AttentionFunction) -> None:
    """Make every attention of `model` run `attend`."""
    for module in model.modules():
        if isinstance(module, (SelfAttention, CrossAttention)):
            module.attend = attend


def patch_positions(h: int, w: int, special: int, device: torch.device) -> Tensor:
    """Integer (y, x) of each token of a frame: (special + h·w, 2).

    Special tokens sit at (0, 0), where the rotation is the identity, hence patches count from 1.
    """
    rows = torch.arange(1, h + 1, device=device)
    columns = torch.arange(1, w + 1, device=device)
    patches = torch.cartesian_prod(rows, columns)
    return torch.cat((patches.new_zeros(special, 2), patches))


def rope_table(positions: Tensor, head_dim: int, base: float) -> RopeTable:
    """Angles position · base^(-2k / (D/2)) for k < D/4, as cosine and sine, always in float32.

    Float32 whatever the autocast: the reference under CUDA autocast rounds the angles to
    bfloat16, which alone shifts outputs by 0.2 to 0.7 % and is an accident of its code.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    # Broadcast product, not einsum or matmul: those would run in bfloat16 under autocast.
    angles = positions.to(torch.float32)[..., None] * base**-exponents
    return angles.cos(), angles.sin()


class Rope(nn.Module):
    """Rotate the first half of the channels by y and the second by x; holds nothing."""

    def forward(self, tokens: Tensor, table: RopeTable) -> Tensor:
        """
        Rotate queries or keys.

        :param tokens: (B, heads, S·T, D), whole frames of T tokens one after the other.
        :param table: of T positions.
        """
        cos, sin = table
        # (B, heads, S, T, axis, member of the pair, frequency)
        pairs = tokens.unflatten(2, (-1, cos.shape[0])).unflatten(-1, (2, 2, -1))
        first, second = pairs.unbind(dim=-2)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
        return rotated.flatten(-3).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class SelectedTokens:
    """Those tokens of a sequence of frames whose result somebody reads; all are attended to."""

    frames: tuple[int, ...]  # places of the frames of which all tokens are wanted
    per_frame: int  # tokens

    def take(self, tokens: Tensor, dim: int) -> Tensor:
        """Give all tokens of these frames, and then the first one of every frame."""
        every = tokens.split(self.per_frame, dim)
        whole = [every[i] for i in self.frames]
        return torch.cat([*whole, *(frame.narrow(dim, 0, 1) for frame in every)], dim)

    def part(self, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Part what `take` gave along axis 1: (B, F, per_frame, C) and (B, S, C)."""
        count = len(self.frames) * self.per_frame
        whole = taken[:, :count].unflatten(1, (len(self.frames), self.per_frame))
        return whole, taken[:, count:]


class SelfAttention(nn.Module):
    """Multi-head self-attention with optional q/k norm; rotates q and k if given a table."""

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
        self, x: Tensor, table: RopeTable | None = None, wanted: SelectedTokens | None = None
    ) -> Tensor:
        """x: (B, N, C) → (B, N, C), or of the tokens that are wanted."""
        q, k, v = self.project(x, table)
        if wanted is not None:
            q = wanted.take(q, dim=2)
        attended = self.attend(q, k, v)
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))

    def project(self, x: Tensor, table: RopeTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) → queries, keys and values, each (B, heads, N, D)."""
        # (B, N, 3, heads, D) → 3 × (B, heads, N, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if table is not None:
            q, k = self.rope(q, table), self.rope(k, table)
        return q, k, v

    def attend_to_parts(
        self,
        parts: Sequence[Tensor],
        norm: nn.Module,
        table: RopeTable | None,
        wanted: SelectedTokens | None,
    ) -> Tensor:
        """
        Run on the parts (B, n, C) of one sequence, of whole frames, before `proj`.

        The result is (B, N, C), or of the tokens that are wanted.

        Queries and keys are kept in the type of the values, to which autocast would bring them.
        """
        count = sum(part.shape[1] for part in parts)
        whole: Tensor | None = None
        begin = 0
        for part in parts:
            q, k, v = self.project(norm(part), table)
            if whole is None:
                whole = v.new_empty(3, *v.shape[:2], count, v.shape[-1])
            for into, each in zip(whole, (q, k, v), strict=True):
                into[:, :, begin : begin + part.shape[1]] = each
            begin += part.shape[1]
        assert whole is not None  # a sequence has tokens
        q, k, v = whole.unbind(0)
        attended = self.attend(q if wanted is None else wanted.take(q, dim=2), k, v)
        del whole, q, k, v, into, each  # before what follows may need a copy
        return attended.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context (which may be x), keys as MultiheadAttention's."""

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


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` in the norm's own precision, as CUDA autocast has it; CPU autocast has not."""
    if isinstance(norm, nn.LayerNorm):
        x = x.to(norm.weight.dtype)
    return cast(Tensor, norm(x))
