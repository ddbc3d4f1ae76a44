# SPDX-License-Identifier: Apache-2.0
"""
Prediction of the device memory of a window, and windows that fit into a budget.

The network runs on torch's fake tensors: shapes without data, so that nothing is computed or
allocated, and every tensor is counted from the operation that creates it until it is freed.
Workspace of kernels and fragmentation are not counted; a tenth of the budget is reserved for them.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vggt_ros.inference.warm_up import Load, expect_load
from vggt_ros.model import VGGT
from vggt_ros.model.dpt_head import FRAMES_CHUNK_SIZE
from vggt_ros.model.linear_weights import cast_linear_weights
from vggt_ros.model.prediction import HEADS
from vggt_ros.model.vggt import frame_descriptors
from vggt_ros.settings import PATCH_SIZE, Settings

GIGABYTE = 1e9
_USABLE = 0.9  # share of the budget, see above
_MIN_FRAMES_FIRST = 4  # of a window, before resolution is reduced
_MIN_FRAMES = 2  # of any window

logger = logging.getLogger(__name__)


class LiveMemory(TorchDispatchMode):
    """A context that counts the bytes of new tensors, fake or real, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0  # bytes, now
        self.peak = 0  # bytes, maximum
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operation: Any, _types: Any, given: Any = (), named: Any = None
    ) -> Any:
        """Run an operation and count the tensors it creates."""
        named = named or {}
        result = operation(*given, **named)
        old = {id(each) for each in _storages((given, named))}
        for storage in _storages(result):
            if id(storage) not in old and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(values: object) -> list[Any]:
    return [each.untyped_storage() for each in tree_iter(values) if isinstance(each, torch.Tensor)]


def weight_bytes(model: VGGT) -> int:
    """Count the bytes of all weights, including heads that do not run."""
    held = (*model.parameters(), *model.buffers())
    return sum(each.numel() * each.element_size() for each in held)


def predict_peak(model: VGGT, load: Load, frames_chunk_size: int) -> int:
    """
    Predict the peak memory of a window, including the weights, in bytes.

    All frames are counted as new, as in the first window of a map, and in addition the encoded
    frames of another window, as in later ones.

    :param model: on any device; only its sizes are used.
    :param frames_chunk_size: of the dense head.
    """
    with torch.device('meta'):
        copied = VGGT(model.config).eval().requires_grad_(False)
    copied.aggregator.frame_only_blocks = model.aggregator.frame_only_blocks
    copied.depth_head.frames_chunk_size = frames_chunk_size
    if model.autocast_dtype is not None:
        cast_linear_weights(copied, model.autocast_dtype)
    encoder = copied.aggregator.patch_embed
    encoder.pos_encoding = encoder.interpolate_pos_encoding  # its cache needs data pointers
    size = load.height, load.width
    with FakeTensorMode(allow_non_fake_inputs=True):
        copied.to_empty(device='cpu')
        memory = LiveMemory()
        with memory, torch.inference_mode():
            tokens = copied.encode(torch.empty(1, load.frames, 3, *size))
            kept = (torch.empty_like(tokens), torch.empty_like(tokens))
            layer_tokens = copied.aggregate(
                tokens, copied.patch_grid(size), copied.layers_for(HEADS)
            )
            frame_descriptors(tokens)
            del tokens
            copied.decode(layer_tokens, size, heads=HEADS)
        del kept
    return weight_bytes(model) + memory.peak


def fit_to_memory(settings: Settings, model: VGGT, image_width: int) -> tuple[Settings, int]:
    """
    Reduce windows until they fit into `max_device_memory`.

    First the dense head processes fewer frames at once, which does not change the result; then
    windows have fewer frames, down to four; then images are smaller, down to half of their width;
    then windows have fewer frames again. One camera is assumed, see `expect_load`.

    :param image_width: of the network; the settings may have another one.
    :returns: the settings to use, and the frames that the dense head processes at once.
    :raises ValueError: if the smallest windows need more, and how much.
    """
    budget = settings.model.max_device_memory
    candidates = _candidates(settings, image_width)

    def gigabytes(candidate: int) -> float:
        tried, at_once = candidates[candidate]
        peak = predict_peak(model, expect_load(tried, image_width), at_once)
        return peak / GIGABYTE / _USABLE

    fits, needed = 0, gigabytes(0)
    if needed > budget:
        too_large, fits, needed = 0, len(candidates) - 1, gigabytes(len(candidates) - 1)
        if needed > budget:
            raise ValueError(
                f'max_device_memory is {budget:g} GB, but the smallest windows, of '
                f'{_describe(*candidates[-1], image_width)}, need {needed:.3g} GB'
            )
        while fits - too_large > 1:
            middle = (fits + too_large) // 2
            tried = gigabytes(middle)
            if tried <= budget:
                fits, needed = middle, tried
            else:
                too_large = middle
    fitted, at_once = candidates[fits]
    description = _describe(fitted, at_once, image_width)
    log = logger.warning if fits else logger.info
    log('within max_device_memory (%g GB): windows of %s, %.3g GB', budget, description, needed)
    return fitted, at_once


def _describe(settings: Settings, at_once: int, image_width: int) -> str:
    load = expect_load(settings, image_width)
    return (
        f'{load.frames} frames of {load.width}x{load.height} pixels, depth of {at_once} at a time'
    )


def _candidates(settings: Settings, image_width: int) -> list[tuple[Settings, int]]:
    """List settings and frames at once that may be used, largest first."""
    candidates = [
        (settings, FRAMES_CHUNK_SIZE >> i) for i in range(FRAMES_CHUNK_SIZE.bit_length())
    ]
    frames = settings.window.window_size
    width = settings.model.resolution or image_width
    least = max(width // 2 // PATCH_SIZE, 1) * PATCH_SIZE

    def append(frames: int, width: int) -> None:
        stride = min(settings.window.window_stride, frames - 1)
        window = replace(settings.window, window_size=frames, window_stride=stride)
        model = replace(settings.model, resolution=width)
        candidates.append((replace(settings, window=window, model=model), 1))

    while frames > _MIN_FRAMES_FIRST:
        frames = max(frames * 3 // 4, _MIN_FRAMES_FIRST)
        append(frames, width)
    while width > least:
        width = max(width * 7 // 8 // PATCH_SIZE * PATCH_SIZE, least)
        append(frames, width)
    while frames > _MIN_FRAMES:
        frames -= 1
        append(frames, width)
    return candidates
