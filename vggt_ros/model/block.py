# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block that the ViT, the aggregator and the camera trunk share.

The tracker's blocks differ (their residual starts from the normalised input) and live with it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vggt_ros.model.attention import RopeTable, SelectedTokens, SelfAttention

# Without gradients, longer inputs are taken in parts, so that only what attention needs at once is
# kept of all tokens: 12 bytes a channel in bfloat16 instead of 36.
MANY_TOKENS = 16384
PART = 4096  # tokens


def draw_normal(parameter: nn.Parameter, std: float) -> None:
    """Initialise a token."""
    # On the meta device there is nothing to draw, but torch would import its compiler to do so,
    # which takes seconds.
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=std)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., out)."""
        return cast(Tensor, self.fc2(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim); float32 γ keeps the residual stream float32 in autocast."""
        return x * self.gamma


class Block(nn.Module):
    """x + γ₁ attention(norm x), then x + γ₂ mlp(norm x)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        *,
        eps: float = 1e-5,
        qk_norm: bool = False,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        # In training: compute it again in the backward pass instead of keeping what it needs.
        self.recompute = False
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Tensor, table: RopeTable | None = None, wanted: SelectedTokens | None = None
    ) -> Tensor:
        """
        (B, N, dim) → (B, N, dim).

        :param wanted: tokens to compute; None: all.
        """
        if self.recompute and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return cast(Tensor, checkpoint(self._run, x, table, wanted, use_reentrant=False))
        if x.shape[0] * x.shape[1] > MANY_TOKENS and not torch.is_grad_enabled():
            return self._run_in_parts(x, table, wanted)
        return self._run(x, table, wanted)

    def _run(self, x: Tensor, table: RopeTable | None, wanted: SelectedTokens | None) -> Tensor:
        attended = self.attn(self.norm1(x), table, wanted)
        if wanted is not None:
            x = wanted.take(x, dim=1)
        x = x + self.ls1(attended)
        return cast(Tensor, x + self.ls2(self.mlp(self.norm2(x))))

    def _run_in_parts(
        self, x: Tensor, table: RopeTable | None, wanted: SelectedTokens | None
    ) -> Tensor:
        """Do the same with less memory: a few sequences at a time, or parts of one."""
        sequences, tokens = x.shape[:2]
        if sequences > 1:
            many = max(PART // tokens, 1)
            out = torch.empty_like(x if wanted is None else wanted.take(x, dim=1))
            for part, into in zip(x.split(many), out.split(many), strict=True):
                into.copy_(self.forward(part, table, wanted))
            return out
        # whole frames, since the rotation of one is that of all
        frame = 1 if table is None else len(table[0])
        many = max(PART // frame, 1) * frame
        attended = self.attn.attend_to_parts(x.split(many, dim=1), self.norm1, table, wanted)
        if wanted is not None:
            x = wanted.take(x, dim=1)
        out = torch.empty_like(x)
        pieces = zip(*(each.split(many, dim=1) for each in (x, attended, out)), strict=True)
        for part, answer, into in pieces:
            part = part + self.ls1(self.attn.proj(answer))
            into.copy_(part + self.ls2(self.mlp(self.norm2(part))))
        return out
