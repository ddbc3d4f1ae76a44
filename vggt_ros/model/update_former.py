# SPDX-License-Identifier: Apache-2.0
"""The transformer that updates tracks: attention over time, and over points by virtual tracks.

Points do not attend to each other directly but through a few learned virtual tracks, so that the
cost is linear in the number of points. The residual of these blocks starts from the *normalised*
input, unlike that of `block.Block`.

Source: CoTracker2 (arXiv 2307.07635), section 3.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from vggt_ros.model.attention import CrossAttention
from vggt_ros.model.block import Mlp, init_normal
from vggt_ros.model.config import TrackConfig

MLP_RATIO = 4


class SelfAttentionBlock(nn.Module):
    """y = norm x; y + attention(y); + mlp(norm y)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, M, C) → (N, M, C)."""
        x = self.norm1(x)
        x = x + self.attn(x, x)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """The same with keys and values from a context."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(N, M, C) and (N, L, C) → (N, M, C)."""
        x = self.norm1(x)
        x = x + self.cross_attn(x, self.norm_context(context))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class UpdateFormer(nn.Module):
    """Track tokens to updates of coordinates (2) and of features (D)."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        dim, heads, width = config.hidden_size, config.num_heads, 3 * config.features + 4
        self.input_norm = nn.LayerNorm(width)
        self.input_transform = nn.Linear(width, dim)
        self.output_norm = nn.LayerNorm(dim)
        self.flow_head = nn.Linear(dim, config.features + 2)
        # Misspelt in the checkpoints.
        self.virual_tracks = nn.Parameter(torch.empty(1, config.num_virtual_tracks, 1, dim))
        depth = range(config.depth)
        self.time_blocks = nn.ModuleList(SelfAttentionBlock(dim, heads) for _ in depth)
        self.space_virtual_blocks = nn.ModuleList(SelfAttentionBlock(dim, heads) for _ in depth)
        self.space_point2virtual_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, heads) for _ in depth
        )
        self.space_virtual2point_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, heads) for _ in depth
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)
        init_normal(self.virual_tracks, std=1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, K, S, 3D + 4) → (B, K, S, 2 + D)."""
        batch, points, frames = tokens.shape[:3]
        embedded = self.input_transform(self.input_norm(tokens))
        virtual = self.virual_tracks.expand(batch, -1, frames, -1)
        x = torch.cat((embedded, virtual), dim=1)
        layers = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            strict=True,
        )
        for time_block, virtual2point, virtual_block, point2virtual in layers:
            x = time_block(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            x = x.transpose(1, 2).flatten(0, 1)  # (B·S, K + V, C)
            real, virtual = x[:, :points], x[:, points:]
            virtual = virtual_block(virtual2point(virtual, real))
            real = point2virtual(real, virtual)
            x = torch.cat((real, virtual), dim=1).unflatten(0, (batch, frames)).transpose(1, 2)
        return cast(Tensor, self.flow_head(self.output_norm(x[:, :points] + embedded)))
