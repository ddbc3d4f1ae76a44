# SPDX-License-Identifier: Apache-2.0
"""
Train a network: steps, schedule, averages, checkpoints.

A run is a sequence of steps; what a step sees and does follows from its number alone, so a run
that is interrupted and goes on from its checkpoint ends, on the CPU, with the same bits. Several
processes (`torchrun`) share each step's windows and average their gradients.

The optimiser follows VGGT: AdamW, linear warm-up and cosine, gradients clipped for each part of
the network by itself, bfloat16 autocast of the aggregator. Weights of the exponential moving
average are what is validated and kept.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vggt_ros.model import VGGT
from vggt_ros.model.block import Block
from vggt_ros.training.losses import LossSettings, compute_losses
from vggt_ros.training.matching import MatchingLoss, matching_loss, recorded, true_places
from vggt_ros.training.samples import Sample, Source

PARTS = ('aggregator', 'camera_head', 'depth_head', 'point_head', 'track_head')
HEAD_OF = {'camera': 'camera', 'depth': 'depth', 'points': 'points', 'tracks': 'tracks'}
VALIDATION_FRAMES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """One run; everything that decides what comes out but the network and the source."""

    windows: int = 100_000  # in all; the schedule ends there
    batch: int = 16  # windows of a step, over all processes and accumulated parts
    frames: tuple[int, ...] = (2, 3, 4, 5, 6, 8)  # of a step's windows, in turn
    accumulate: int = 1  # parts that a step is computed in, to save memory
    learning_rate: float = 1e-3  # at the peak
    warm_up: float = 0.03  # share of the windows
    weight_decay: float = 0.05
    clip: float = 1.0  # largest gradient norm of each part
    ema: float = 0.999  # decay of the averaged weights per step
    frozen: tuple[str, ...] = ()  # of `PARTS`; these stay as they are
    precision: str = 'bfloat16'  # of the aggregator: 'bfloat16' or 'float32'
    recompute: bool = False  # blocks again in the backward pass, to save memory
    losses: LossSettings = field(default_factory=LossSettings)
    matching: MatchingLoss | None = None
    validate_every: int = 5_000  # windows
    validation_windows: int = 64

    def __post_init__(self) -> None:
        for name in ('windows', 'batch', 'accumulate', 'validate_every'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; expected at least 1')
        if self.batch % self.accumulate:
            raise ValueError(
                f'batch is {self.batch}; expected a multiple of accumulate, {self.accumulate}'
            )
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f'frames is {self.frames}; expected numbers of frames')
        unknown = set(self.frozen) - set(PARTS)
        if unknown:
            raise ValueError(f'frozen has {sorted(unknown)}; expected some of {PARTS}')
        if self.precision not in ('bfloat16', 'float32'):
            raise ValueError(f"precision is {self.precision!r}; expected 'bfloat16' or 'float32'")

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that have a loss."""
        return tuple(head for head in HEAD_OF if getattr(self.losses, head) is not None)

    def learning_rate_at(self, windows: int) -> float:
        """Return the rate after so many windows: linear warm-up, then half a cosine."""
        progress = windows / self.windows
        if progress < self.warm_up:
            return self.learning_rate * max(progress / self.warm_up, 1e-4)
        rest = (progress - self.warm_up) / max(1 - self.warm_up, 1e-9)
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * min(rest, 1.0)))


class Trainer:
    """A network in training, with all that has to be kept from step to step."""

    def __init__(self, model: VGGT, source: Source, settings: TrainSettings) -> None:
        """
        Prepare a run from the weights that the network has.

        :param model: on its device.
        :raises ValueError: if there is nothing to train or matching does not fit the network.
        """
        if settings.matching is not None:
            settings.matching.check(model)
        self.model, self.source, self.settings = model, source, settings
        self.windows_seen = 0
        self.rank, self.processes = _place_among_processes()
        if settings.batch % (settings.accumulate * self.processes):
            raise ValueError(
                f'batch is {settings.batch}; expected a multiple of accumulate × processes, '
                f'{settings.accumulate} × {self.processes}'
            )
        trained = [
            part for part in PARTS if part not in settings.frozen and _has_loss(part, settings)
        ]
        for part in PARTS:
            getattr(model, part).requires_grad_(part in trained)
        model.aggregator.patch_embed.mask_token.requires_grad_(False)
        self.parts = {
            part: [p for p in getattr(model, part).parameters() if p.requires_grad]
            for part in trained
        }
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = settings.recompute
        if not self.parts:
            raise ValueError('there is nothing to train: no part has both a loss and its freedom')
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parts.values(), settings.weight_decay), lr=settings.learning_rate
        )
        self.average = copy.deepcopy(model).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def step(self) -> dict[str, float]:
        """
        Learn from one batch.

        :returns: losses by name, means over the batch, and `gradient_<part>`, norms before
            clipping.
        :raises FloatingPointError: if the loss is not a number; the weights are as before.
        """
        settings = self.settings
        number = self.windows_seen // settings.batch
        frames = settings.frames[number % len(settings.frames)]
        share = settings.batch // (settings.accumulate * self.processes)
        rate = settings.learning_rate_at(self.windows_seen)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            place = (part * self.processes + self.rank) * share
            sample = self.source.windows(self.windows_seen + place, share, frames)
            losses = self.losses(sample)
            (losses['total'] / settings.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / settings.accumulate
        self._average_gradients()
        told = self._average_losses(sums)
        if not math.isfinite(told['total']):
            raise FloatingPointError(
                f'the loss is {told["total"]} after {self.windows_seen} windows; '
                'expected a number: a lower learning rate may help'
            )
        for name, parameters in self.parts.items():
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            told[f'gradient_{name}'] = float(norm)
        self.optimizer.step()
        self._move_average(number)
        self.windows_seen += settings.batch
        return told

    def losses(self, sample: Sample) -> dict[str, Tensor]:
        """Run the network on a sample and compare; see `compute_losses`."""
        settings, model = self.settings, self.model
        images, truth = sample.images, sample.truth
        size = images.shape[-2], images.shape[-1]
        grid = model.grid(size)
        rounds = model.rounds_for(settings.heads)
        queries = None if truth.tracks is None else truth.tracks[:, 0]
        lower = settings.precision == 'bfloat16'
        with (
            torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=lower),
            recorded(model, settings.matching) as records,
        ):
            kept = model.aggregate(model.encode(images), grid, rounds)
        prediction = model.decode(kept, size, queries, settings.heads)
        losses = compute_losses(prediction, truth, settings.losses)
        if settings.matching is not None:
            found = matching_loss(
                records,
                true_places(truth, grid),
                model.aggregator.special_tokens,
                settings.matching,
            )
            losses |= found
            losses['total'] = losses['total'] + settings.matching.weight * found['matching']
        return losses

    def _average_gradients(self) -> None:
        if self.processes == 1:
            return
        for parameters in self.parts.values():
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.processes

    def _average_losses(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return means over the processes; waits for the device once."""
        values = torch.stack(list(sums.values()))
        if self.processes > 1:
            dist.all_reduce(values)
        return dict(zip(sums, (values / self.processes).tolist(), strict=True))

    @torch.no_grad()
    def _move_average(self, number: int) -> None:
        # The first steps move fast: their average would only remember the beginning.
        decay = min(self.settings.ema, (1 + number) / (10 + number))
        kept, new = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(kept, new, 1 - decay)

    @torch.no_grad()
    def validate(self, source: Source) -> dict[str, float]:
        """Return the mean losses of the averaged weights on windows of another source."""
        settings, weights = self.settings, self.model
        self.model = self.average
        sums: dict[str, float] = {}
        count = max(1, settings.validation_windows // settings.batch)
        try:
            for part in range(count):
                sample = source.windows(part * settings.batch, settings.batch, VALIDATION_FRAMES)
                for name, value in self.losses(sample).items():
                    sums[name] = sums.get(name, 0.0) + float(value) / count
        finally:
            self.model = weights
        return sums

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs."""
        return {
            'windows_seen': self.windows_seen,
            'settings': asdict(self.settings),
            'config': self.model.config.to_dict(),
            'model': self.model.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """
        Go on from a state.

        :raises ValueError: if it is of another network.
        """
        if state['config'] != self.model.config.to_dict():
            raise ValueError('the checkpoint is of a network of another size')
        self.model.load_state_dict(state['model'])
        self.average.load_state_dict(state['average'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.windows_seen = int(state['windows_seen'])


class Curve:
    """Losses over windows, as a CSV file that a run goes on writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        if path.exists():
            with path.open(newline='') as file:
                self._columns = next(csv.reader(file), [])

    def add(self, row: dict[str, float]) -> None:
        """Append a row; columns that the file does not have yet are an error."""
        if not self._columns:
            self._columns = list(row)
            with self.path.open('w', newline='') as file:
                csv.writer(file).writerow(self._columns)
        if list(row) != self._columns:
            raise ValueError(f'{self.path} has columns {self._columns}, the row has {list(row)}')
        with self.path.open('a', newline='') as file:
            csv.writer(file).writerow([f'{value:.6g}' for value in row.values()])


def train(
    trainer: Trainer,
    validation: Source,
    folder: Path,
    until: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> None:
    """
    Train to the end of the run, validating and saving on the way.

    :param folder: gets `last.pt` (everything), `best.pt` (averaged weights of the best validation,
        with its `config.json`) and `curve.csv`; a `last.pt` that is there is gone on from.
    :param until: windows after which to stop for now; None: the run's end.
    :param progress: called after each step with the windows seen so far and the loss.
    """
    settings = trainer.settings
    folder.mkdir(parents=True, exist_ok=True)
    last, best = folder / 'last.pt', folder / 'best.pt'
    config = trainer.model.config.to_dict()
    (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n')
    lowest = math.inf
    if last.exists():
        state = torch.load(last, map_location=trainer.device, weights_only=True)
        trainer.restore(state)
        lowest = state['lowest']
        logger.info('going on after %d windows', trainer.windows_seen)
    curve = Curve(folder / 'curve.csv')
    end = min(settings.windows, until if until is not None else settings.windows)
    sums: dict[str, float] = {}
    steps, began = 0, time.monotonic()
    while trainer.windows_seen < end:
        before = trainer.windows_seen
        told = trainer.step()
        for name, value in told.items():
            sums[name] = sums.get(name, 0.0) + value
        steps += 1
        if progress is not None:
            progress(trainer.windows_seen, told['total'])
        now = trainer.windows_seen
        due = now // settings.validate_every > before // settings.validate_every
        if not due and now < end:
            continue
        seconds = time.monotonic() - began
        found = trainer.validate(validation)
        means = {name: value / steps for name, value in sums.items()}
        if trainer.rank == 0:
            curve.add(
                {
                    'windows': now,
                    'seconds': seconds,
                    'learning_rate': settings.learning_rate_at(now),
                    **{f'train_{name}': value for name, value in means.items()},
                    **{f'validation_{name}': value for name, value in found.items()},
                }
            )
            if found['total'] < lowest:
                lowest = found['total']
                _save({'model': trainer.average.state_dict(), 'windows_seen': now}, best)
            _save({**trainer.state(), 'lowest': lowest}, last)
            logger.info(
                '%d windows, %.1f/s: train %.4f, validation %s',
                now,
                steps * settings.batch / seconds,
                means['total'],
                ', '.join(f'{name} {value:.4f}' for name, value in found.items()),
            )
        sums, steps, began = {}, 0, time.monotonic()


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix('.partial')
    torch.save(state, partial)
    partial.replace(path)


def _place_among_processes() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _has_loss(part: str, settings: TrainSettings) -> bool:
    if part == 'aggregator':
        return True
    head = {'camera_head': 'camera', 'depth_head': 'depth', 'point_head': 'points'}
    return head.get(part, 'tracks') in settings.heads


def _decay_groups(parts: Iterable[list[nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Spare biases, norms and layer scales, which decay would only make smaller."""
    parameters = [parameter for part in parts for parameter in part]
    return [
        {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': decay},
        {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0},
    ]
