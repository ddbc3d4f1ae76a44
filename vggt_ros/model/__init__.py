# SPDX-License-Identifier: Apache-2.0
"""The VGGT network: configuration, modules, checkpoints. Free of ROS, image files and maps."""

from vggt_ros.model.checkpoint import (
    CheckpointError,
    LoadedCheckpoint,
    build_vggt,
    load_checkpoint,
    resolve_checkpoint,
)
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.linear_weights import cast_linear_weights
from vggt_ros.model.prediction import Prediction
from vggt_ros.model.vggt import ALL_HEADS, VGGT

__all__ = [
    'ALL_HEADS',
    'VGGT',
    'CheckpointError',
    'LoadedCheckpoint',
    'Prediction',
    'VGGTConfig',
    'build_vggt',
    'cast_linear_weights',
    'load_checkpoint',
    'resolve_checkpoint',
]
