# SPDX-License-Identifier: Apache-2.0
"""Alternating attention: within each frame, then over all frames of the window, and again.

Takes patch tokens, not images (`patch_embed` makes those, per frame), and keeps only the rounds
that the heads ask for. Frames carry no index: only the first frame's special tokens differ, so
permuting the others permutes the result.

Source: VGGT (arXiv 2503.11651), section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from vggt_ros.model.attention import RopeTable, SelectedTokens, patch_positions, rope_table
from vggt_ros.model.block import Block, draw_normal
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.patch_embed import PatchEncoder

CAMERA = -1  # beside the rounds: what the camera head reads


class Aggregator(nn.Module):
    """Patch tokens of several frames to tokens that know of each other."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, agg = config.embed_dim, config.agg
        # First rounds whose global attention sees one frame at a time; other than 0 only where a
        # network is to be faster than it was trained to be.
        self.frame_only_blocks = 0
        self.special_tokens = 1 + agg.num_register_tokens
        self.head_dim = dim // agg.num_heads
        self.rope_base = agg.rope_freq
        self.patch_embed = PatchEncoder(config)
        # On axis 1: the first frame's, then the one of all other frames.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, agg.num_register_tokens, dim))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(dim, agg.num_heads, agg.mlp_ratio, qk_norm=True) for _ in range(agg.depth)
            )
            for _ in range(2)
        )
        draw_normal(self.camera_token, std=1e-6)
        draw_normal(self.register_token, std=1e-6)
        self._rope_tables: dict[tuple[int, int, torch.device], RopeTable] = {}

    def forward(
        self,
        patch_tokens: Tensor,
        grid: tuple[int, int],
        rounds: Collection[int],
        frames: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """
        Run all rounds.

        :param patch_tokens: (B, S, P, C) of the frames in window order.
        :param grid: (h, w) patches, h·w = P.
        :param rounds: which rounds to keep.
        :param frames: places of the F frames of which they are kept; None: of all, F = S.
        :returns: frame output beside global output: for each of `rounds` (B, F, special + P, 2C),
            and for `CAMERA` the last round's camera tokens of all frames (B, S, 2C).
        """
        batch, count = patch_tokens.shape[:2]
        table = self.rope_table(grid, patch_tokens.device)
        chosen: slice | list[int] = slice(None) if frames is None else list(frames)
        x = torch.cat((self.special(batch, count), patch_tokens), dim=2)
        shape = x.shape
        kept: dict[int, Tensor] = {}
        last = len(self.global_blocks) - 1
        blocks = zip(self.frame_blocks, self.global_blocks, strict=True)
        for index, (frame_block, global_block) in enumerate(blocks):
            within = frame_block(x.reshape(batch * count, -1, shape[-1]), table)
            del x  # a window of hundreds of frames has no memory to spare
            together = batch * count if index < self.frame_only_blocks else batch
            wanted = None
            if index == last and frames is not None and together == batch:
                # nothing comes after it: of other frames, only the camera token is read
                wanted = SelectedTokens(tuple(frames) if last in rounds else (), shape[2])
            x = global_block(within.reshape(together, -1, shape[-1]), table, wanted)
            within = within.reshape(shape)
            if wanted is None:
                x = x.reshape(shape)
                of_frames, cameras = x[:, chosen] if index in rounds else x, x[:, :, 0]
            else:
                of_frames, cameras = wanted.part(x)
            if index in rounds:
                kept[index] = torch.cat((within[:, chosen], of_frames), dim=-1)
        kept[CAMERA] = torch.cat((within[:, :, 0], cameras), dim=-1)
        return kept

    def special(self, batch: int, frames: int) -> Tensor:
        """Camera and register tokens of each frame: (B, S, special, C)."""
        tokens = torch.cat((self.camera_token, self.register_token), dim=2)
        tokens = torch.cat((tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)), dim=1)
        return tokens.expand(batch, -1, -1, -1)

    def rope_table(self, grid: tuple[int, int], device: torch.device) -> RopeTable:
        """The rotation of one frame's tokens, made once per grid and device."""
        key = (*grid, device)
        if key not in self._rope_tables:
            # Made outside inference mode, or training could not use the table afterwards.
            with torch.inference_mode(False), torch.no_grad():
                positions = patch_positions(*grid, self.special_tokens, device)
                self._rope_tables[key] = rope_table(positions, self.head_dim, self.rope_base)
        return self._rope_tables[key]
