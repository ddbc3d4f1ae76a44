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
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vggt_ros.lab.training.losses import LossSettings, compute_losses
from vggt_ros.lab.training.matching import (
    FlowReader,
    MatchingLoss,
    matching_loss,
    record_attention,
    true_places,
)
from vggt_ros.lab.training.samples import Sample, Source
from vggt_ros.model import VGGT
from vggt_ros.model.attention import eager_attention, use_attention
from vggt_ros.model.block import Block
from vggt_ros.model.vggt import ALL_HEADS

PARTS = ('aggregator', 'camera_head', 'depth_head', 'point_head', 'track_head')
LAST, BEST, CONFIG = 'last.pt', 'best.pt', 'config.json'  # files of a run
SAVE_SECONDS = 300.0  # that an interruption may cost
DENSE, SPARSE = ('depth', 'points'), ('camera', 'tracks')

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """One run; everything that decides what comes out but the network and the source."""

    windows: int = 100_000  # in all; the schedule ends there
    batch: int = 16  # windows of a step, over all processes and accumulated parts
    frames: tuple[int, ...] = (2, 3, 4, 5, 6, 8)  # of a step's windows, in turn
    accumulate: int = 1  # parts that a step is computed in, to save memory
    # Heads that run in each step, in turn; those without a loss do not run. () runs all.
    turns: tuple[tuple[str, ...], ...] = ()
    # Frames of a window that the dense heads, which cost the most, are shown; 0: all. Other ones
    # in each step.
    dense_frames: int = 0
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
        if self.dense_frames < 0:
            raise ValueError(f'dense_frames is {self.dense_frames}; expected 0, for all, or more')
        for turn in self.turns:
            if not set(turn) <= set(ALL_HEADS) or not set(turn) & set(self.heads):
                raise ValueError(
                    f'turns has {turn}; expected heads of {ALL_HEADS} that have a loss'
                )
        unknown = set(self.frozen) - set(PARTS)
        if unknown:
            raise ValueError(f'frozen has {sorted(unknown)}; expected some of {PARTS}')
        if self.precision not in ('bfloat16', 'float32'):
            raise ValueError(f"precision is {self.precision!r}; expected 'bfloat16' or 'float32'")

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that have a loss."""
        return tuple(head for head in ALL_HEADS if getattr(self.losses, head) is not None)

    def heads_at(self, step: int) -> tuple[str, ...]:
        """The heads that run in a step."""
        if not self.turns:
            return self.heads
        turn = self.turns[step // len(self.frames) % len(self.turns)]  # each with all `frames`
        return tuple(head for head in self.heads if head in turn)

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
        if next(model.parameters()).device.type == 'cpu':
            # The backward pass of torch's fused attention takes ten times as long there: 15 ms
            # against 1.3 ms for 16 windows of 116 bfloat16 tokens and 3 heads.
            use_attention(model, eager_attention)
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
                module.gradient_checkpointing = settings.recompute
        if not self.parts:
            raise ValueError('there is nothing to train: no part has both a loss and its freedom')
        self.reader: FlowReader | None = None
        if settings.matching is not None and settings.matching.flow > 0:
            self.reader = FlowReader(model, settings.matching).to(self.device)
            self.parts['reader'] = list(self.reader.parameters())
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parts.values(), settings.weight_decay),
            lr=settings.learning_rate,
            fused=True,
        )
        self.average = copy.deepcopy(model).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def step(self) -> dict[str, float]:
        """
        Learn from one batch.

        :returns: losses by name, means over the batch, and `gradient_<part>`, norms before
            clipping, of the heads whose turn it is.
        :raises FloatingPointError: if a loss or a gradient is not a number; the weights are as
            before.
        """
        settings = self.settings
        number = self.windows_seen // settings.batch
        frames = settings.frames[number % len(settings.frames)]
        first_dense = number // (len(settings.frames) * max(1, len(settings.turns)))
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
            losses = self.losses(sample, settings.heads_at(number), first_dense)
            (losses['total'] / settings.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / settings.accumulate
        moving = {
            name: parameters
            for name, parameters in self.parts.items()
            if any(parameter.grad is not None for parameter in parameters)
        }
        self._average_gradients(moving.values())
        told = self._average_losses(sums)
        for name, parameters in moving.items():
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            told[f'gradient_{name}'] = float(norm)
        broken = {name: value for name, value in told.items() if not math.isfinite(value)}
        if broken:
            raise FloatingPointError(
                f'after {self.windows_seen} windows there are losses or gradients that are no '
                f'numbers: {broken}; a lower learning rate may help'
            )
        self.optimizer.step()
        self._move_average(number)
        self.windows_seen += settings.batch
        return told

    def losses(
        self, sample: Sample, heads: Collection[str], first_dense: int | None = None
    ) -> dict[str, Tensor]:
        """
        Run the network on a sample and compare; see `compute_losses`.

        :param first_dense: where the frames begin that the dense heads are shown; None: all are.
        """
        settings, model = self.settings, self.model
        images, truth = sample.images, sample.truth
        size = images.shape[-2], images.shape[-1]
        grid = model.patch_grid(size)
        layers = set(model.layers_for(heads))
        if self.reader is not None and settings.matching is not None:
            layers |= set(settings.matching.blocks)
        queries = None if truth.tracks is None else truth.tracks[:, 0]
        lower = settings.precision == 'bfloat16'
        with (
            torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=lower),
            record_attention(model, settings.matching) as records,
        ):
            kept = model.aggregate(model.encode(images), grid, layers)
        shown, places = truth, slice(None)
        if first_dense is not None and 0 < settings.dense_frames < images.shape[1]:
            places = slice(
                first := first_dense % (images.shape[1] - settings.dense_frames + 1),
                first + settings.dense_frames,
            )
            shown = replace(
                truth,
                depth=truth.depth[:, places],
                points=truth.points[:, places],
                valid=truth.valid[:, places],
            )
        losses: dict[str, Tensor] = {}
        for group, compared in ((DENSE, shown), (SPARSE, truth)):
            running = [head for head in group if head in heads]
            if not running:
                continue
            read = kept if group is SPARSE else {i: kept[i][:, places] for i in kept}
            prediction = model.decode(read, size, queries, running)
            found = compute_losses(prediction, compared, settings.losses)
            losses = {**losses, **found, 'total': losses.get('total', 0) + found['total']}
        if settings.matching is not None:
            targets = true_places(truth, grid)
            special = model.aggregator.num_special_tokens
            losses |= matching_loss(records, targets, special, settings.matching)
            losses['total'] = losses['total'] + settings.matching.weight * losses['matching']
            if self.reader is not None:
                losses['flow'] = self.reader.loss(kept, targets, special, grid)
                losses['total'] = losses['total'] + settings.matching.flow * losses['flow']
        return losses

    def _average_gradients(self, parts: Iterable[list[nn.Parameter]]) -> None:
        if self.processes == 1:
            return
        gradients = []
        for parameters in parts:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        # In one message: four hundred small ones took half of each step.
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(joined)
        joined /= self.processes
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, joined.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

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
        """
        Return the mean losses of the averaged weights on windows of another source.

        Every process calls this and gets the same.
        """
        settings, weights = self.settings, self.model
        self.model = self.average
        sums: dict[str, Tensor] = {}
        count = max(1, settings.validation_windows // settings.batch)
        share = settings.batch // self.processes
        frames = max(settings.frames)
        try:
            for part in range(count):
                first = part * settings.batch + self.rank * share
                sample = source.windows(first, share, frames)
                for name, value in self.losses(sample, settings.heads).items():
                    sums[name] = sums.get(name, 0) + value / count
        finally:
            self.model = weights
        return self._average_losses(sums)

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs."""
        return {
            'windows_seen': self.windows_seen,
            'settings': asdict(self.settings),
            'config': self.model.config.to_dict(),
            'model': self.model.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'reader': {} if self.reader is None else self.reader.state_dict(),
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
        if self.reader is not None:
            self.reader.load_state_dict(state['reader'])
        self.windows_seen = int(state['windows_seen'])


def add_row(path: Path, row: dict[str, float]) -> None:
    """Append a row to a CSV file; a column that it does not have yet is added."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline='') as file:
            rows = list(csv.DictReader(file))
    rows.append({name: f'{value:.6g}' for name, value in row.items()})
    columns = dict.fromkeys(name for each in rows for name in each)
    with written_whole(path) as partial, partial.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


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
    last, best = folder / LAST, folder / BEST
    if trainer.rank == 0:
        config = trainer.model.config.to_dict()
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + '\n')
    lowest = math.inf
    if last.exists():
        state = torch.load(last, map_location=trainer.device, weights_only=True)
        trainer.restore(state)
        lowest = state['lowest']
        logger.info('going on after %d windows', trainer.windows_seen)
    end = min(settings.windows, until if until is not None else settings.windows)

    def save() -> None:
        with written_whole(last) as partial:
            torch.save({**trainer.state(), 'lowest': lowest}, partial)

    rows: list[dict[str, float]] = []
    began = saved = time.monotonic()
    while trainer.windows_seen < end:
        before = trainer.windows_seen
        told = trainer.step()
        rows.append(told)
        if progress is not None:
            progress(trainer.windows_seen, told['total'])
        now = trainer.windows_seen
        due = now // settings.validate_every > before // settings.validate_every
        if not due and now < end:
            if trainer.rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            continue
        seconds = time.monotonic() - began
        found = trainer.validate(validation)
        means = _means_by_name(rows)
        if trainer.rank == 0:
            add_row(
                folder / 'curve.csv',
                {
                    'windows': now,
                    'seconds': seconds,
                    'learning_rate': settings.learning_rate_at(now),
                    **{f'train_{name}': value for name, value in means.items()},
                    **{f'validation_{name}': value for name, value in found.items()},
                },
            )
            if found['total'] < lowest:
                lowest = found['total']
                with written_whole(best) as partial:
                    torch.save(
                        {'model': trainer.average.state_dict(), 'windows_seen': now}, partial
                    )
            save()
            logger.info(
                '%d windows, %.1f/s: train %.4f, validation %s',
                now,
                len(rows) * settings.batch / seconds,
                means['total'],
                ', '.join(f'{name} {value:.4f}' for name, value in found.items()),
            )
        rows = []
        began = saved = time.monotonic()


def _means_by_name(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average what the steps told, each figure over those that told it."""
    names = sorted({name for row in rows for name in row})
    told = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in told.items()}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to that becomes `path` at the end, whole or not at all."""
    partial = path.with_name(f'{path.name}.partial')
    yield partial
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
