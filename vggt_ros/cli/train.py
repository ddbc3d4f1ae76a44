# SPDX-License-Identifier: Apache-2.0
r"""
Train the small network on synthetic rooms, or another one on recordings; go on after a break.

    python -m vggt_ros.cli.train --folder training_output/small --windows 1000000
    python -m vggt_ros.cli.train --folder training_output/mine --recipe fine_tune \
        --checkpoint facebook/VGGT-1B --width 518 --data my_bag rgbd_dataset_freiburg1_desk
    python -m torch.distributed.run --nproc-per-node 2 -m vggt_ros.cli.train ...  processes
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
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
from vggt_ros.model.checkpoint import CheckpointError


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
    parser.add_argument('--frames', type=int, nargs='+', help='of the windows, in turn')
    parser.add_argument('--learning-rate', type=float, help='at the peak')
    parser.add_argument('--seed', type=int, default=0, help='of weights and windows')
    parser.add_argument('--checkpoint', help='begin with these weights, as the node takes them')
    parser.add_argument(
        '--data',
        type=Path,
        nargs='+',
        default=[],
        help='recordings with truth: TUM RGB-D or 7-Scenes folders, bags; else synthetic rooms',
    )
    parser.add_argument(
        '--width', type=int, help=f'of the images of --data, pixels; {WIDTH} if not given'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help=f'of synthetic images, pixels; {HEIGHT} {WIDTH} if not given',
    )
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    arguments = parser.parse_args()
    if arguments.width is not None and not arguments.data:
        parser.error('--width is for --data; the size of synthetic images is --size')
    if arguments.size is not None and arguments.data:
        parser.error('--size is for synthetic rooms; the width of recordings is --width')
    return arguments


def first_weights(arguments: argparse.Namespace) -> VGGT:
    """
    Make the network that training begins with, or one for the weights that it goes on from.

    :raises CheckpointError: if the weights to begin with cannot be had.
    """
    if (arguments.folder / LAST).exists():
        return VGGT(VGGTConfig.from_dict(json.loads((arguments.folder / CONFIG).read_text())))
    if arguments.checkpoint:
        return load_model(arguments.checkpoint)
    model = VGGT(VGGTConfig.small())
    initialise_weights(model, arguments.seed)
    return model


def prepare(arguments: argparse.Namespace, device: torch.device) -> tuple[Trainer, Dataset]:
    """
    Make network, source and trainer, and the source to validate on.

    :raises ValueError: if the settings, the recordings and the network do not fit each other.
    :raises CheckpointError: if the weights to begin with cannot be had.
    """
    asked: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ('windows', 'batch', 'learning_rate')
        if getattr(arguments, name) is not None
    }
    if arguments.frames:
        asked['frames'] = tuple(arguments.frames)
    settings = replace(RECIPES[arguments.recipe], **asked)
    torch.manual_seed(arguments.seed)
    model = first_weights(arguments)
    source: SyntheticDataset | RecordedDataset
    if arguments.data:
        recordings = [open_recording(path) for path in arguments.data]
        source = RecordedDataset(
            recordings,
            'train',
            arguments.seed,
            arguments.width or WIDTH,
            max(settings.frames),
            QUERIES,
            device=device,
        )
    else:
        height, width = arguments.size or (HEIGHT, WIDTH)
        source = SyntheticDataset('train', arguments.seed, height, width, QUERIES, device)
    return Trainer(model.to(device), source, settings), replace(source, split='validation')


def main() -> None:
    """Train."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    torch.set_flush_denormal(True)  # tiny gradients would take the CPU a hundred times as long
    parallel = 'RANK' in os.environ  # set by torchrun
    device = choose_device(arguments.device)
    if parallel:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
    try:
        trainer, validation = prepare(arguments, device)
    except (ValueError, CheckpointError) as error:
        sys.exit(f'train: {error}')
    with tqdm(total=trainer.settings.windows, unit='window', disable=trainer.rank > 0) as bar:

        def show(windows: int, loss: float) -> None:
            bar.update(windows - bar.n)
            bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

        try:
            train(trainer, validation, arguments.folder, arguments.until, show)
        except (ValueError, FloatingPointError) as error:
            sys.exit(f'train: {error}')
    if parallel:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
