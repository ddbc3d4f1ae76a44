# SPDX-License-Identifier: Apache-2.0
"""A training run from its options: initial weights, data, processes, progress."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from vggt_ros.inference.load import choose_device, load_model
from vggt_ros.io.recordings import open_recording
from vggt_ros.lab.training.dataset import Dataset, SyntheticDataset
from vggt_ros.lab.training.loop import CONFIG, LAST, initialise_weights, train
from vggt_ros.lab.training.recipes import HEIGHT, QUERIES, RECIPES, WIDTH
from vggt_ros.lab.training.recorded_dataset import RecordedDataset
from vggt_ros.lab.training.trainer import Trainer
from vggt_ros.model import VGGT, VGGTConfig


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


def _train_with_progress(
    trainer: Trainer, validation: Dataset, folder: Path, until: int | None
) -> None:
    with tqdm(total=trainer.settings.windows, unit='window', disable=trainer.rank > 0) as bar:

        def show(windows: int, loss: float) -> None:
            bar.update(windows - bar.n)
            bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

        train(trainer, validation, folder, until, show)
