# SPDX-License-Identifier: Apache-2.0
"""
Train the small network on synthetic rooms, or go on where a folder's last checkpoint is.

    python -m vggt_ros.cli.train --folder training_output/small --windows 1000000
    torchrun --nproc-per-node 2 -m vggt_ros.cli.train ...      several GPUs or CPU processes
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from vggt_ros.inference import choose_device
from vggt_ros.model import VGGT, VGGTConfig
from vggt_ros.training.initialise import start_from_nothing
from vggt_ros.training.loop import Trainer, train
from vggt_ros.training.recipes import HEIGHT, QUERIES, RECIPES, WIDTH
from vggt_ros.training.samples import SyntheticSource


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--folder', type=Path, required=True, help='checkpoints and curve')
    parser.add_argument('--recipe', choices=sorted(RECIPES), default='small')
    parser.add_argument('--windows', type=int, help='in all; the learning rate ends there')
    parser.add_argument('--until', type=int, help='stop for now after so many windows')
    parser.add_argument('--batch', type=int, help='windows of a step, over all processes')
    parser.add_argument('--learning-rate', type=float, help='at the peak')
    parser.add_argument('--seed', type=int, default=0, help='of weights and windows')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    return parser.parse_args()


def main() -> None:
    """Train."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    parallel = 'RANK' in os.environ  # set by torchrun
    device = choose_device(arguments.device)
    if parallel:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
    asked = {
        name: getattr(arguments, name)
        for name in ('windows', 'batch', 'learning_rate')
        if getattr(arguments, name) is not None
    }
    settings = replace(RECIPES[arguments.recipe], **asked)
    torch.manual_seed(arguments.seed)
    model = VGGT(VGGTConfig.small())
    start_from_nothing(model, arguments.seed)
    source = SyntheticSource('train', arguments.seed, HEIGHT, WIDTH, QUERIES, device)
    trainer = Trainer(model.to(device), source, settings)
    with tqdm(total=settings.windows, unit='window', disable=trainer.rank > 0) as bar:

        def show(windows: int, loss: float) -> None:
            bar.update(windows - bar.n)
            bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

        validation = replace(source, split='validation')
        train(trainer, validation, arguments.folder, arguments.until, show)
    if parallel:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
