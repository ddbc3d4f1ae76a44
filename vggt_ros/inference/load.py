# SPDX-License-Identifier: Apache-2.0
"""Loading: settings become a network on a device, in a precision."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from vggt_ros.inference.memory import GIGABYTE
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.model import VGGT, VGGTConfig, build_vggt, resolve_checkpoint
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.model.embedded import find_embedded
from vggt_ros.model.kernels import configure_tf32
from vggt_ros.model.linear_weights import cast_linear_weights, pack_linear_layers, quantize_int8
from vggt_ros.settings import UNTRAINED_WARNING, ModelSettings

UNTRAINED, EMBEDDED = 'untrained', 'embedded'  # checkpoints that are not files

logger = logging.getLogger(__name__)


def load_network(settings: ModelSettings) -> VGGTNetwork:
    """
    Load the weights of the settings onto their device.

    :raises CheckpointError: if the weights cannot be found or do not match the network.
    :raises ValueError: if there is no such device, or the network cannot run with the settings.
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
            f'{model.config.agg.depth}, the global attention blocks of this network'
        )
    model.aggregator.frame_only_blocks = settings.frame_only_blocks
    if settings.int8 != 'off':
        quantize_int8(model.aggregator, settings.int8)
    model = model.to(device)
    if not settings.compile:  # which torch.compile does not support
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
    :raises CheckpointError: if the weights cannot be found or do not match the network.
    """
    path = find_embedded()[0] if checkpoint == EMBEDDED else resolve_checkpoint(checkpoint)
    return build_vggt(_read_config(path), path)


def choose_device(name: str) -> torch.device:
    """
    Convert the setting `device` to a torch device.

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
    """Limit what torch may allocate on the device; 0: no limit."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(gigabytes * GIGABYTE / total, 1.0) if gigabytes else 1.0
    torch.cuda.set_per_process_memory_fraction(share, device)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Convert the setting `precision` to a torch type; bfloat16 needs compute capability 8."""
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
