# SPDX-License-Identifier: Apache-2.0
"""The training loop: initial weights, steps, validation, checkpoints and the learning curve."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_ros.lab.training.dataset import Dataset
from vggt_ros.lab.training.trainer import Trainer
from vggt_ros.model import VGGT
from vggt_ros.model.block import Block

LAST, BEST, CONFIG = 'last.pt', 'best.pt', 'config.json'  # files of a run
SAVE_SECONDS = 300.0  # between checkpoints: the most that an interruption loses
_LAYER_SCALE = 0.5  # of every block
_POSITION_SCALE = 0.7  # of the position encoding of patches
_TOKEN_STD = 0.5  # of the special tokens

logger = logging.getLogger(__name__)


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


def train(
    trainer: Trainer,
    validation: Dataset,
    folder: Path,
    until: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> None:
    """
    Train to the end of the run, with regular validation and checkpoints.

    :param folder: receives `last.pt` (the full state), `best.pt` (averaged weights of the best
        validation, with its `config.json`) and `curve.csv`; an existing `last.pt` is resumed.
    :param until: windows after which to stop for now; None: the run's end.
    :param progress: called after each step with the number of windows so far and the loss.
    """
    settings = trainer.settings
    folder.mkdir(parents=True, exist_ok=True)
    last, best = folder / LAST, folder / BEST
    if trainer.rank == 0:
        config = trainer.model.config.to_dict()
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + '\n')
    lowest = math.inf
    if last.exists():
        state = torch.load(last, map_location=trainer.device, weights_only=True)
        trainer.restore(state)
        lowest = state['lowest']
        logger.info('resuming after %d windows', trainer.windows_seen)
    end = min(settings.windows, until if until is not None else settings.windows)

    def save() -> None:
        with _atomic_path(last) as partial:
            torch.save({**trainer.state(), 'lowest': lowest}, partial)

    steps: list[dict[str, float]] = []
    started = saved = time.monotonic()
    while trainer.windows_seen < end:
        before = trainer.windows_seen
        losses = trainer.step()
        steps.append(losses)
        if progress is not None:
            progress(trainer.windows_seen, losses['total'])
        now = trainer.windows_seen
        due = now // settings.validate_every > before // settings.validate_every
        if not due and now < end:
            if trainer.rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            continue
        seconds = time.monotonic() - started
        validated = trainer.validate(validation)
        means = _means_by_name(steps)
        if trainer.rank == 0:
            append_row(
                folder / 'curve.csv',
                {
                    'windows': now,
                    'seconds': seconds,
                    'learning_rate': settings.learning_rate_at(now),
                    **{f'train_{name}': value for name, value in means.items()},
                    **{f'validation_{name}': value for name, value in validated.items()},
                },
            )
            if validated['total'] < lowest:
                lowest = validated['total']
                with _atomic_path(best) as partial:
                    torch.save(
                        {'model': trainer.average.state_dict(), 'windows_seen': now}, partial
                    )
            save()
            logger.info(
                '%d windows, %.1f/s: train %.4f, validation %s',
                now,
                len(steps) * settings.batch / seconds,
                means['total'],
                ', '.join(f'{name} {value:.4f}' for name, value in validated.items()),
            )
        steps = []
        started = saved = time.monotonic()


def append_row(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV file, with new columns where needed."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline='') as file:
            rows = list(csv.DictReader(file))
    rows.append({name: f'{value:.6g}' for name, value in row.items()})
    columns = dict.fromkeys(name for each in rows for name in each)
    with _atomic_path(path) as partial, partial.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _means_by_name(steps: list[dict[str, float]]) -> dict[str, float]:
    """Average each loss over the steps that have it."""
    names = sorted({name for step in steps for name in step})
    values = {name: [step[name] for step in steps if name in step] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


@contextmanager
def _atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `path` when it is complete."""
    partial = path.with_name(f'{path.name}.partial')
    yield partial
    partial.replace(path)
