# SPDX-License-Identifier: Apache-2.0
"""
A training step: data, losses, gradients, optimiser and averaged weights.

Data and schedule of a step depend on its number alone: on the CPU, a run resumed from a checkpoint
ends with the same bits as an uninterrupted one. Several processes (`torchrun`) share each step's
windows and average their gradients.

The optimiser follows VGGT: AdamW, linear warm-up and cosine decay, gradients clipped separately
for each part of the network, bfloat16 autocast of the aggregator. Validation and export use the
exponential moving average of the weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vggt_ros.lab.training.dataset import Dataset, TrainingBatch
from vggt_ros.lab.training.losses import compute_losses
from vggt_ros.lab.training.matching import (
    FlowProbe,
    matching_loss,
    matching_targets,
    record_attention,
)
from vggt_ros.lab.training.recipes import PARTS, TrainSettings
from vggt_ros.model import VGGT
from vggt_ros.model.attention import eager_attention, use_attention
from vggt_ros.model.block import Block

DENSE, SPARSE = ('depth', 'points'), ('camera', 'tracks')


class Trainer:
    """A network in training, and the state kept between steps."""

    def __init__(self, model: VGGT, dataset: Dataset, settings: TrainSettings) -> None:
        """
        Prepare a run from the network's current weights.

        :param model: on its device.
        :raises ValueError: if there is nothing to train or matching does not fit the network.
        """
        if settings.matching is not None:
            settings.matching.validate(model)
        if next(model.parameters()).device.type == 'cpu':
            # The backward pass of torch's fused attention takes ten times as long there: 15 ms
            # against 1.3 ms for 16 windows of 116 bfloat16 tokens and 3 heads.
            use_attention(model, eager_attention)
        self.model, self.dataset, self.settings = model, dataset, settings
        self.windows_seen = 0
        self.rank, self.world_size = _rank_and_world_size()
        if settings.batch % (settings.accumulate * self.world_size):
            raise ValueError(
                f'batch is {settings.batch}; expected a multiple of accumulate × processes, '
                f'{settings.accumulate} × {self.world_size}'
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
            raise ValueError('nothing to train: every part is frozen or has no loss')
        self.flow_probe: FlowProbe | None = None
        if settings.matching is not None and settings.matching.flow > 0:
            self.flow_probe = FlowProbe(model, settings.matching).to(self.device)
            self.parts['flow_probe'] = list(self.flow_probe.parameters())
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.parts.values(), settings.weight_decay),
            lr=settings.learning_rate,
            fused=True,
        )
        self.average = copy.deepcopy(model).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.model.parameters()).device

    def step(self) -> dict[str, float]:
        """
        Take one optimiser step.

        :returns: losses by name, means over the batch, and `gradient_<part>`, norms before
            clipping, of the parts trained in this step.
        :raises FloatingPointError: if a loss or a gradient is not finite; the weights are
            unchanged.
        """
        settings = self.settings
        number = self.windows_seen // settings.batch
        frames = settings.frames[number % len(settings.frames)]
        first_dense = number // (len(settings.frames) * max(1, len(settings.head_schedule)))
        count = settings.batch // (settings.accumulate * self.world_size)
        rate = settings.learning_rate_at(self.windows_seen)
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            offset = (part * self.world_size + self.rank) * count
            batch = self.dataset.batch(self.windows_seen + offset, count, frames)
            losses = self.losses(batch, settings.heads_at(number), first_dense)
            (losses['total'] / settings.accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / settings.accumulate
        trained = {
            name: parameters
            for name, parameters in self.parts.items()
            if any(parameter.grad is not None for parameter in parameters)
        }
        self._average_gradients(trained.values())
        metrics = self._average_losses(sums)
        for name, parameters in trained.items():
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            metrics[f'gradient_{name}'] = float(norm)
        not_finite = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if not_finite:
            raise FloatingPointError(
                f'after {self.windows_seen} windows losses or gradients are not finite: '
                f'{not_finite}; a lower learning rate may help'
            )
        self.optimizer.step()
        self._update_average(number)
        self.windows_seen += settings.batch
        return metrics

    def losses(
        self, batch: TrainingBatch, heads: Collection[str], first_dense: int | None = None
    ) -> dict[str, Tensor]:
        """
        Run the network on a batch and compute the losses; see `compute_losses`.

        :param first_dense: selects the `dense_frames` frames that the dense heads decode; None:
            all.
        """
        settings, model = self.settings, self.model
        images, truth = batch.images, batch.truth
        size = images.shape[-2], images.shape[-1]
        grid = model.patch_grid(size)
        layers = set(model.layers_for(heads))
        if self.flow_probe is not None and settings.matching is not None:
            layers |= set(settings.matching.blocks)
        queries = None if truth.tracks is None else truth.tracks[:, 0]
        lower = settings.precision == 'bfloat16'
        with (
            torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=lower),
            record_attention(model, settings.matching) as records,
        ):
            tokens = model.aggregate(model.encode(images), grid, layers)
        dense_truth, dense = truth, slice(None)
        if first_dense is not None and 0 < settings.dense_frames < images.shape[1]:
            first = first_dense % (images.shape[1] - settings.dense_frames + 1)
            dense = slice(first, first + settings.dense_frames)
            dense_truth = replace(
                truth,
                depth=truth.depth[:, dense],
                points=truth.points[:, dense],
                valid=truth.valid[:, dense],
            )
        losses: dict[str, Tensor] = {}
        for group, group_truth in ((DENSE, dense_truth), (SPARSE, truth)):
            running = [head for head in group if head in heads]
            if not running:
                continue
            inputs = tokens if group is SPARSE else {i: tokens[i][:, dense] for i in tokens}
            prediction = model.decode(inputs, size, queries, running)
            new = compute_losses(prediction, group_truth, settings.losses)
            losses = {**losses, **new, 'total': losses.get('total', 0) + new['total']}
        if settings.matching is not None:
            targets = matching_targets(truth, grid)
            special = model.aggregator.num_special_tokens
            losses |= matching_loss(records, targets, special, settings.matching)
            losses['total'] = losses['total'] + settings.matching.weight * losses['matching']
            if self.flow_probe is not None:
                losses['flow'] = self.flow_probe.loss(tokens, targets, special, grid)
                losses['total'] = losses['total'] + settings.matching.flow * losses['flow']
        return losses

    def _average_gradients(self, parts: Iterable[list[nn.Parameter]]) -> None:
        if self.world_size == 1:
            return
        gradients = []
        for parameters in parts:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        # In one message: four hundred small ones took half of each step.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _average_losses(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return means over the processes, with one synchronisation of the device."""
        values = torch.stack(list(sums.values()))
        if self.world_size > 1:
            dist.all_reduce(values)
        return dict(zip(sums, (values / self.world_size).tolist(), strict=True))

    @torch.no_grad()
    def _update_average(self, number: int) -> None:
        # A shorter average at first: otherwise the initial weights would dominate it.
        decay = min(self.settings.ema, (1 + number) / (10 + number))
        average, new = list(self.average.parameters()), list(self.model.parameters())
        torch._foreach_lerp_(average, new, 1 - decay)

    @torch.no_grad()
    def validate(self, dataset: Dataset) -> dict[str, float]:
        """
        Return the mean losses of the averaged weights on another dataset.

        Every process must call this, and all get the same result.
        """
        settings, weights = self.settings, self.model
        self.model = self.average
        sums: dict[str, Tensor] = {}
        count = max(1, settings.validation_windows // settings.batch)
        local = settings.batch // self.world_size
        frames = max(settings.frames)
        try:
            for part in range(count):
                first = part * settings.batch + self.rank * local
                batch = dataset.batch(first, local, frames)
                for name, value in self.losses(batch, settings.heads).items():
                    sums[name] = sums.get(name, 0) + value / count
        finally:
            self.model = weights
        return self._average_losses(sums)

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`."""
        return {
            'windows_seen': self.windows_seen,
            'settings': asdict(self.settings),
            'config': self.model.config.to_dict(),
            'model': self.model.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'flow_probe': {} if self.flow_probe is None else self.flow_probe.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """
        Resume from a state.

        :raises ValueError: if it belongs to another network or version; nothing is loaded then.
        """
        missing = self.state().keys() - state.keys()
        if missing:
            raise ValueError(
                f'the checkpoint has no {", ".join(sorted(missing))}: it is of an earlier '
                'version, which cannot be resumed; best.pt of that run serves as --checkpoint'
            )
        if state['config'] != self.model.config.to_dict():
            raise ValueError('the checkpoint belongs to a network of another size')
        self.model.load_state_dict(state['model'])
        self.average.load_state_dict(state['average'])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.flow_probe is not None:
            self.flow_probe.load_state_dict(state['flow_probe'])
        self.windows_seen = int(state['windows_seen'])


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _has_loss(part: str, settings: TrainSettings) -> bool:
    if part == 'aggregator':
        return True
    head = {'camera_head': 'camera', 'depth_head': 'depth', 'point_head': 'points'}
    return head.get(part, 'tracks') in settings.heads


def _parameter_groups(parts: Iterable[list[nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Exclude biases, norms and layer scales from weight decay."""
    parameters = [parameter for part in parts for parameter in part]
    return [
        {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': decay},
        {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0},
    ]
