# SPDX-License-Identifier: Apache-2.0
"""The network as the engine sees it: which weights, on which device, in which precision.

`Network` is what the engine asks of one; `VGGTNetwork` is the real one, made by `load_network`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from vggt_ros.frames.batch import Batch, PreprocessedImage, Queries, stack_images
from vggt_ros.frames.resize import Pixels
from vggt_ros.inference.memory import GIGABYTE, fit_to_memory
from vggt_ros.inference.warm_up import expect_load, make_noise_windows
from vggt_ros.model import VGGT, VGGTConfig, build_vggt, resolve_checkpoint
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.model.dpt_head import use_channels_last
from vggt_ros.model.embedded import find_embedded
from vggt_ros.model.kernels import (
    attention_backends,
    compile_layers,
    configure_tf32,
    prefer_backends,
    selected_backend,
)
from vggt_ros.model.linear_weights import cast_linear_weights, pack_linear_layers, quantize_int8
from vggt_ros.model.prediction import Prediction
from vggt_ros.model.vggt import frame_descriptors
from vggt_ros.settings import UNTRAINED_WARNING, ModelSettings, Settings

UNTRAINED, EMBEDDED = 'untrained', 'embedded'  # checkpoints that are no files

_REMEMBERED = 2  # encoded frames that are kept, in windows

logger = logging.getLogger(__name__)


class Network(Protocol):
    """Anything that says what a batch shows."""

    name: str  # for people: the log, reports and diagnostics
    trained: bool  # False: random weights, the output means nothing
    device: str  # as torch writes it
    precision: str  # of the aggregator
    attention: str  # the kernel that computes it, see `selected_backend`
    image_width: int  # pixels; the width that it was trained for
    tracks_trained: bool  # False: the head that follows points has random weights

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """
        Run the network on one window.

        :param heads: of 'camera', 'depth', 'points', 'tracks'; the last follows `batch.queries`.
        :returns: tensors on the CPU, B = 1. Without tracks where it cannot follow points in
            images of this size.
        """
        ...

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """
        Do what can be done of the next window before it is complete; no result depends on it.

        :param images: that may be part of it, of one size, by frame number.
        """
        ...

    def prepare(self, settings: Settings) -> Settings:
        """
        Get ready for windows as these settings make them, before the first one comes.

        :returns: the settings to go on with.
        :raises ValueError: if that cannot be.
        """
        ...

    def save_memory(self) -> str:
        """
        Give up some speed, but no result, after the device ran out of memory.

        :returns: what was done, '' if nothing is left to be done.
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
        self._refusal = ''  # the last reason why points were not followed, said once
        self.model = model.eval()
        use_channels_last(model)
        self._attention_backends = attention_backends(parameter.device)
        with torch.inference_mode(), prefer_backends(self._attention_backends):
            self.attention = selected_backend(
                model.aggregator.head_dim, model.autocast_dtype or torch.float32, parameter.device
            )

        # Encoded frames by number, with the pixels that they were encoded from, oldest first.
        self._tokens: dict[int, tuple[Pixels, torch.Tensor]] = {}
        self._window = 0  # frames of the last window
        self._compiled_for: tuple[int, ...] = ()  # numbers of frames to encode at once; (): any

    @property
    def encoded_frames(self) -> int:
        """Number of frames whose patch tokens are cached."""
        return len(self._tokens)

    @torch.inference_mode()
    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """
        Run on one window; the result is on the CPU.

        Frames that were in one of the last windows are not encoded again, and dense heads decode
        only the frames whose depth is wanted. Tracks need the layer_tokens of all frames.
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
        described: Prediction = replace(prediction, descriptors=descriptors)
        return described

    def _check_queries(self, queries: Queries | None, size: tuple[int, int]) -> Queries | None:
        """Leave out what cannot be followed in images of this size, and say so once."""
        refusal = self.model.tracking_size_error(size)
        if refusal and queries is not None and refusal != self._refusal:
            logger.warning('no point is followed: %s; set another resolution', refusal)
            self._refusal = refusal
        return None if refusal else queries

    def _encode(self, batch: Batch) -> torch.Tensor:
        """Give the patch tokens (1, S, P, C) of a window; encode what is not known yet."""
        encoded = self._encode_new(dict(zip(batch.ids, batch.images, strict=True)))
        if len(encoded) == 1 and len(encoded[0]) == len(batch.ids):
            window = encoded[0]  # a long window by itself is not to be copied
        else:
            window = torch.stack([self._tokens[number][1] for number in batch.ids])
        self._window = len(batch.ids)
        self._forget(batch.ids, self._window)
        return window.unsqueeze(0)

    def _encode_new(self, images: Mapping[int, PreprocessedImage]) -> list[torch.Tensor]:
        """Encode the images that are not known yet; give what was encoded (N, P, C) at once."""
        known = self._tokens
        new = [
            number
            for number, image in images.items()
            # The pixels themselves, not the number: another engine counts its frames anew, and
            # another size of the image is another array.
            if number not in known or known[number][0] is not image.pixels
        ]
        if not new:
            return []
        whole = not self._compiled_for or len(new) in self._compiled_for
        encoded = []
        for part in [new] if whole else [[number] for number in new]:
            device = torch.device(self.device)
            pixels = stack_images([images[number].pixels for number in part], device)
            encoded.append(self.model.encode(pixels.unsqueeze(0))[0])
            for number, tokens in zip(part, encoded[-1], strict=True):
                known.pop(number, None)
                known[number] = images[number].pixels, tokens
        return encoded

    def _forget(self, wanted: Collection[int], window: int) -> None:
        """Let go of frames that left; a joint window, or one after it, may want the last ones."""
        for number in list(self._tokens)[: -_REMEMBERED * window]:
            if number not in wanted:
                del self._tokens[number]

    @torch.inference_mode()
    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """Encode the images that are not known yet; see `Network`."""
        with prefer_backends(self._attention_backends):
            self._encode_new(images)
        self._forget(images, max(self._window, len(images)))

    def prepare(self, settings: Settings) -> Settings:
        """Fit windows to the memory and compile the network, if that is wanted; see `Network`."""
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
        return f'depth is decoded {head.frames_chunk_size} frames at once from now on'

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
                self(batch, ('camera', 'depth'))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of which every failure of torch's compiler is one
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


def load_network(settings: ModelSettings) -> VGGTNetwork:
    """
    Load the weights that the settings name onto the device that they name.

    :raises CheckpointError: if the weights cannot be had or do not fit.
    :raises ValueError: if there is no such device, or the network cannot run as asked.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    if device.type == 'cuda':
        limit_memory(device, settings.max_device_memory)
        configure_tf32(precision)
    name, trained, width = settings.checkpoint, settings.checkpoint != UNTRAINED, 0
    if trained:
        model = load_model(settings.checkpoint)
        if settings.checkpoint == EMBEDDED:
            about = find_embedded()[1]
            name, width = f'{EMBEDDED} (small, trained on {about.trained_on})', about.image_width
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same random weights every time
            model = VGGT(VGGTConfig.small())
    if precision != torch.float32:
        cast_linear_weights(model, precision)
    if settings.frame_only_blocks > model.config.agg.depth:
        raise ValueError(
            f'frame_only_blocks is {settings.frame_only_blocks}, expected at most '
            f'{model.config.agg.depth}, the layer_tokens of this network'
        )
    model.aggregator.frame_only_blocks = settings.frame_only_blocks
    if settings.int8 != 'off':
        quantize_int8(model.aggregator, settings.int8)
    model = model.to(device)
    if not settings.compile:  # torch's compiler cannot take them
        packed = pack_linear_layers(model.aggregator, model.camera_head)
        logger.debug('%d linear layers are packed for oneDNN', packed)
    network = VGGTNetwork(model, name, trained, str(precision).removeprefix('torch.'), width)
    logger.info(
        'network %s on %s in %s, attention by %s',
        network.name,
        network.device,
        network.precision,
        network.attention,
    )
    if not trained:
        logger.warning(UNTRAINED_WARNING)
    return network


def load_model(checkpoint: str) -> VGGT:
    """
    Load a network on the CPU, in float32.

    :param checkpoint: 'embedded', a file, or a repository of a hub, see `resolve_checkpoint`.
    :raises CheckpointError: if the weights cannot be had or do not fit.
    """
    path = find_embedded()[0] if checkpoint == EMBEDDED else resolve_checkpoint(checkpoint)
    return build_vggt(_read_config(path), path)


def choose_device(name: str) -> torch.device:
    """
    Turn the setting `device` into a torch device.

    :raises ValueError: if torch does not know it or this machine does not have it.
    """
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device is '{name}', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if device.type not in ('cpu', 'cuda'):
        raise ValueError(f"device is '{name}', expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    found = torch.cuda.device_count() if device.type == 'cuda' else 1
    if (device.index or 0) >= found:
        raise ValueError(f"device is '{name}', but torch sees {found} CUDA devices here")
    return device


def limit_memory(device: torch.device, gigabytes: float) -> None:
    """Let torch fail with OutOfMemoryError beyond this, whatever else is free; 0: no limit."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(gigabytes * GIGABYTE / total, 1.0) if gigabytes else 1.0
    torch.cuda.set_per_process_memory_fraction(share, device)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn the setting `precision` into a torch type; bfloat16 needs compute capability 8."""
    if name != 'auto':
        return {
            'float32': torch.float32,
            'bfloat16': torch.bfloat16,
            'float16': torch.float16,
        }[name]
    if device.type != 'cuda':
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def _read_config(checkpoint: Path) -> VGGTConfig:
    """Read config.json beside the checkpoint; without one the network is VGGT-1B."""
    path = checkpoint.with_name('config.json')
    if not path.exists():
        return VGGTConfig.vggt_1b()
    try:
        return VGGTConfig.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path} does not describe a network: {error}') from error
