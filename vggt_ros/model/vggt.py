# SPDX-License-Identifier: Apache-2.0
"""The whole network: images of a window in, cameras, depth, points and tracks out.

`forward` is three steps that may also be called one by one: `encode` (per frame, so results may
be kept), `aggregate` (over the window) and `decode` (the heads that are wanted).

Precision: parameters are float32. With `autocast_dtype` set, encode and aggregate run under
autocast of that type; left at None, under whatever autocast the caller has. The heads always run
without autocast. Rotary tables and norms stay float32 everywhere.

Source: VGGT: Visual Geometry Grounded Transformer (arXiv 2503.11651).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vggt_ros.model.aggregator import CAMERA, Aggregator
from vggt_ros.model.camera_head import CameraHead
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.dense_head import DenseHead, Size, positive, signed_growth
from vggt_ros.model.prediction import Prediction
from vggt_ros.model.track_head import TrackHead

HEADS = ('camera', 'depth', 'points', 'tracks')


class VGGT(nn.Module):
    """Visual geometry grounded transformer of any size."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.autocast_dtype: torch.dtype | None = None
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DenseHead(config, values=1, activate=positive)
        self.point_head = DenseHead(config, values=3, activate=signed_growth)
        self.track_head = TrackHead(config)

    def forward(
        self,
        images: Tensor,
        query_points: Tensor | None = None,
        heads: Collection[str] = HEADS,
        query_frames: Tensor | None = None,
    ) -> Prediction:
        """
        Run the heads on a batch of windows.

        :param images: (B, S, 3, H, W), RGB in [0, 1]; H and W multiples of the patch size.
        :param query_points: (B, K, 2) as (x, y) in pixels of their frames; without them no tracks.
        :param heads: which of 'camera', 'depth', 'points', 'tracks' to run.
        :param query_frames: (B, K) int64, the frame of each query; None: all in frame 0.
        :raises ValueError: on input of another shape or type, naming it.
        """
        self.check_input(images, query_points, heads, query_frames)
        image_size = images.shape[-2], images.shape[-1]
        grid = self.grid(image_size)
        tokens = self.encode(images)
        rounds = self.aggregate(tokens, grid, self.rounds_for(heads))
        prediction = self.decode(rounds, image_size, query_points, heads, query_frames)
        return replace(prediction, descriptors=frame_descriptors(tokens))

    def encode(self, images: Tensor) -> Tensor:
        """(B, S, 3, H, W) → patch tokens (B, S, P, C); no frame sees another."""
        with self._autocast(images):
            tokens: Tensor = self.aggregator.patch_embed(images.flatten(0, 1))
            by_frame: Tensor = tokens.unflatten(0, images.shape[:2])
            return by_frame

    def aggregate(
        self,
        patch_tokens: Tensor,
        grid: Size,
        rounds: Collection[int],
        frames: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """Patch tokens (B, S, P, C) → what the heads read; see `Aggregator.forward`."""
        with self._autocast(patch_tokens):
            kept: dict[int, Tensor] = self.aggregator(patch_tokens, grid, rounds, frames)
            return kept

    def decode(
        self,
        rounds: Mapping[int, Tensor],
        image_size: Size,
        query_points: Tensor | None = None,
        heads: Collection[str] = HEADS,
        query_frames: Tensor | None = None,
        dense: Sequence[int] | None = None,
    ) -> Prediction:
        """
        Run the heads on what `aggregate` kept.

        :param query_points: and `query_frames`: as for `forward`, of the frames kept there.
        :param dense: places, among the frames kept, of those that depth and points are wanted
            of; None: all.
        """
        fields: dict[str, Any] = {}
        camera_tokens = rounds[CAMERA]
        special = self.aggregator.special_tokens
        with torch.autocast(camera_tokens.device.type, enabled=False):
            if 'camera' in heads:
                fields['pose_encodings'] = self.camera_head(camera_tokens)
            levels = [
                rounds[index][:, :, special:]
                for index in self.config.dpt.intermediate_layer_idx
                if index in rounds
            ]
            chosen = levels if dense is None else [level[:, list(dense)] for level in levels]
            if 'depth' in heads:
                depth, fields['depth_confidence'] = self.depth_head(chosen, image_size)
                fields['depth'] = depth[..., 0]
            if 'points' in heads:
                fields['points'], fields['points_confidence'] = self.point_head(chosen, image_size)
            if 'tracks' in heads and query_points is not None:
                tracks, fields['visibility'], fields['track_confidence'] = self.track_head(
                    levels, image_size, query_points, query_frames
                )
                fields['track_iterations'], fields['tracks'] = tracks, tracks[-1]
        return Prediction(**fields)

    def rounds_for(self, heads: Collection[str]) -> frozenset[int]:
        """The rounds that these heads read."""
        if set(heads) <= {'camera'}:
            return frozenset()
        return frozenset(self.config.dpt.intermediate_layer_idx)

    def grid(self, image_size: Size) -> Size:
        """Patches (h, w) of an image."""
        return (
            image_size[0] // self.config.patch_size,
            image_size[1] // self.config.patch_size,
        )

    def check_input(
        self,
        images: Tensor,
        query_points: Tensor | None,
        heads: Collection[str],
        query_frames: Tensor | None = None,
    ) -> None:
        """
        Refuse what `forward` cannot run.

        :raises ValueError: naming what was found and what was expected.
        """
        unknown = sorted(set(heads) - set(HEADS)) if not isinstance(heads, str) else [heads]
        if unknown:
            raise ValueError(f'heads has {unknown}; expected a collection of {list(HEADS)}')
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f'images is {tuple(images.shape)}; expected (B, S, 3, H, W)')
        if not images.is_floating_point():
            raise ValueError(f'images is {images.dtype}; expected a float type, values in [0, 1]')
        if 0 in images.shape:
            raise ValueError(f'images is {tuple(images.shape)}; expected no empty axis')
        size, patch = tuple(images.shape[-2:]), self.config.patch_size
        if any(side % patch for side in size):
            raise ValueError(f'images are {size[0]} × {size[1]}; expected multiples of {patch}')
        if query_points is not None and 'tracks' in heads:
            self._check_tracks(images, query_points, query_frames)

    def _check_tracks(
        self, images: Tensor, query_points: Tensor, query_frames: Tensor | None
    ) -> None:
        batch, shape = images.shape[0], tuple(query_points.shape)
        if len(shape) != 3 or shape[0] != batch or shape[1] == 0 or shape[2] != 2:
            raise ValueError(f'query_points is {shape}; expected (B, K, 2) with B = {batch}')
        if not query_points.is_floating_point():
            raise ValueError(f'query_points is {query_points.dtype}; expected a float type')
        if query_frames is not None and (
            tuple(query_frames.shape) != shape[:2] or query_frames.dtype != torch.int64
        ):
            raise ValueError(
                f'query_frames is {tuple(query_frames.shape)} {query_frames.dtype}; expected '
                f'{shape[:2]} int64'
            )
        if query_frames is not None:
            low, high = int(query_frames.min()), int(query_frames.max())
            if low < 0 or high >= images.shape[1]:
                raise ValueError(
                    f'query_frames has {low} to {high}; expected 0 to {images.shape[1] - 1}'
                )
        refusal = self.refuse_tracks((images.shape[-2], images.shape[-1]))
        if refusal:
            raise ValueError(refusal)

    def refuse_tracks(self, image_size: Size) -> str:
        """Say why points cannot be followed in images of this size, '' if they can."""
        track = self.config.track
        if min(image_size) >= track.smallest_image:
            return ''
        return (
            f'images are {image_size[0]} × {image_size[1]}; tracking with {track.corr_levels} '
            f'correlation levels needs at least {track.smallest_image} pixels a side'
        )

    def clear_tables(self) -> None:
        """Drop the cached rotary tables and positional embeddings; they are computed on demand."""
        for module in self.modules():
            for name in ('_rope_tables', '_codes', '_position_codes'):
                if hasattr(module, name):
                    getattr(module, name).clear()

    def _autocast(self, tensor: Tensor) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        context: AbstractContextManager[object] = torch.autocast(
            tensor.device.type, dtype=self.autocast_dtype
        )
        return context


def frame_descriptors(patch_tokens: Tensor) -> Tensor:
    """(B, S, P, C) → (B, S, C), see `Prediction.descriptors`."""
    return patch_tokens.float().mean(2)


def store_linear_weights(model: VGGT, dtype: torch.dtype) -> None:
    """Keep the weights of the encoder's and aggregator's linear and convolution layers in `dtype`.

    They make up nearly all of the memory. Autocast would round the same weights to `dtype` at
    every use, so results are those of autocast over float32 weights, to the bit; it is switched
    on here. Norms, layer scales, tokens and all heads stay float32.
    """
    for module in model.aggregator.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(dtype)
    model.autocast_dtype = dtype
