# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block that the ViT, the aggregator and the camera trunk share.

The tracker's blocks differ (their residual starts from the normalised input), see `update_former`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vggt_ros.model.attention import RopeTable, SelectedTokens, SelfAttention

# Without gradients, longer inputs are processed in chunks, so that only queries, keys, values and
# output exist for all tokens at once: 12 bytes a channel in bfloat16 instead of 36.
CHUNK_THRESHOLD = 16384  # tokens
CHUNK_TOKENS = 4096


def init_normal(parameter: nn.Parameter, std: float) -> None:
    """Initialise a parameter from a normal distribution."""
    # On the meta device this has no effect, but makes torch import its compiler, which takes
    # seconds.
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=std)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., out)."""
        return cast(Tensor, self.fc2(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned scale per channel of a residual branch."""

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
        self.gradient_checkpointing = False  # recompute activations in the backward pass
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self, x: Tensor, table: RopeTable | None = None, selected: SelectedTokens | None = None
    ) -> Tensor:
        """
        (B, N, dim) → (B, N, dim).

        :param selected: the tokens to compute; None: all.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return cast(Tensor, checkpoint(self._forward, x, table, selected, use_reentrant=False))
        if x.shape[0] * x.shape[1] > CHUNK_THRESHOLD and not torch.is_grad_enabled():
            return self._forward_in_chunks(x, table, selected)
        return self._forward(x, table, selected)

    def _forward(
        self, x: Tensor, table: RopeTable | None, selected: SelectedTokens | None
    ) -> Tensor:
        attended = self.attn(self.norm1(x), table, selected)
        if selected is not None:
            x = selected.select(x, dim=1)
        x = x + self.ls1(attended)
        return cast(Tensor, x + self.ls2(self.mlp(self.norm2(x))))

    def _forward_in_chunks(
        self, x: Tensor, table: RopeTable | None, selected: SelectedTokens | None
    ) -> Tensor:
        """Do the same with less memory: a few sequences, or a part of one, at a time."""
        sequences, tokens = x.shape[:2]
        if sequences > 1:
            size = max(CHUNK_TOKENS // tokens, 1)
            out = torch.empty_like(x if selected is None else selected.select(x, dim=1))
            for chunk, target in zip(x.split(size), out.split(size), strict=True):
                target.copy_(self.forward(chunk, table, selected))
            return out
        # Whole frames, since all frames share one rotary table.
        frame = 1 if table is None else len(table[0])
        size = max(CHUNK_TOKENS // frame, 1) * frame
        attended = self.attn.attend_in_chunks(x.split(size, dim=1), self.norm1, table, selected)
        if selected is not None:
            x = selected.select(x, dim=1)
        out = torch.empty_like(x)
        chunks = zip(*(tensor.split(size, dim=1) for tensor in (x, attended, out)), strict=True)
        for chunk, attention, target in chunks:
            chunk = chunk + self.ls1(self.attn.proj(attention))
            target.copy_(chunk + self.ls2(self.mlp(self.norm2(chunk))))
        return out
