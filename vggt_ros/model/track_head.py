# SPDX-License-Identifier: Apache-2.0
"""Track head: follow points of any frame through the window.

Points start at their query in every frame; each iteration compares the point's feature with the
feature maps around its present place and lets `UpdateTransformer` move it. No order in time is
used, so frames may come in any order. The published network was trained with queries in frame 0,
whose tokens the aggregator marks; another query frame is the same arithmetic on other features.

Source: CoTracker2 (arXiv 2307.07635), VGGSfM (arXiv 2312.04563), VGGT section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_ros.model.block import Mlp, draw_normal
from vggt_ros.model.config import TrackConfig, VGGTConfig
from vggt_ros.model.dense_head import DenseDecoder, Size, by_frames, size_of
from vggt_ros.model.tracker import UpdateTransformer

SINE_BASE = 10000.0
FLOW_CODE_SPAN = 1000.0  # radians per feature pixel at the highest frequency


class TrackFeatures(DenseDecoder):
    """One feature map per frame, `stride` times smaller than the image."""

    def __init__(self, config: VGGTConfig) -> None:
        track = config.track
        super().__init__(
            config,
            track.features,
            track.out_channels,
            out_features=track.features,
            outputs=None,
            coded=track.pos_embed,
        )
        self.stride = track.stride

    def forward(self, levels: Sequence[Tensor], image_size: Size) -> Tensor:
        """Four (B, S, P, 2C) → (B, S, D, H/stride, W/stride)."""
        out_size = image_size[0] // self.stride, image_size[1] // self.stride
        return by_frames(lambda part: self.decode(part, image_size, out_size), levels)


class TrackHead(nn.Module):
    """Features and tracker."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.feature_extractor = TrackFeatures(config)
        self.tracker = Tracker(config.track)

    @property
    def trained(self) -> bool:
        """Whether it ever was: the biases of its transformer are zero until then."""
        return bool(self.tracker.updateformer.flow_head.bias.any())

    def forward(
        self,
        levels: Sequence[Tensor],
        image_size: Size,
        query_points: Tensor,
        query_frames: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """
        Follow the queries.

        :param levels: four (B, S, P, 2C) of all frames.
        :param query_points: (B, K, 2) as (x, y) in pixels of their frames.
        :param query_frames: (B, K) int64, the frame of each query, 0 to S - 1; None: all 0.
        :returns: tracks (B, S, K, 2) in pixels after each iteration, the last is the best;
            visibility and confidence (B, S, K) in [0, 1].
        """
        tracks, visibility, confidence = self.tracker(
            self.feature_extractor(levels, image_size), query_points, query_frames
        )
        return tracks, visibility, confidence


class Tracker(nn.Module):
    """Iterative refinement of point positions by correlation."""

    def __init__(self, config: TrackConfig) -> None:
        super().__init__()
        dim = config.features
        self.config = config
        self.corr_mlp = Mlp(
            config.corr_levels * (2 * config.corr_radius + 1) ** 2, config.hidden_size, dim
        )
        self.updateformer = UpdateTransformer(config)
        # Entry 0 marks the tokens of the query frame, entry 1 all others.
        self.query_ref_token = nn.Parameter(torch.empty(1, 2, 3 * dim + 4))
        draw_normal(self.query_ref_token, std=1.0)
        self.fmap_norm = nn.LayerNorm(dim)
        self.ffeat_norm = nn.GroupNorm(1, dim)
        self.ffeat_updater = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(dim, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(dim, 1))

    def forward(
        self, feature_maps: Tensor, query_points: Tensor, query_frames: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """
        Follow the queries in given features.

        :param feature_maps: (B, S, D, h, w).
        :param query_points: (B, K, 2) in image pixels of their frames.
        :param query_frames: (B, K), see `TrackHead.forward`.
        :returns: as `TrackHead.forward`.
        """
        maps = self.fmap_norm(feature_maps.movedim(2, -1)).movedim(-1, 2)
        frames = maps.shape[1]
        query = query_points / self.config.stride
        is_query = mark_queries(query, query_frames, frames)
        coords = query[:, None].expand(-1, frames, -1, -1)
        feature = sample_queries(maps, query, is_query)
        features = feature[:, None].expand(-1, frames, -1, -1)
        pyramid = correlation_pyramid(maps, self.config.corr_levels)
        marks = self.marks(query, size_of(maps), is_query)
        tracks = []
        for _ in range(self.config.iters):
            coords = coords.detach()
            step = self.update(pyramid, coords, query, features, marks)
            features = features + self.ffeat_updater(self.normalise_update(step[..., 2:]))
            moved = coords + step[..., :2]
            coords = torch.where(is_query[..., None], query[:, None], moved)
            tracks.append(coords * self.config.stride)
        visibility = self.vis_predictor(features)[..., 0].sigmoid()
        confidence = self.conf_predictor(features)[..., 0].sigmoid()
        return tracks, visibility, confidence

    def update(
        self,
        pyramid: Sequence[Tensor],
        coords: Tensor,
        query: Tensor,
        features: Tensor,
        marks: Tensor,
    ) -> Tensor:
        """One step: how to change coordinates and features, (B, S, K, 2 + D)."""
        correlation = correlate(pyramid, coords, features, self.config.corr_radius)
        flow = coords - query[:, None]
        relative = flow / self.config.max_scale
        tokens = torch.cat(
            (
                flow_code(flow, self.config.features),
                relative,
                relative,
                self.corr_mlp(correlation),
                features,
            ),
            dim=-1,
        )
        # The transformer has points before frames.
        return cast(Tensor, self.updateformer((tokens + marks).transpose(1, 2)).transpose(1, 2))

    def marks(self, query: Tensor, size: Size, is_query: Tensor) -> Tensor:
        """
        Make what each token carries through all iterations.

        :returns: (B, S, K, 3D + 4): where its query is, and whether its frame is the query's.
        """
        width = 3 * self.config.features + 4
        code = torch.cat(
            (
                sampled_sine_code(query[..., 0], size[1], width // 2),
                sampled_sine_code(query[..., 1], size[0], width // 2),
            ),
            dim=-1,
        )
        own, other = self.query_ref_token.unbind(dim=1)
        return code[:, None] + torch.where(is_query[..., None], own, other)

    def normalise_update(self, delta: Tensor) -> Tensor:
        """The group norm over each single vector of (B, S, K, D)."""
        return cast(Tensor, self.ffeat_norm(delta.flatten(0, -2)).unflatten(0, delta.shape[:-1]))


def mark_queries(query: Tensor, query_frames: Tensor | None, frames: int) -> Tensor:
    """Say which frame is that of each of (B, K, 2) queries: (B, S, K) bool."""
    if query_frames is None:
        query_frames = torch.zeros(query.shape[:2], dtype=torch.int64, device=query.device)
    return torch.arange(frames, device=query.device)[:, None] == query_frames[:, None]


def sample_queries(maps: Tensor, query: Tensor, is_query: Tensor) -> Tensor:
    """Features (B, K, D) of the queries in (B, S, D, h, w), each in its own frame."""
    everywhere = query[:, None].expand(-1, maps.shape[1], -1, -1)
    sampled = sample(maps.flatten(0, 1), everywhere.flatten(0, 1), padding_mode='border')
    sampled = sampled.unflatten(0, maps.shape[:2])
    # One term of the sum is not zero: it is a choice without an index on the device.
    return torch.where(is_query[..., None], sampled, 0.0).sum(1)


def correlation_pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """(B, S, D, h, w) and its averages over 2 × 2, 4 × 4, … cells."""
    pyramid = [maps]
    for _ in range(levels - 1):
        smaller = functional.avg_pool2d(pyramid[-1].flatten(0, 1), 2)
        pyramid.append(smaller.unflatten(0, maps.shape[:2]))
    return pyramid


def correlate(pyramid: Sequence[Tensor], coords: Tensor, features: Tensor, radius: int) -> Tensor:
    """Similarity of each point's feature with the window around it in every level.

    The features are sampled first and multiplied then, which is the same by linearity as
    sampling a correlation map, without K maps of the image's size.

    :param coords: (B, S, K, 2) in pixels of the finest level.
    :param features: (B, S, K, D).
    :returns: (B, S, K, levels · (2·radius + 1)²), in each window x slow and y fast.
    """
    steps = torch.arange(-radius, radius + 1, device=coords.device, dtype=coords.dtype)
    window = torch.cartesian_prod(steps, steps)
    scale = features.shape[-1] ** -0.5
    levels = []
    for index, maps in enumerate(pyramid):
        places = coords[..., None, :] / 2**index + window  # (B, S, K, window, 2)
        around = sample(
            maps.flatten(0, 1), places.flatten(0, 1).flatten(1, 2), padding_mode='zeros'
        )
        around = around.unflatten(1, places.shape[2:4]).unflatten(0, places.shape[:2])
        levels.append((around @ features[..., None])[..., 0] * scale)
    return torch.cat(levels, dim=-1)


def sample(maps: Tensor, points: Tensor, padding_mode: str) -> Tensor:
    """Bilinear values of (N, D, h, w) at (N, M, 2) pixel indices (x, y): (N, M, D).

    On an axis of size 1 every point hits the only pixel, whatever the padding.
    """
    height, width = size_of(maps)
    x, y = points.unbind(dim=-1)
    places = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    values = functional.grid_sample(
        maps,
        places[:, None],
        mode='bilinear',
        padding_mode=padding_mode,
        align_corners=True,
    )
    return values[:, :, 0].transpose(1, 2)


def flow_code(flow: Tensor, channels: int) -> Tensor:
    """(…, 2) pixels → (…, channels): x then y, sine and cosine in turn, linear frequencies."""
    half = channels // 2
    steps = torch.arange(0, half, 2, device=flow.device, dtype=flow.dtype)
    angles = flow[..., None] * (steps * (FLOW_CODE_SPAN / half))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def sampled_sine_code(places: Tensor, size: int, channels: int) -> Tensor:
    """The sine code of the pixels 0 … size − 1 of one axis, linearly sampled at `places`.

    Sampling makes it differ from the code of the place itself between pixels; the network was
    trained so. Outside, the border's code.

    :param places: (B, K) pixel indices. :returns: (B, K, channels), sines before cosines.
    """
    half = channels // 2
    exponents = torch.arange(half, device=places.device, dtype=torch.float64) / half
    pixels = torch.arange(size, device=places.device, dtype=torch.float64)
    angles = pixels[:, None] * SINE_BASE**-exponents
    table = torch.cat((angles.sin(), angles.cos()), dim=-1).to(places.dtype)
    inside = places.clamp(0, size - 1)
    before = inside.floor().long()
    after = (before + 1).clamp(max=size - 1)
    return torch.lerp(table[before], table[after], (inside - before)[..., None])
