# SPDX-License-Identifier: Apache-2.0
"""Linear layers in 8-bit integers, by torchao: less memory, and less exact.

Each row of a weight matrix has a scale of its own; nothing is calibrated.
"""

from __future__ import annotations

from torch import nn


def store_int8_weights(model: nn.Module, way: str) -> None:
    """
    Replace the weights of all linear layers.

    :param way: 'weights': products are computed with the weights brought back to their precision;
        'dynamic': each token is rounded too, and products are of integers.
    :raises ValueError: if torchao is not installed.
    """
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError as error:
        raise ValueError(
            f"int8 is '{way}', which needs torchao: pip install torchao ({error})"
        ) from error
    dynamic = way == 'dynamic'
    quantize_(
        model, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
    )
