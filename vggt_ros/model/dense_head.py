# SPDX-License-Identifier: Apache-2.0
"""Dense heads: patch tokens of four rounds to one value map per frame (a DPT decoder).

`DenseDecoder` fuses the rounds from coarse to fine; `DenseHead` turns its map into depth or
points with a confidence. The track head uses the bare decoder for its features. Frames are
independent here: any subset may be passed, and they are decoded a few at a time to save memory.

Source: Vision Transformers for Dense Prediction (arXiv 2103.13413); VGGT, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_ros.model.config import VGGTConfig

FRAMES_AT_ONCE = 8  # that are decoded together; fewer take less memory
CODE_BASE = 100.0
CODE_STRENGTH = 0.1

Size = tuple[int, int]  # height, width


class ResidualUnit(nn.Module):
    """Two convolutions around a rectified skip."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, h, w) → the same. The skip is relu(x), not x: the weights were trained so."""
        x = x.relu()
        return cast(Tensor, x + self.conv2(self.conv1(x).relu()))


class Fusion(nn.Module):
    """Add a finer level to the path, refine, enlarge."""

    def __init__(self, features: int, has_side: bool) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualUnit(features) if has_side else None
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, path: Tensor, size: Size, side: Tensor | None = None) -> Tensor:
        """(N, F, h, w) and a side input of that shape → (N, F, *size)."""
        if self.resConfUnit1 is not None and side is not None:
            path = path + self.resConfUnit1(side)
        # A 1×1 convolution commutes with the resize, and costs a quarter before it.
        return interpolate_features(self.out_conv(self.resConfUnit2(path)), size)


class Scratch(nn.Module):
    """The decoder's layers after the projections; grouped (and named) as the checkpoints do."""

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
            Fusion(features, has_side) for has_side in (True, True, True, False)
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
        path = self.refinenet4(coarsest, size_of(coarse))
        path = self.refinenet3(path, size_of(middle), coarse)
        path = self.refinenet2(path, size_of(fine), middle)
        height, width = size_of(fine)
        path = self.refinenet1(path, (2 * height, 2 * width), fine)
        return cast(Tensor, self.output_conv1(path))


class DenseDecoder(nn.Module):
    """Patch tokens of four rounds to a feature map of a given size."""

    def __init__(
        self,
        config: VGGTConfig,
        features: int,
        channels: Sequence[int],
        *,
        out_features: int,
        outputs: int | None,
        coded: bool,
    ) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.patch_size = config.patch_size
        self.coded = coded
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
        self._codes: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def decode(self, levels: Sequence[Tensor], image_size: Size, out_size: Size) -> Tensor:
        """
        Fuse the rounds into one map.

        :param levels: four (N, P, 2C), patch tokens of the rounds, early to late.
        :param image_size: of the images that the tokens stand for, in pixels.
        :returns: (N, out_features, *out_size).
        """
        grid = image_size[0] // self.patch_size, image_size[1] // self.patch_size
        maps = []
        layers = zip(levels, self.projects, self.resize_layers, strict=True)
        for tokens, project, resize_layer in layers:
            level = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            maps.append(resize_layer(self.add_code(level, image_size)))
        return self.add_code(interpolate_features(self.scratch(maps), out_size), image_size)

    def add_code(self, features: Tensor, image_size: Size) -> Tensor:
        """Add the position code to (N, F, h, w), in place, if this decoder has one."""
        if self.coded:
            x_code, y_code = self.code(features, image_size)
            half = features.shape[1] // 2
            # In place and one axis at a time: the map is the largest tensor of the network,
            # and no operation before or after needs its old values.
            features[:, :half] += x_code
            features[:, half:] += y_code
        return features

    def code(self, features: Tensor, image_size: Size) -> tuple[Tensor, Tensor]:
        """Codes of both axes for a map (N, F, h, w): (F/2, 1, w) and (F/2, h, 1)."""
        channels, height, width = features.shape[1:]
        key = (channels, height, width, image_size, features.device, features.dtype)
        if key not in self._codes:
            # Made outside inference mode, or training could not use the code afterwards.
            with torch.inference_mode(False), torch.no_grad():
                diagonal = (image_size[0] ** 2 + image_size[1] ** 2) ** 0.5
                x_code = axis_code(width, image_size[1] / diagonal, channels // 2)
                y_code = axis_code(height, image_size[0] / diagonal, channels // 2)
                self._codes[key] = x_code[:, None, :].to(features), y_code[:, :, None].to(features)
        return self._codes[key]


class DenseHead(DenseDecoder):
    """Depth or points of each pixel, and how far to trust them."""

    def __init__(
        self, config: VGGTConfig, values: int, activate: Callable[[Tensor], Tensor]
    ) -> None:
        """
        Build a decoder with an output per pixel.

        :param values: numbers per pixel, without the confidence.
        :param activate: what makes values of the raw output.
        """
        features = config.dpt.features
        super().__init__(
            config,
            features,
            config.dpt.out_channels,
            out_features=features // 2,
            outputs=values + 1,
            coded=True,
        )
        self.activate = activate
        self.frames_at_once = FRAMES_AT_ONCE

    def forward(self, levels: Sequence[Tensor], image_size: Size) -> tuple[Tensor, Tensor]:
        """
        Decode frames, each by itself.

        :param levels: four (B, S, P, 2C), of all frames or of some.
        :returns: values (B, S, H, W, V) and confidence (B, S, H, W), at least 1.
        """
        raw = by_frames(lambda part: self.raw(part, image_size), levels, self.frames_at_once)
        raw = raw.movedim(2, -1)
        return self.activate(raw[..., :-1]), 1 + raw[..., -1].exp()

    def raw(self, levels: Sequence[Tensor], image_size: Size) -> Tensor:
        """Four (N, P, 2C) → (N, V + 1, H, W)."""
        return cast(Tensor, self.scratch.output_conv2(self.decode(levels, image_size, image_size)))


def lay_channels_last(model: nn.Module) -> None:
    """
    Lay out the weights of all decoders as what they meet: channels last.

    Tokens are so by nature, and torch's operations keep it; weights that are not would be turned
    at every use.
    """
    for module in model.modules():
        if isinstance(module, DenseDecoder):
            module.to(memory_format=torch.channels_last)


def by_frames(
    decode: Callable[[list[Tensor]], Tensor],
    levels: Sequence[Tensor],
    at_once: int = FRAMES_AT_ONCE,
) -> Tensor:
    """Run `decode`, (N, …) → (N, …), on the frames of (B, S, …), a few at a time."""
    batch_and_frames = levels[0].shape[:2]
    parts = zip(*(level.flatten(0, 1).split(at_once) for level in levels), strict=True)
    joined: Tensor = torch.cat([decode(list(part)) for part in parts])
    decoded: Tensor = joined.unflatten(0, batch_and_frames)
    return decoded


def positive(raw: Tensor) -> Tensor:
    """Any number to a depth above 0."""
    return raw.exp()


def signed_growth(raw: Tensor) -> Tensor:
    """Any number to a coordinate: linear near 0, exponential far away."""
    return raw.sign() * raw.abs().expm1()


def axis_code(count: int, extent: float, channels: int) -> Tensor:
    """Sines, then cosines, of `count` places on one axis: (channels, count), float64.

    :param extent: half the side of the image, in half diagonals.
    """
    end = extent * (count - 1) / count
    places = torch.linspace(-end, end, count, dtype=torch.float64)
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = CODE_BASE ** -exponents[:, None] * places
    return CODE_STRENGTH * torch.cat((angles.sin(), angles.cos()))


def interpolate_features(features: Tensor, size: Size) -> Tensor:
    """Bilinear, corner pixels on corner pixels."""
    return functional.interpolate(features, size=size, mode='bilinear', align_corners=True)


def size_of(features: Tensor) -> Size:
    """Height and width of (N, F, h, w)."""
    return features.shape[-2], features.shape[-1]
