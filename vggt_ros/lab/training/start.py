# SPDX-License-Identifier: Apache-2.0
"""A training run from its options: initial weights, data, processes, progress."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from vggt_ros.inference.load import choose_device, load_model
from vggt_ros.io.recordings import open_recording
from vggt_ros.lab.training.dataset import Dataset, SyntheticDataset
from vggt_ros.lab.training.loop import CONFIG, LAST, train
from vggt_ros.lab.training.recipes import HEIGHT, QUERIES, RECIPES, WIDTH
from vggt_ros.lab.training.recorded_dataset import RecordedDataset
from vggt_ros.lab.training.trainer import Trainer
from vggt_ros.model import VGGT, VGGTConfig
from vggt_ros.model.block import Block

_LAYER_SCALE = 0.5  # of every block
_POSITION_SCALE = 0.7  # of the position encoding of patches
_TOKEN_STD = 0.5  # of the special tokens


def run_training(
    folder: Path,
    recipe: str,
    changes: Mapping[str, Any],
    *,
    until: int | None = None,
    seed: int = 0,
    checkpoint: str = '',
    recordings: Sequence[Path] = (),
    width: int = WIDTH,
    height: int = HEIGHT,
    device: str = 'auto',
) -> None:
    """
    Train to the end or resume, in this process or as one of several started by `torchrun`.

    :param folder: see `train`.
    :param recipe: one of `RECIPES`, of which `changes` replaces fields.
    :param until: windows after which to pause; None: the end of the run.
    :param checkpoint: initial weights, see `load_model`; '': random ones.
    :param recordings: with ground truth; none: synthetic rooms.
    :param width: of the images, pixels.
    :param height: of synthetic images, pixels; that of recordings follows from their width.
    :raises ValueError: if settings, recordings and network do not fit together.
    :raises CheckpointError: if the initial weights cannot be loaded.
    :raises FloatingPointError: see `train`.
    """
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    torch.set_flush_denormal(True)  # tiny gradients would take the CPU a hundred times as long
    parallel = 'RANK' in os.environ  # set by torchrun
    chosen = choose_device(device)
    if parallel:
        dist.init_process_group('nccl' if chosen.type == 'cuda' else 'gloo')
        if chosen.type == 'cuda':
            chosen = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(chosen)
    settings = replace(RECIPES[recipe], **changes)
    torch.manual_seed(seed)
    model = initial_model(folder, checkpoint, seed)
    dataset: SyntheticDataset | RecordedDataset
    if recordings:
        opened = [open_recording(path) for path in recordings]
        dataset = RecordedDataset(
            opened, 'train', seed, width, max(settings.frames), QUERIES, device=chosen
        )
    else:
        dataset = SyntheticDataset('train', seed, height, width, QUERIES, chosen)
    trainer = Trainer(model.to(chosen), dataset, settings)
    _train_with_progress(trainer, replace(dataset, split='validation'), folder, until)
    if parallel:
        dist.destroy_process_group()


def initial_model(folder: Path, checkpoint: str, seed: int) -> VGGT:
    """
    Make the network to train, or to load the weights of an existing run into.

    :raises CheckpointError: if the initial weights cannot be loaded.
    """
    if (folder / LAST).exists():
        return VGGT(VGGTConfig.from_dict(json.loads((folder / CONFIG).read_text())))
    if checkpoint:
        return load_model(checkpoint)
    model = VGGT(VGGTConfig.small())
    initialise_weights(model, seed)
    return model


@torch.no_grad()
def initialise_weights(model: VGGT, seed: int) -> None:
    """
    Draw the weights of encoder and aggregator for training from scratch; the heads keep theirs.

    VGGT-1B starts from a pre-trained encoder, with its other blocks nearly off (layer scales of
    0.01). A shallow network without one learns sooner if every branch is active from the start:
    linear layers keep the variance of their input, patches have a position encoding, special
    tokens differ.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(target: Tensor, std: float) -> None:
        target.copy_(torch.randn(target.shape, generator=random) * std)

    aggregator = model.aggregator
    encoder = aggregator.patch_embed
    for module in aggregator.modules():
        if isinstance(module, Block):
            module.ls1.gamma.fill_(_LAYER_SCALE)
            module.ls2.gamma.fill_(_LAYER_SCALE)
        if isinstance(module, nn.Linear):
            draw(module.weight, module.in_features**-0.5)
            module.bias.zero_()
    projection = encoder.patch_embed.proj
    draw(projection.weight, math.prod(projection.weight.shape[1:]) ** -0.5)
    projection.bias.zero_()
    positions = _position_encoding(encoder.grid_size, encoder.pos_embed.shape[-1])
    encoder.pos_embed[:, 1:] = _POSITION_SCALE * positions
    for token in (encoder.cls_token, encoder.register_tokens):
        draw(token, _TOKEN_STD)
    for token in (aggregator.camera_token, aggregator.register_token):
        draw(token, _TOKEN_STD)


def _position_encoding(side: int, channels: int) -> Tensor:
    """Return (side², channels): sines and cosines of row and column, row-major."""
    count = channels // 4
    frequencies = math.pi * 2 ** (torch.arange(count) / max(count - 1, 1) * math.log2(side / 2))
    angles = torch.linspace(-1, 1, side)[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (side, 2·count)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    encoding = torch.zeros(side * side, channels)
    encoding[:, : 4 * count] = torch.cat((rows, columns), dim=-1)
    return encoding * math.sqrt(2)


def _train_with_progress(
    trainer: Trainer, validation: Dataset, folder: Path, until: int | None
) -> None:
    with tqdm(total=trainer.settings.windows, unit='window', disable=trainer.rank > 0) as bar:

        def show(windows: int, loss: float) -> None:
            bar.update(windows - bar.n)
            bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

        train(trainer, validation, folder, until, show)
