# SPDX-License-Identifier: Apache-2.0
"""
Supervise attention with the true matches of each patch in the other frames.

A network trained from scratch learns no correspondence from pose and depth alone: its poses stay
at the mean for tens of thousands of windows. Here some heads of some global blocks are supervised
by exact geometry: the cross-entropy between their attention and the patches that see the same
surface point in another frame. It adds no parameter and no cost at inference; for a small network
it replaces the pre-trained encoder of VGGT-1B.

Correct attention alone is not enough: after 20,000 windows four patches of five were matched and
the cameras still stayed at the mean, since no token contained *where* the matching patch was. So a
`FlowProbe`, one linear layer after each supervised block, used in training only, regresses the
patch's displacement from its token.

The point of a patch projects between the centres of four patches; these share its weight
bilinearly, so that attention learns the position to a fraction of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vggt_ros.geometry.camera import project
from vggt_ros.lab.training.dataset import GroundTruth
from vggt_ros.model import VGGT
from vggt_ros.model.attention import AttentionFunction

_OCCLUDED = (
    0.03  # relative depth of a point behind the visible surface, above which it is occluded
)


@dataclass(frozen=True)
class MatchingLoss:
    """Which blocks and heads are supervised."""

    weight: float = 1.0
    blocks: tuple[int, ...] = (1, 2)  # of the global blocks
    first_frame_head: int = 0  # attends to the match in the first frame
    any_frame_head: int = 1  # attends to the matches in all other frames
    flow: float = 1.0  # weight of the flow probe's loss

    def validate(self, model: VGGT) -> None:
        """:raises ValueError: if the network has no such blocks or heads."""
        agg = model.config.agg
        heads = (self.first_frame_head, self.any_frame_head)
        if not all(0 <= block < agg.depth for block in self.blocks) or not all(
            0 <= head < agg.num_heads for head in heads
        ):
            raise ValueError(
                f'matching needs blocks {self.blocks} and heads {heads}; the network has '
                f'{agg.depth} blocks of {agg.num_heads} heads'
            )


class FlowProbe(nn.Module):
    """Regresses a patch's displacement between its own and the first frame from its token."""

    def __init__(self, model: VGGT, settings: MatchingLoss) -> None:
        """Create zero-initialised layers for the supervised blocks."""
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(block): nn.Linear(2 * model.config.embed_dim, 2) for block in settings.blocks}
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def loss(
        self, tokens: dict[int, Tensor], targets: Tensor, special: int, grid: tuple[int, int]
    ) -> Tensor:
        """
        Compute the mean absolute error in patches, over visible points.

        :param tokens: (B, S, special + P, 2C) after each supervised block, by its index.
        :param targets: see `matching_targets`.
        """
        centres = torch.cartesian_prod(*(torch.arange(side) for side in grid)).to(targets)
        to_first = targets[:, 1:, :, 0]  # (B, S - 1, P, P)
        visible = to_first.sum(-1)
        expected = to_first @ centres - visible[..., None] * centres
        errors = [
            (layer(tokens[int(block)][:, 1:, special:]) - expected).abs().mean(-1)
            for block, layer in self.layers.items()
        ]
        total = (torch.stack(errors).mean(0) * visible).sum()
        return total / visible.sum().clamp(min=1)


@contextmanager
def record_attention(
    model: VGGT, settings: MatchingLoss | None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """
    Record queries and keys of the supervised blocks while the network runs.

    :param settings: None records nothing.
    :returns: a list that receives (B, heads, N, D) queries and keys, block by block.
    """
    records: list[tuple[Tensor, Tensor]] = []

    def recording(attend: AttentionFunction) -> AttentionFunction:
        def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            records.append((q, k))
            return attend(q, k, v)

        return record

    modules = [
        model.aggregator.global_blocks[index].attn
        for index in (settings.blocks if settings else ())
    ]
    originals = [module.attend for module in modules]
    for module in modules:
        module.attend = recording(module.attend)
    try:
        yield records
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.attend = original


def matching_loss(
    records: list[tuple[Tensor, Tensor]],
    targets: Tensor,
    special: int,
    settings: MatchingLoss,
) -> dict[str, Tensor]:
    """
    Compare attention with the true matches.

    :param records: queries and keys, see `record_attention`.
    :param targets: see `matching_targets`.
    :param special: number of special tokens before the patches of each frame.
    :returns: `matching`, the mean cross-entropy, and `matching_first`, the share of attention on
        the true matches in the first frame.
    """
    frames, patches = targets.shape[1:3]
    to_first = targets[:, 1:, :, 0]  # (B, S - 1, P, P)
    to_others = targets / targets.sum(dim=(3, 4), keepdim=True).clamp(min=1e-6)
    first, every = settings.first_frame_head, settings.any_frame_head
    entropies, shares = [], []
    for queries, keys in records:
        q, k = (tensor.unflatten(2, (frames, special + patches)) for tensor in (queries, keys))
        log_first = _log_attention(q[:, first, 1:, special:], k[:, first])[..., 0, special:]
        entropies.append(-(to_first * log_first).sum() / to_first.sum().clamp(min=1))
        log_all = _log_attention(q[:, every, :, special:], k[:, every])[..., special:]
        entropies.append(-(to_others * log_all).sum() / to_others.sum().clamp(min=1))
        with torch.no_grad():
            correct = ((to_first > 0) * log_first.exp()).sum(-1)
            visible = to_first.sum(-1) > 0
            shares.append((correct * visible).sum() / visible.sum().clamp(min=1))
    return {
        'matching': torch.stack(entropies).mean(),
        'matching_first': torch.stack(shares).mean(),
    }


def _log_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """
    Return the logarithm of the attention of one head.

    :param queries: (B, Q, P, D), patches of some frames.
    :param keys: (B, S, T, D), all tokens of all frames.
    :returns: (B, Q, P, S, T).
    """
    scale = queries.shape[-1] ** -0.5
    logits = queries.flatten(1, 2).float() @ keys.flatten(1, 2).float().transpose(1, 2) * scale
    logs: Tensor = logits.log_softmax(-1)
    return logs.unflatten(2, keys.shape[1:3]).unflatten(1, queries.shape[1:3])


@torch.no_grad()
def matching_targets(truth: GroundTruth, grid: tuple[int, int]) -> Tensor:
    """
    Project the point at the centre of each patch into the other frames.

    :param grid: patches (h, w) of an image.
    :returns: (B, S, P, S, P): for query frame and patch, the weights of the patches of each frame
        that see the same point. They sum to 1 per frame, or to 0 where it is not visible, and in
        the query frame itself.
    """
    frames, height, width = truth.depth.shape[1:]
    h, w = grid
    patch_height, patch_width = height // h, width // w
    rows = slice(patch_height // 2, None, patch_height)
    columns = slice(patch_width // 2, None, patch_width)
    points = truth.points[:, :, rows, columns].flatten(2, 3)  # (B, S, P, 3)
    valid = truth.valid[:, :, rows, columns].flatten(2, 3)
    points = points.flatten(1, 2)[:, None].expand(-1, frames, -1, -1)
    pixels, in_camera = project(points, truth.camera_from_world, truth.intrinsics)
    limit = pixels.new_tensor([width - 1, height - 1])
    inside = ((pixels >= 0) & (pixels <= limit)).all(-1) & (in_camera[..., 2] > 0)
    pixels = torch.where(inside[..., None], pixels, 0.0)
    x, y = pixels.round().long().unbind(-1)
    surface_depth = truth.depth.flatten(2).gather(2, y * width + x)
    visible = inside & (in_camera[..., 2] < (1 + _OCCLUDED) * surface_depth)
    visible &= valid.flatten(1)[:, None]
    position = (pixels + 0.5) / pixels.new_tensor([patch_width, patch_height]) - 0.5
    by_column, by_row = (
        (1 - (position[..., axis, None] - torch.arange(count).to(position)).abs()).clamp(0)
        for axis, count in ((0, w), (1, h))
    )
    weights = (by_row[..., :, None] * by_column[..., None, :]).flatten(-2)  # (B, S, S·P, P)
    # Near the border of the image some of the weight falls outside of all patches.
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) * visible[..., None]
    weights = weights.unflatten(2, (frames, -1)).permute(0, 2, 3, 1, 4)
    same = torch.eye(frames, dtype=torch.bool, device=weights.device)
    return weights.masked_fill(same[None, :, None, :, None], 0.0)
