# SPDX-License-Identifier: Apache-2.0
"""
A window computed as a whole, by the book: what the engine's savings are compared with.

All frames are encoded, all layers of all frames are kept, both dense heads decode every frame, and
tables of constants are made anew in each call. Results are those of `VGGT.forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_ros.model import VGGT
from vggt_ros.model.prediction import Prediction

HEADS = ('camera', 'depth', 'points')


@torch.inference_mode()
def naive_forward(model: VGGT, images: Tensor) -> Prediction:
    """
    Run a window.

    :param images: (B, S, 3, H, W), on the model's device.
    """
    model.clear_tables()
    size = images.shape[-2], images.shape[-1]
    layers = range(model.config.agg.depth)
    layer_tokens = model.aggregate(model.encode(images), model.patch_grid(size), layers)
    return model.decode(layer_tokens, size, heads=HEADS)
