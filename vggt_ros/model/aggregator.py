# SPDX-License-Identifier: Apache-2.0
"""Alternating attention: each layer attends within every frame, then over the whole window.

Takes patch tokens (see `vit`, which encodes frames one by one) and returns the tokens of the
layers that the heads read. Frames have no positional encoding: only the camera and register tokens
of the first frame differ, so permuting the other frames permutes the result.

Source: VGGT (arXiv 2503.11651), section 3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from vggt_ros.model.attention import RopeTable, SelectedTokens, patch_positions, rope_table
from vggt_ros.model.block import Block, init_normal
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.vit import VisionTransformer

CAMERA_TOKENS = -1  # key, among the layer indices, of the last layer's camera tokens


class Aggregator(nn.Module):
    """Alternating frame attention and global attention over patch, camera and register tokens."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, agg = config.embed_dim, config.agg
        # In the first layers, global attention sees one frame at a time; other than 0 only to run
        # a network faster than it was trained to be.
        self.frame_only_blocks = 0
        self.num_special_tokens = 1 + agg.num_register_tokens  # per frame: camera and registers
        self.head_dim = dim // agg.num_heads
        self.rope_base = agg.rope_freq
        self.patch_embed = VisionTransformer(config)
        # Axis 1: the first frame's token, then that of all other frames.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, agg.num_register_tokens, dim))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(dim, agg.num_heads, agg.mlp_ratio, qk_norm=True) for _ in range(agg.depth)
            )
            for _ in range(2)
        )
        init_normal(self.camera_token, std=1e-6)
        init_normal(self.register_token, std=1e-6)
        # Rotary tables by patch grid and device; see `VGGT.clear_tables`.
        self.tables: dict[tuple[int, int, torch.device], RopeTable] = {}

    def forward(
        self,
        patch_tokens: Tensor,
        grid: tuple[int, int],
        layers: Collection[int],
        frames: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """
        Run all layers.

        :param patch_tokens: (B, S, P, C) of the frames in window order.
        :param grid: (h, w) patches, h·w = P.
        :param layers: indices of the layers to return.
        :param frames: indices of the F frames to return; None: all, F = S.
        :returns: frame output concatenated with global output: for each of `layers`
            (B, F, special + P, 2C), and for `CAMERA_TOKENS` the last layer's camera tokens of all
            frames (B, S, 2C).
        """
        batch, count = patch_tokens.shape[:2]
        table = self.rope_table(grid, patch_tokens.device)
        returned: slice | list[int] = slice(None) if frames is None else list(frames)
        x = torch.cat((self.special_tokens(batch, count), patch_tokens), dim=2)
        shape = x.shape
        outputs: dict[int, Tensor] = {}
        last = len(self.global_blocks) - 1
        blocks = zip(self.frame_blocks, self.global_blocks, strict=True)
        for index, (frame_block, global_block) in enumerate(blocks):
            frame_output = frame_block(x.reshape(batch * count, -1, shape[-1]), table)
            del x  # a window of hundreds of frames has no memory to spare
            sequences = batch * count if index < self.frame_only_blocks else batch
            selected = None
            if index == last and frames is not None and sequences == batch:
                # No layer follows: of the other frames, only the camera token is read.
                selected = SelectedTokens(tuple(frames) if last in layers else (), shape[2])
            x = global_block(frame_output.reshape(sequences, -1, shape[-1]), table, selected)
            frame_output = frame_output.reshape(shape)
            if selected is None:
                x = x.reshape(shape)
                global_output, cameras = x[:, returned] if index in layers else x, x[:, :, 0]
            else:
                global_output, cameras = selected.split(x)
            if index in layers:
                outputs[index] = torch.cat((frame_output[:, returned], global_output), dim=-1)
        outputs[CAMERA_TOKENS] = torch.cat((frame_output[:, :, 0], cameras), dim=-1)
        return outputs

    def special_tokens(self, batch: int, frames: int) -> Tensor:
        """Camera and register tokens of each frame: (B, S, special, C)."""
        tokens = torch.cat((self.camera_token, self.register_token), dim=2)
        tokens = torch.cat((tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)), dim=1)
        return tokens.expand(batch, -1, -1, -1)

    def rope_table(self, grid: tuple[int, int], device: torch.device) -> RopeTable:
        """Rotary table of one frame's tokens, computed once per grid and device."""
        key = (*grid, device)
        if key not in self.tables:
            # Computed outside inference mode, or training could not use the table afterwards.
            with torch.inference_mode(False), torch.no_grad():
                positions = patch_positions(*grid, self.num_special_tokens, device)
                self.tables[key] = rope_table(positions, self.head_dim, self.rope_base)
        return self.tables[key]
