# SPDX-License-Identifier: Apache-2.0
"""DPT heads: patch tokens of four layers to one dense map per frame.

`DPTDecoder` fuses the layers from coarse to fine; `DPTHead` turns its features into depth or
points with a confidence, and the track head uses the bare decoder as feature extractor. Frames are
independent here: any subset may be passed, and they are decoded in chunks to save memory.

Source: Vision Transformers for Dense Prediction (arXiv 2103.13413); VGGT, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_ros.model.config import VGGTConfig

FRAMES_CHUNK_SIZE = 8  # frames decoded together; fewer take less memory
POS_EMBED_BASE = 100.0
POS_EMBED_SCALE = 0.1

Size = tuple[int, int]  # height, width


class ResidualConvUnit(nn.Module):
    """Two convolutions with a rectified skip connection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, h, w) → the same. The skip is relu(x), not x: the weights were trained so."""
        x = x.relu()
        return cast(Tensor, x + self.conv2(self.conv1(x).relu()))


class FeatureFusionBlock(nn.Module):
    """Adds the next finer level, refines and upsamples."""

    def __init__(self, features: int, has_skip: bool) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualConvUnit(features) if has_skip else None
        self.resConfUnit2 = ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, size: Size, skip: Tensor | None = None) -> Tensor:
        """(N, F, h, w) and a skip input of the same shape → (N, F, *size)."""
        if self.resConfUnit1 is not None and skip is not None:
            x = x + self.resConfUnit1(skip)
        # A 1×1 convolution commutes with the resize, and costs a quarter before it.
        return interpolate_features(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """The decoder's layers after the projections; grouped (and named) as in the checkpoints."""

    def __init__(
        self,
        features: int,
        channels: Sequence[int],
        out_features: int,
        outputs: int | None,
    ) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels
        )
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (
            FeatureFusionBlock(features, has_skip) for has_skip in (True, True, True, False)
        )
        self.output_conv1 = nn.Conv2d(features, out_features, 3, padding=1)
        if outputs is not None:
            self.output_conv2 = nn.Sequential(
                nn.Conv2d(out_features, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1)
            )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Four maps, fine to coarse → (N, out_features, 2·height, 2·width of the finest)."""
        layers = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        fine, middle, coarse, coarsest = (
            layer(level) for layer, level in zip(layers, levels, strict=True)
        )
        x = self.refinenet4(coarsest, spatial_size(coarse))
        x = self.refinenet3(x, spatial_size(middle), coarse)
        x = self.refinenet2(x, spatial_size(fine), middle)
        height, width = spatial_size(fine)
        x = self.refinenet1(x, (2 * height, 2 * width), fine)
        return cast(Tensor, self.output_conv1(x))


class DPTDecoder(nn.Module):
    """Patch tokens of four layers to a feature map of a given size."""

    def __init__(
        self,
        config: VGGTConfig,
        features: int,
        channels: Sequence[int],
        *,
        out_features: int,
        outputs: int | None,
        use_pos_embed: bool,
    ) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.patch_size = config.patch_size
        self.use_pos_embed = use_pos_embed
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = Scratch(features, channels, out_features, outputs)
        # Positional embeddings by shape, device and dtype; see `VGGT.clear_tables`.
        self.tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def decode(self, layer_tokens: Sequence[Tensor], image_size: Size, out_size: Size) -> Tensor:
        """
        Fuse the layers into one map.

        :param layer_tokens: four (N, P, 2C), patch tokens of the layers, first to last.
        :param image_size: of the encoded images, pixels.
        :returns: (N, out_features, *out_size).
        """
        grid = image_size[0] // self.patch_size, image_size[1] // self.patch_size
        levels = []
        layers = zip(layer_tokens, self.projects, self.resize_layers, strict=True)
        for tokens, project, resize_layer in layers:
            features = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            levels.append(resize_layer(self.add_pos_embed(features, image_size)))
        features = interpolate_features(self.scratch(levels), out_size)
        return self.add_pos_embed(features, image_size)

    def add_pos_embed(self, features: Tensor, image_size: Size) -> Tensor:
        """Add the positional embedding to (N, F, h, w), in place, if this decoder has one."""
        if self.use_pos_embed:
            x_embed, y_embed = self.axis_pos_embeds(features, image_size)
            half = features.shape[1] // 2
            # In place and one axis at a time: the map is the largest tensor of the network,
            # and no operation before or after needs its old values.
            features[:, :half] += x_embed
            features[:, half:] += y_embed
        return features

    def axis_pos_embeds(self, features: Tensor, image_size: Size) -> tuple[Tensor, Tensor]:
        """Embeddings of both axes for a map (N, F, h, w): (F/2, 1, w) and (F/2, h, 1)."""
        channels, height, width = features.shape[1:]
        key = (channels, height, width, image_size, features.device, features.dtype)
        if key not in self.tables:
            # Computed outside inference mode, or training could not use them afterwards.
            with torch.inference_mode(False), torch.no_grad():
                diagonal = (image_size[0] ** 2 + image_size[1] ** 2) ** 0.5
                x_embed = sincos_embedding_1d(width, image_size[1] / diagonal, channels // 2)
                y_embed = sincos_embedding_1d(height, image_size[0] / diagonal, channels // 2)
                self.tables[key] = (
                    x_embed[:, None, :].to(features),
                    y_embed[:, :, None].to(features),
                )
        return self.tables[key]


class DPTHead(DPTDecoder):
    """Depth or points of each pixel, with a confidence."""

    def __init__(
        self, config: VGGTConfig, values: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        """
        Build a decoder with an output per pixel.

        :param values: numbers per pixel, without the confidence.
        :param activation: applied to the raw values.
        """
        features = config.dpt.features
        super().__init__(
            config,
            features,
            config.dpt.out_channels,
            out_features=features // 2,
            outputs=values + 1,
            use_pos_embed=True,
        )
        self.activation = activation
        self.frames_chunk_size = FRAMES_CHUNK_SIZE

    def forward(self, layer_tokens: Sequence[Tensor], image_size: Size) -> tuple[Tensor, Tensor]:
        """
        Decode frames independently.

        :param layer_tokens: four (B, S, P, 2C), of all frames or of some.
        :returns: values (B, S, H, W, V) and confidence (B, S, H, W), at least 1.
        """
        raw = decode_in_chunks(
            lambda chunk: self.decode_raw(chunk, image_size), layer_tokens, self.frames_chunk_size
        )
        raw = raw.movedim(2, -1)
        return self.activation(raw[..., :-1]), 1 + raw[..., -1].exp()

    def decode_raw(self, layer_tokens: Sequence[Tensor], image_size: Size) -> Tensor:
        """Four (N, P, 2C) → (N, V + 1, H, W), before the activations."""
        features = self.decode(layer_tokens, image_size, image_size)
        return cast(Tensor, self.scratch.output_conv2(features))


def use_channels_last(model: nn.Module) -> None:
    """
    Store the convolution weights of all DPT decoders in the channels-last memory format.

    Token maps have it already, and torch's operations preserve it; weights in another format would
    be converted at every use.
    """
    for module in model.modules():
        if isinstance(module, DPTDecoder):
            module.to(memory_format=torch.channels_last)


def decode_in_chunks(
    decode: Callable[[list[Tensor]], Tensor],
    layer_tokens: Sequence[Tensor],
    frames_chunk_size: int = FRAMES_CHUNK_SIZE,
) -> Tensor:
    """Run `decode`, (N, …) → (N, …), on the frames of (B, S, …), a few at a time."""
    batch_and_frames = layer_tokens[0].shape[:2]
    chunks = zip(
        *(tokens.flatten(0, 1).split(frames_chunk_size) for tokens in layer_tokens), strict=True
    )
    joined: Tensor = torch.cat([decode(list(chunk)) for chunk in chunks])
    decoded: Tensor = joined.unflatten(0, batch_and_frames)
    return decoded


def inverse_log(raw: Tensor) -> Tensor:
    """sign(x)·(exp|x| − 1), the inverse of a signed logarithm: linear near 0, exponential far."""
    return raw.sign() * raw.abs().expm1()


def sincos_embedding_1d(count: int, extent: float, channels: int) -> Tensor:
    """Sines, then cosines, of `count` positions on one axis: (channels, count), float64.

    :param extent: half the side of the image, in half diagonals.
    """
    end = extent * (count - 1) / count
    positions = torch.linspace(-end, end, count, dtype=torch.float64)
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = POS_EMBED_BASE ** -exponents[:, None] * positions
    return POS_EMBED_SCALE * torch.cat((angles.sin(), angles.cos()))


def interpolate_features(features: Tensor, size: Size) -> Tensor:
    """Resize bilinearly, with corner pixels aligned."""
    return functional.interpolate(features, size=size, mode='bilinear', align_corners=True)


def spatial_size(features: Tensor) -> Size:
    """Height and width of (N, F, h, w)."""
    return features.shape[-2], features.shape[-1]
