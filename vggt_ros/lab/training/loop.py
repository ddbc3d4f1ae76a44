# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validation, checkpoints and the learning curve."""

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_ros.lab.training.dataset import Dataset
from vggt_ros.lab.training.trainer import Trainer

LAST, BEST, CONFIG = 'last.pt', 'best.pt', 'config.json'  # files of a run
SAVE_SECONDS = 300.0  # between checkpoints: the most that an interruption loses
# Columns of curve.csv and their titles.
_SHOWN = {
    'matching_first': 'attention on the matching patch of the first frame',
    'flow': 'displacement read from a token (patches)',
    'camera_rotation': 'rotation (L1 of the quaternion)',
    'camera_translation': 'translation (L1, scene sizes)',
    'camera_field_of_view': 'field of view (L1, rad)',
    'depth_error': 'depth (L1, scene sizes)',
}

logger = logging.getLogger(__name__)


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


def plot_curve(curve: Path, output: Path) -> None:
    """
    Plot each column, for training and for validation with the averaged weights.

    :param curve: `curve.csv` of `train`.
    :param output: PNG to write.
    """
    with curve.open(newline='') as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(15, 7), dpi=80, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, _SHOWN.items(), strict=True):
        for kind, colour in (('train', '#999999'), ('validation', '#d62728')):
            points = [
                (float(row['windows']) / 1000, float(row[f'{kind}_{name}']))
                for row in rows
                if row.get(f'{kind}_{name}')
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=kind)
        axes.set(title=title, xlabel='thousand windows', ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(output, format='png')


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
