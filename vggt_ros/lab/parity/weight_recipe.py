# SPDX-License-Identifier: Apache-2.0
"""
Pseudo-random weights and inputs, seeded by their names: the same on every machine, without files.

The golden outputs of the reference were computed with these weights, so parity needs no download.
Their distributions keep a forward pass finite and let every part contribute.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

TOKENS = frozenset(
    (
        'camera_token',
        'register_token',
        'cls_token',
        'register_tokens',
        'mask_token',
        'empty_pose_tokens',
        'query_ref_token',
        'virual_tracks',
    )
)
POSE_BIAS = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.2, 0.2)  # identity rotation, wide views
Distribution = tuple[float | NDArray[np.float32], float | NDArray[np.float32]]


def uniform_from_name(name: str, shape: Sequence[int], salt: str) -> NDArray[np.float32]:
    """Return numbers in [0, 1) of 24 random bits, exact in float32, seeded by `salt:name`."""
    stream = np.random.PCG64(zlib.crc32(f'{salt}:{name}'.encode()))
    # The upper 24 bits.
    bits = (stream.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float32)
    return (bits * np.float32(2.0**-24)).reshape(shape)


def weight_from_name(name: str, shape: Sequence[int], salt: str) -> NDArray[np.float32]:
    """Return the weight of a checkpoint key."""
    width, centre = _distribution(name, shape)
    value = uniform_from_name(name, shape, salt) - np.float32(0.5)
    value = value * np.asarray(width, dtype=np.float32)
    return value + np.asarray(centre, dtype=np.float32)


def fill_weights(model: nn.Module, salt: str, probe_scale: float = 1.0) -> None:
    """
    Overwrite every parameter of a model.

    :param probe_scale: factor on the weights that make a wrong norm epsilon detectable.
    """
    with torch.no_grad():
        for name, target in model.state_dict().items():
            value = torch.from_numpy(weight_from_name(name, target.shape, salt))
            target.copy_(value * probe_scale if is_probe(name, target) else value)


def is_probe(name: str, tensor: Tensor) -> bool:
    """Whether `probe_scale` applies: vectors but LayerScale, tokens, and the patch projection."""
    leaf = name.rsplit('.', 1)[-1]
    return (
        (tensor.ndim == 1 and leaf != 'gamma')
        or leaf in TOKENS
        or leaf == 'pos_embed'
        or name == 'aggregator.patch_embed.patch_embed.proj.weight'
    )


def _distribution(name: str, shape: Sequence[int]) -> Distribution:
    """Return width and centre of the uniform distribution of a key."""
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'gamma':
        return 0.3, 0.35
    if leaf in TOKENS:
        return 2.0, 0.0
    if leaf == 'pos_embed':
        return 1.0, 0.0
    if len(shape) == 1 and leaf == 'weight':
        return 0.4, 1.0
    if name == 'camera_head.pose_branch.fc2.bias':
        return 0.1, np.array(POSE_BIAS, dtype=np.float32)
    if len(shape) == 1:
        return 0.2, 0.0
    fan_in = math.prod(shape[1:])
    width = 2 * math.sqrt(3 / fan_in)
    if name == 'camera_head.pose_branch.fc2.weight':
        return 0.2 * width, 0.0
    if name.endswith('updateformer.flow_head.weight'):
        rows = np.full((shape[0], 1), width)
        rows[:2] *= 0.1  # small steps of the coordinates
        return rows.astype(np.float32), 0.0
    if name.endswith('updateformer.input_transform.weight'):
        columns = np.full((1, shape[1]), width)
        columns[:, : (shape[1] - 4) // 3] *= 0.1  # the flow embedding, which magnifies rounding
        return columns.astype(np.float32), 0.0
    return width, 0.0
