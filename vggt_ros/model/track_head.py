# SPDX-License-Identifier: Apache-2.0
"""Track head: tracks query points of any frame through the window.

A track starts at its query point in every frame; each iteration correlates the feature of the
track with the feature maps around its current position and `UpdateFormer` updates both. Frames may
be in any order. The published network was trained with queries in frame 0, which has camera and
register tokens of its own; with another query frame, the same arithmetic runs on other features.

Source: CoTracker2 (arXiv 2307.07635), VGGSfM (arXiv 2312.04563), VGGT section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_ros.model.block import Mlp, init_normal
from vggt_ros.model.config import TrackConfig, VGGTConfig
from vggt_ros.model.dpt_head import DPTDecoder, Size, decode_in_chunks, spatial_size
from vggt_ros.model.update_former import UpdateFormer

SINCOS_BASE = 10000.0
FLOW_EMBED_SPAN = 1000.0  # radians per feature pixel at the highest frequency


class TrackFeatureExtractor(DPTDecoder):
    """One feature map per frame, `stride` times smaller than the image."""

    def __init__(self, config: VGGTConfig) -> None:
        track = config.track
        super().__init__(
            config,
            track.features,
            track.out_channels,
            out_features=track.features,
            outputs=None,
            use_pos_embed=track.pos_embed,
        )
        self.stride = track.stride

    def forward(self, layer_tokens: Sequence[Tensor], image_size: Size) -> Tensor:
        """Four (B, S, P, 2C) → (B, S, D, H/stride, W/stride)."""
        out_size = image_size[0] // self.stride, image_size[1] // self.stride
        return decode_in_chunks(
            lambda chunk: self.decode(chunk, image_size, out_size), layer_tokens
        )


class TrackHead(nn.Module):
    """Feature extractor and tracker."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.feature_extractor = TrackFeatureExtractor(config)
        self.tracker = Tracker(config.track)

    @property
    def trained(self) -> bool:
        """Whether the head was trained: the biases of its transformer are initialised to zero."""
        return bool(self.tracker.updateformer.flow_head.bias.any())

    def forward(
        self,
        layer_tokens: Sequence[Tensor],
        image_size: Size,
        query_points: Tensor,
        query_frames: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """
        Track the query points.

        :param layer_tokens: four (B, S, P, 2C) of all frames.
        :param query_points: (B, K, 2) as (x, y) in pixels of their frames.
        :param query_frames: (B, K) int64, the frame of each query, 0 to S - 1; None: all 0.
        :returns: tracks (B, S, K, 2) in pixels after each iteration, the last is the best;
            visibility and confidence (B, S, K) in [0, 1].
        """
        tracks, visibility, confidence = self.tracker(
            self.feature_extractor(layer_tokens, image_size), query_points, query_frames
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
        self.updateformer = UpdateFormer(config)
        # Axis 1: added to the tokens of the query frame, then to those of all other frames.
        self.query_ref_token = nn.Parameter(torch.empty(1, 2, 3 * dim + 4))
        init_normal(self.query_ref_token, std=1.0)
        self.fmap_norm = nn.LayerNorm(dim)
        self.ffeat_norm = nn.GroupNorm(1, dim)
        self.ffeat_updater = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(dim, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(dim, 1))

    def forward(
        self, feature_maps: Tensor, query_points: Tensor, query_frames: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """
        Track the query points in feature maps.

        :param feature_maps: (B, S, D, h, w).
        :param query_points: (B, K, 2) in image pixels of their frames.
        :param query_frames: (B, K), see `TrackHead.forward`.
        :returns: as `TrackHead.forward`.
        """
        maps = self.fmap_norm(feature_maps.movedim(2, -1)).movedim(-1, 2)
        frames = maps.shape[1]
        query = query_points / self.config.stride
        in_query_frame = query_frame_mask(query, query_frames, frames)
        coords = query[:, None].expand(-1, frames, -1, -1)
        query_features = sample_query_features(maps, query, in_query_frame)
        features = query_features[:, None].expand(-1, frames, -1, -1)
        pyramid = correlation_pyramid(maps, self.config.corr_levels)
        embedding = self.query_embedding(query, spatial_size(maps), in_query_frame)
        tracks = []
        for _ in range(self.config.iters):
            coords = coords.detach()
            delta = self.update(pyramid, coords, query, features, embedding)
            features = features + self.ffeat_updater(self.normalise_delta(delta[..., 2:]))
            moved = coords + delta[..., :2]
            coords = torch.where(in_query_frame[..., None], query[:, None], moved)
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
        embedding: Tensor,
    ) -> Tensor:
        """Updates of coordinates and features in one iteration, (B, S, K, 2 + D)."""
        correlation = correlate(pyramid, coords, features, self.config.corr_radius)
        flow = coords - query[:, None]
        relative = flow / self.config.max_scale
        tokens = torch.cat(
            (
                flow_embedding(flow, self.config.features),
                relative,
                relative,
                self.corr_mlp(correlation),
                features,
            ),
            dim=-1,
        )
        # The axes of the transformer are points, then frames.
        tokens = (tokens + embedding).transpose(1, 2)
        return cast(Tensor, self.updateformer(tokens).transpose(1, 2))

    def query_embedding(self, query: Tensor, size: Size, in_query_frame: Tensor) -> Tensor:
        """
        Embed the query position, and whether a frame is the query frame.

        :returns: (B, S, K, 3D + 4), added to the tokens in all iterations.
        """
        width = 3 * self.config.features + 4
        position = torch.cat(
            (
                sampled_sincos_embedding(query[..., 0], size[1], width // 2),
                sampled_sincos_embedding(query[..., 1], size[0], width // 2),
            ),
            dim=-1,
        )
        own, other = self.query_ref_token.unbind(dim=1)
        return position[:, None] + torch.where(in_query_frame[..., None], own, other)

    def normalise_delta(self, delta: Tensor) -> Tensor:
        """Apply the group norm to each vector of (B, S, K, D)."""
        return cast(Tensor, self.ffeat_norm(delta.flatten(0, -2)).unflatten(0, delta.shape[:-1]))


def query_frame_mask(query: Tensor, query_frames: Tensor | None, frames: int) -> Tensor:
    """Whether a frame is that of each of the (B, K, 2) queries: (B, S, K) bool."""
    if query_frames is None:
        query_frames = torch.zeros(query.shape[:2], dtype=torch.int64, device=query.device)
    return torch.arange(frames, device=query.device)[:, None] == query_frames[:, None]


def sample_query_features(maps: Tensor, query: Tensor, in_query_frame: Tensor) -> Tensor:
    """Sample the features (B, K, D) of the queries in (B, S, D, h, w), each in its own frame."""
    everywhere = query[:, None].expand(-1, maps.shape[1], -1, -1)
    sampled = sample_features(maps.flatten(0, 1), everywhere.flatten(0, 1), padding_mode='border')
    sampled = sampled.unflatten(0, maps.shape[:2])
    # Exactly one term is not zero: selects without indexing on the device.
    return torch.where(in_query_frame[..., None], sampled, 0.0).sum(1)


def correlation_pyramid(maps: Tensor, levels: int) -> list[Tensor]:
    """(B, S, D, h, w) and its averages over 2 × 2, 4 × 4, … pixels."""
    pyramid = [maps]
    for _ in range(levels - 1):
        smaller = functional.avg_pool2d(pyramid[-1].flatten(0, 1), 2)
        pyramid.append(smaller.unflatten(0, maps.shape[:2]))
    return pyramid


def correlate(pyramid: Sequence[Tensor], coords: Tensor, features: Tensor, radius: int) -> Tensor:
    """Correlate the feature of each track with the features in a window around it, in every level.

    Features are sampled before they are multiplied; by linearity this equals sampling correlation
    maps, without storing K of them.

    :param coords: (B, S, K, 2) in pixels of the finest level.
    :param features: (B, S, K, D).
    :returns: (B, S, K, levels · (2·radius + 1)²), in each window x is the slow axis.
    """
    offsets = torch.arange(-radius, radius + 1, device=coords.device, dtype=coords.dtype)
    window = torch.cartesian_prod(offsets, offsets)
    scale = features.shape[-1] ** -0.5
    levels = []
    for index, maps in enumerate(pyramid):
        positions = coords[..., None, :] / 2**index + window  # (B, S, K, window, 2)
        sampled = sample_features(
            maps.flatten(0, 1), positions.flatten(0, 1).flatten(1, 2), padding_mode='zeros'
        )
        sampled = sampled.unflatten(1, positions.shape[2:4]).unflatten(0, positions.shape[:2])
        levels.append((sampled @ features[..., None])[..., 0] * scale)
    return torch.cat(levels, dim=-1)


def sample_features(maps: Tensor, points: Tensor, padding_mode: str) -> Tensor:
    """Sample (N, D, h, w) bilinearly at (N, M, 2) pixel indices (x, y): (N, M, D).

    On an axis of size 1, every point samples the only pixel, whatever the padding.
    """
    height, width = spatial_size(maps)
    x, y = points.unbind(dim=-1)
    grid = torch.stack((2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1), dim=-1)
    values = functional.grid_sample(
        maps,
        grid[:, None],
        mode='bilinear',
        padding_mode=padding_mode,
        align_corners=True,
    )
    return values[:, :, 0].transpose(1, 2)


def flow_embedding(flow: Tensor, channels: int) -> Tensor:
    """(…, 2) pixels → (…, channels): x then y, sine and cosine interleaved, linear frequencies."""
    half = channels // 2
    indices = torch.arange(0, half, 2, device=flow.device, dtype=flow.dtype)
    angles = flow[..., None] * (indices * (FLOW_EMBED_SPAN / half))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def sampled_sincos_embedding(positions: Tensor, size: int, channels: int) -> Tensor:
    """Interpolate the sine-cosine embedding of the pixels 0 … size − 1 of one axis linearly.

    Between pixels this differs from the embedding of the position itself; the network was trained
    so. Outside of the image, it is the embedding of the border.

    :param positions: (B, K) pixel indices. :returns: (B, K, channels), sines before cosines.
    """
    half = channels // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    pixels = torch.arange(size, device=positions.device, dtype=torch.float64)
    angles = pixels[:, None] * SINCOS_BASE**-exponents
    table = torch.cat((angles.sin(), angles.cos()), dim=-1).to(positions.dtype)
    inside = positions.clamp(0, size - 1)
    before = inside.floor().long()
    after = (before + 1).clamp(max=size - 1)
    return torch.lerp(table[before], table[after], (inside - before)[..., None])
