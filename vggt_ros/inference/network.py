# SPDX-License-Identifier: Apache-2.0
"""A network at work: `Network` is the interface that the engine uses, `VGGTNetwork` is VGGT.

`VGGTNetwork` caches the patch tokens of frames, which do not depend on their window, and runs
everything after the encoder for the whole window. It is made by `load_network`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from vggt_ros.frames.batch import Batch, PreprocessedImage, Queries, stack_images
from vggt_ros.frames.resize import Pixels
from vggt_ros.inference.memory import fit_to_memory
from vggt_ros.inference.warm_up import expect_load, make_noise_windows
from vggt_ros.model import VGGT
from vggt_ros.model.dpt_head import use_channels_last
from vggt_ros.model.kernels import (
    attention_backends,
    compile_layers,
    prefer_backends,
    selected_backend,
)
from vggt_ros.model.prediction import HEADS, Prediction
from vggt_ros.model.vggt import frame_descriptors
from vggt_ros.settings import Settings

_CACHED_WINDOWS = 2  # of encoded frames

logger = logging.getLogger(__name__)


class Network(Protocol):
    """Anything that predicts the geometry of a batch."""

    name: str  # for the log, reports and diagnostics
    trained: bool  # False: random weights, the output is meaningless
    device: str  # as torch writes it
    precision: str  # of the aggregator
    attention: str  # its backend, see `selected_backend`
    image_width: int  # pixels, that it was trained on
    tracks_trained: bool  # False: the track head has random weights

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """
        Run the network on one window.

        :param heads: of 'camera', 'depth', 'points', 'tracks'; the last tracks `batch.queries`.
        :returns: tensors on the CPU, B = 1. Without tracks if points cannot be tracked in images
            of this size.
        """
        ...

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """
        Encode images of the next window before it is complete; no result depends on it.

        :param images: that may be part of it, of one size, by frame id.
        """
        ...

    def prepare(self, settings: Settings) -> Settings:
        """
        Prepare for the windows of these settings, before the first one.

        :returns: the settings to use, with windows fitted to the memory.
        :raises ValueError: if the network cannot run with these settings.
        """
        ...

    def save_memory(self) -> str:
        """
        Trade speed for memory, with the same results, after the device ran out of memory.

        :returns: what was done, '' if nothing more is possible.
        """
        ...


class VGGTNetwork:
    """VGGT with its weights on a device."""

    def __init__(
        self, model: VGGT, name: str, trained: bool, precision: str, image_width: int = 0
    ) -> None:
        parameter = next(model.parameters())
        self.name = name
        self.trained = trained
        self.device = str(parameter.device)
        self.precision = precision
        self.image_width = image_width or model.config.img_size
        self.tracks_trained = trained and model.track_head.trained
        self._tracking_error = ''  # the last reason why points were not tracked, logged once
        self.model = model.eval()
        use_channels_last(model)
        self._attention_backends = attention_backends(parameter.device)
        with torch.inference_mode(), prefer_backends(self._attention_backends):
            self.attention = selected_backend(
                model.aggregator.head_dim, model.autocast_dtype or torch.float32, parameter.device
            )

        # Patch tokens by frame id, with the pixels that they were encoded from, oldest first.
        self._tokens: dict[int, tuple[Pixels, torch.Tensor]] = {}
        self._window_size = 0  # frames of the last window
        self._compiled_for: tuple[int, ...] = ()  # batch sizes of the encoder; (): any

    @property
    def encoded_frames(self) -> int:
        """Number of frames whose patch tokens are cached."""
        return len(self._tokens)

    @torch.inference_mode()
    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """
        Run on one window; the result is on the CPU.

        Frames of the last windows are not encoded again, and dense heads decode only
        `batch.depth_frames`. Tracks need the tokens of all frames.
        """
        with prefer_backends(self._attention_backends):
            prediction: Prediction = self._run(batch, heads)
            return prediction.cpu()

    def _run(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        size = batch.image_size
        queries = self._check_queries(batch.queries, size) if 'tracks' in heads else None
        tokens = self._encode(batch)
        layer_tokens = self.model.aggregate(
            tokens,
            self.model.patch_grid(size),
            self.model.layers_for(heads),
            batch.depth_frames if queries is None else None,
        )
        descriptors = frame_descriptors(tokens)
        del tokens
        if queries is None:
            prediction = self.model.decode(layer_tokens, size, heads=heads)
        else:
            points = torch.from_numpy(queries.points).to(self.device)[None]
            frames = torch.from_numpy(queries.frames).to(self.device)[None]
            prediction = self.model.decode(
                layer_tokens, size, points, heads, frames, batch.depth_frames
            )
        with_descriptors: Prediction = replace(prediction, descriptors=descriptors)
        return with_descriptors

    def _check_queries(self, queries: Queries | None, size: tuple[int, int]) -> Queries | None:
        """Drop queries that cannot be tracked in images of this size, with a warning."""
        error = self.model.tracking_size_error(size)
        if error and queries is not None and error != self._tracking_error:
            logger.warning('no points are tracked: %s; set another resolution', error)
            self._tracking_error = error
        return None if error else queries

    def _encode(self, batch: Batch) -> torch.Tensor:
        """Return the patch tokens (1, S, P, C) of a window; encode what is not cached."""
        encoded = self._encode_new(dict(zip(batch.ids, batch.images, strict=True)))
        if len(encoded) == 1 and len(encoded[0]) == len(batch.ids):
            window = encoded[0]  # do not copy a long window
        else:
            window = torch.stack([self._tokens[frame_id][1] for frame_id in batch.ids])
        self._window_size = len(batch.ids)
        self._evict(batch.ids, self._window_size)
        return window.unsqueeze(0)

    def _encode_new(self, images: Mapping[int, PreprocessedImage]) -> list[torch.Tensor]:
        """Encode the images that are not cached; return the tokens (N, P, C) of each batch."""
        cache = self._tokens
        new = [
            frame_id
            for frame_id, image in images.items()
            # The pixels are compared, not only the id: another engine has the same ids, and a
            # resized image is another array.
            if frame_id not in cache or cache[frame_id][0] is not image.pixels
        ]
        if not new:
            return []
        whole = not self._compiled_for or len(new) in self._compiled_for
        encoded = []
        for part in [new] if whole else [[frame_id] for frame_id in new]:
            device = torch.device(self.device)
            pixels = stack_images([images[frame_id].pixels for frame_id in part], device)
            encoded.append(self.model.encode(pixels.unsqueeze(0))[0])
            for frame_id, tokens in zip(part, encoded[-1], strict=True):
                cache.pop(frame_id, None)
                cache[frame_id] = images[frame_id].pixels, tokens
        return encoded

    def _evict(self, kept: Collection[int], window_size: int) -> None:
        """Drop the oldest frames; those of the last two windows may be used again."""
        for frame_id in list(self._tokens)[: -_CACHED_WINDOWS * window_size]:
            if frame_id not in kept:
                del self._tokens[frame_id]

    @torch.inference_mode()
    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """Encode the images that are not cached; see `Network`."""
        with prefer_backends(self._attention_backends):
            self._encode_new(images)
        self._evict(images, max(self._window_size, len(images)))

    def prepare(self, settings: Settings) -> Settings:
        """Fit windows to the memory and compile the network if configured; see `Network`."""
        if settings.model.max_device_memory:
            settings, at_once = fit_to_memory(settings, self.model, self.image_width)
            self.model.depth_head.frames_chunk_size = at_once
        if settings.model.compile:
            self._compile(settings)
        return settings

    def save_memory(self) -> str:
        """Let the dense head decode half as many frames at once; see `Network`."""
        head = self.model.depth_head
        if head.frames_chunk_size == 1:
            return ''
        head.frames_chunk_size //= 2
        return f'from now on depth is decoded {head.frames_chunk_size} frames at a time'

    def _compile(self, settings: Settings) -> None:
        load = expect_load(settings, self.image_width)
        logger.info(
            'compiling the network for windows of %d frames, %dx%d pixels',
            load.frames,
            load.width,
            load.height,
        )
        compile_layers(self.model)
        self._compiled_for = (1, load.stride, load.frames)
        try:
            windows = make_noise_windows(load, 2)
            self.encode_ahead({-1: windows[0].images[0]})
            for batch in windows:
                self(batch, HEADS)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # includes all errors of the torch compiler
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f'compile is true, but torch cannot compile: {reason}') from error
        self._tokens.clear()

    @torch.inference_mode()
    def predict(
        self,
        images: torch.Tensor,
        heads: tuple[str, ...],
        query_points: torch.Tensor | None = None,
    ) -> Prediction:
        """Run on windows (B, S, 3, H, W), with points to track (B, K, 2); see `VGGT.forward`."""
        if query_points is not None:
            query_points = query_points.to(self.device)
        with prefer_backends(self._attention_backends):
            prediction: Prediction = self.model(images.to(self.device), query_points, heads)
        return prediction
