# SPDX-License-Identifier: Apache-2.0
"""The per-frame encoder: a ViT with registers, as in DINOv2, from images to patch tokens.

Frames are independent here, so a frame that is part of several windows is encoded only once.
Class and register tokens are used inside and dropped at the end.

Source: DINOv2 (arXiv 2304.07193), Vision Transformers Need Registers (arXiv 2309.16588).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_ros.model.block import Block, init_normal
from vggt_ros.model.config import VGGTConfig

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
NUM_REGISTERS = 4
LAYER_NORM_EPS = 1e-6  # of this encoder only; the rest of the network has 1e-5


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, h·w, C), row by row."""
        return cast(Tensor, self.proj(images).flatten(2).transpose(1, 2))


class VisionTransformer(nn.Module):
    """Images in [0, 1] to normalised patch tokens."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, vit = config.embed_dim, config.vit
        self.patch_size = config.patch_size
        self.grid_size = config.img_size // config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid_size**2, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, NUM_REGISTERS, dim))
        # In every checkpoint, never used: a remnant of the encoder's own pre-training.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, vit.num_heads, vit.mlp_ratio, eps=LAYER_NORM_EPS, layer_scale=1.0)
            for _ in range(vit.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        # Interpolated positional encodings by patch grid, with the identity and version of the
        # weights that they were computed from; see `VGGT.clear_tables`.
        self.tables: dict[tuple[int, int], tuple[tuple[int, int], Tensor]] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_normal(self.cls_token, std=1e-6)
        init_normal(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """
        Encode frames independently.

        :param images: (N, 3, H, W), RGB in [0, 1].
        :returns: (N, P, C) patch tokens after the final norm.
        """
        h, w = (side // self.patch_size for side in images.shape[-2:])
        patches = self.patch_embed(normalise_colours(images))
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        tokens = tokens + self.pos_encoding(h, w).to(tokens.dtype)
        registers = self.register_tokens.expand(len(images), -1, -1)
        tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return cast(Tensor, self.norm(tokens[:, 1 + NUM_REGISTERS :]))

    def pos_encoding(self, h: int, w: int) -> Tensor:
        """The positional encoding for h × w patches: (1, 1 + h·w, C), class token first."""
        if h == w == self.grid_size:
            return self.pos_embed
        if torch.is_grad_enabled():
            return self.interpolate_pos_encoding(h, w)
        weights = self.pos_embed.data_ptr(), self.pos_embed._version
        computed_from, encoding = self.tables.get((h, w), (None, self.pos_embed))
        if computed_from != weights:
            encoding = self.interpolate_pos_encoding(h, w)
            self.tables[h, w] = weights, encoding
        return encoding

    def interpolate_pos_encoding(self, h: int, w: int) -> Tensor:
        """Interpolate the learned positional encoding: (1, 1 + h·w, C)."""
        encoding = self.pos_embed.float()
        grid = encoding[:, 1:].unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        grid = functional.interpolate(
            grid, size=(h, w), mode='bicubic', align_corners=False, antialias=True
        )
        return torch.cat((encoding[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)


def normalise_colours(images: Tensor) -> Tensor:
    """Normalise (N, 3, H, W) in [0, 1] by the mean and standard deviation of ImageNet."""
    # Numbers instead of tensors: no buffer to move, and no copy that waits for the device.
    channels = zip(images.unbind(dim=1), IMAGE_MEAN, IMAGE_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
