# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs drawn from their names: the same numbers on every machine, without files.

Golden outputs of the reference were made with these weights, so parity needs no gigabytes. The
numbers are random but shaped so that a forward pass stays finite and every part matters.
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
Spread = tuple[float | NDArray[np.float32], float | NDArray[np.float32]]


def uniform(name: str, shape: Sequence[int], salt: str) -> NDArray[np.float32]:
    """Numbers in [0, 1) of 24 random bits each, exact in float32, seeded by `salt:name`."""
    stream = np.random.PCG64(zlib.crc32(f'{salt}:{name}'.encode()))
    # The upper 24 bits of each draw.
    bits = (stream.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float32)
    return (bits * np.float32(2.0**-24)).reshape(shape)


def weight(name: str, shape: Sequence[int], salt: str) -> NDArray[np.float32]:
    """The weight of a checkpoint key."""
    width, centre = _spread(name, shape)
    value = (uniform(name, shape, salt) - np.float32(0.5)) * np.asarray(width, dtype=np.float32)
    return value + np.asarray(centre, dtype=np.float32)


def fill(model: nn.Module, salt: str, probe_scale: float = 1.0) -> None:
    """Overwrite every parameter of `model`.

    :param probe_scale: factor on everything whose size a wrong norm epsilon would show.
    """
    with torch.no_grad():
        for name, target in model.state_dict().items():
            value = torch.from_numpy(weight(name, target.shape, salt))
            target.copy_(value * probe_scale if is_probe(name, target) else value)


def is_probe(name: str, tensor: Tensor) -> bool:
    """Whether `probe_scale` applies: vectors but LayerScale, tokens, and the patches' way in."""
    leaf = name.rsplit('.', 1)[-1]
    return (
        (tensor.ndim == 1 and leaf != 'gamma')
        or leaf in TOKENS
        or leaf == 'pos_embed'
        or name == 'aggregator.patch_embed.patch_embed.proj.weight'
    )


def _spread(name: str, shape: Sequence[int]) -> Spread:
    """Width and centre of the uniform distribution of a key."""
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
        columns[:, : (shape[1] - 4) // 3] *= 0.1  # the stiff flow code, which magnifies rounding
        return columns.astype(np.float32), 0.0
    return width, 0.0
