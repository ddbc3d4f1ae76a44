# SPDX-License-Identifier: Apache-2.0
"""The VGGT network: sizes, modules, checkpoints. Knows nothing of ROS, files of images or maps."""

from vggt_ros.model.checkpoint import (
    CheckpointError,
    LoadedCheckpoint,
    build_vggt,
    load_checkpoint,
    resolve,
)
from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.prediction import Prediction
from vggt_ros.model.vggt import HEADS, VGGT, store_linear_weights

__all__ = [
    'HEADS',
    'VGGT',
    'CheckpointError',
    'LoadedCheckpoint',
    'Prediction',
    'VGGTConfig',
    'build_vggt',
    'load_checkpoint',
    'resolve',
    'store_linear_weights',
]
