# SPDX-License-Identifier: Apache-2.0
"""The whole network: images of a window to cameras, depth, points and tracks.

`forward` is three steps that can also be called one by one: `encode` (per frame, so its results
can be cached), `aggregate` (over the window) and `decode` (the requested heads).

Precision: parameters are float32. If `autocast_dtype` is set, encode and aggregate run under
autocast to that dtype, else under the autocast of the caller. The heads always run without
autocast. Rotary tables and norms are always float32.

Source: VGGT: Visual Geometry Grounded Transformer (arXiv 2503.11651).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vggt_ros.model.aggregator import CAMERA_TOKENS, Aggregator
from vggt_ros.model.camera_head import CameraHead
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.dpt_head import DPTDecoder, DPTHead, Size, inverse_log
from vggt_ros.model.prediction import Prediction
from vggt_ros.model.track_head import TrackHead
from vggt_ros.model.vit import VisionTransformer

ALL_HEADS = ('camera', 'depth', 'points', 'tracks')


class VGGT(nn.Module):
    """Visual Geometry Grounded Transformer of any size."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.autocast_dtype: torch.dtype | None = None
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DPTHead(config, values=1, activation=torch.exp)
        self.point_head = DPTHead(config, values=3, activation=inverse_log)
        self.track_head = TrackHead(config)

    def forward(
        self,
        images: Tensor,
        query_points: Tensor | None = None,
        heads: Collection[str] = ALL_HEADS,
        query_frames: Tensor | None = None,
    ) -> Prediction:
        """
        Run the heads on a batch of windows.

        :param images: (B, S, 3, H, W), RGB in [0, 1]; H and W multiples of the patch size.
        :param query_points: (B, K, 2) as (x, y) in pixels of their frames; None: no tracks.
        :param heads: which of 'camera', 'depth', 'points', 'tracks' to run.
        :param query_frames: (B, K) int64, the frame of each query; None: all in frame 0.
        :raises ValueError: on input of another shape or dtype.
        """
        self.check_input(images, query_points, heads, query_frames)
        image_size = images.shape[-2], images.shape[-1]
        grid = self.patch_grid(image_size)
        tokens = self.encode(images)
        layer_tokens = self.aggregate(tokens, grid, self.layers_for(heads))
        prediction = self.decode(layer_tokens, image_size, query_points, heads, query_frames)
        return replace(prediction, descriptors=frame_descriptors(tokens))

    def encode(self, images: Tensor) -> Tensor:
        """(B, S, 3, H, W) → patch tokens (B, S, P, C), each frame independently."""
        with self._autocast(images):
            tokens: Tensor = self.aggregator.patch_embed(images.flatten(0, 1))
            by_frame: Tensor = tokens.unflatten(0, images.shape[:2])
            return by_frame

    def aggregate(
        self,
        patch_tokens: Tensor,
        grid: Size,
        layers: Collection[int],
        frames: Sequence[int] | None = None,
    ) -> dict[int, Tensor]:
        """Patch tokens (B, S, P, C) → tokens of the layers; see `Aggregator.forward`."""
        with self._autocast(patch_tokens):
            outputs: dict[int, Tensor] = self.aggregator(patch_tokens, grid, layers, frames)
            return outputs

    def decode(
        self,
        layer_tokens: Mapping[int, Tensor],
        image_size: Size,
        query_points: Tensor | None = None,
        heads: Collection[str] = ALL_HEADS,
        query_frames: Tensor | None = None,
        dense_frames: Sequence[int] | None = None,
    ) -> Prediction:
        """
        Run the heads on the output of `aggregate`.

        :param query_points: and `query_frames`: as for `forward`, in the frames returned there.
        :param dense_frames: indices, among the frames returned there, of those to decode depth
            and points of; None: all.
        """
        fields: dict[str, Any] = {}
        camera_tokens = layer_tokens[CAMERA_TOKENS]
        num_special = self.aggregator.num_special_tokens
        with torch.autocast(camera_tokens.device.type, enabled=False):
            if 'camera' in heads:
                fields['pose_encodings'] = self.camera_head(camera_tokens)
            patches = [
                layer_tokens[index][:, :, num_special:]
                for index in self.config.dpt.intermediate_layer_idx
                if index in layer_tokens
            ]
            dense = patches
            if dense_frames is not None:
                dense = [tokens[:, list(dense_frames)] for tokens in patches]
            if 'depth' in heads:
                depth, fields['depth_confidence'] = self.depth_head(dense, image_size)
                fields['depth'] = depth[..., 0]
            if 'points' in heads:
                fields['points'], fields['points_confidence'] = self.point_head(dense, image_size)
            if 'tracks' in heads and query_points is not None:
                tracks, fields['visibility'], fields['track_confidence'] = self.track_head(
                    patches, image_size, query_points, query_frames
                )
                fields['track_iterations'], fields['tracks'] = tracks, tracks[-1]
        return Prediction(**fields)

    def layers_for(self, heads: Collection[str]) -> frozenset[int]:
        """Indices of the layers that these heads read."""
        if set(heads) <= {'camera'}:
            return frozenset()
        return frozenset(self.config.dpt.intermediate_layer_idx)

    def patch_grid(self, image_size: Size) -> Size:
        """Number of patches (h, w) of an image."""
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
        Check the arguments of `forward`.

        :raises ValueError: with the value found and what was expected.
        """
        unknown = sorted(set(heads) - set(ALL_HEADS)) if not isinstance(heads, str) else [heads]
        if unknown:
            raise ValueError(f'heads has {unknown}; expected a collection of {list(ALL_HEADS)}')
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
        size_error = self.tracking_size_error((images.shape[-2], images.shape[-1]))
        if size_error:
            raise ValueError(size_error)

    def tracking_size_error(self, image_size: Size) -> str:
        """Return why points cannot be tracked in images of this size, '' if they can."""
        track = self.config.track
        if min(image_size) >= track.min_image_size:
            return ''
        return (
            f'images are {image_size[0]} × {image_size[1]}; tracking with {track.corr_levels} '
            f'correlation levels needs at least {track.min_image_size} pixels a side'
        )

    def clear_tables(self) -> None:
        """Drop the cached rotary tables and positional embeddings; they are computed on demand."""
        for module in self.modules():
            if isinstance(module, (Aggregator, VisionTransformer, DPTDecoder)):
                module.tables.clear()

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
