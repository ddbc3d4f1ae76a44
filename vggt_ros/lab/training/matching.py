# SPDX-License-Identifier: Apache-2.0
"""
Teach attention where each patch is in the other frames.

A network that starts from nothing finds no correspondence by pose and depth alone: it stays at
the mean for tens of thousands of windows. Here some heads of some global blocks are told, by
exact geometry, which token to look at: the cross-entropy of their attention with the patches that
see the same surface point in another frame. It costs no parameter and nothing at inference; it
does for a small network what the pre-trained encoder does for VGGT-1B.

Right attention alone is not enough: after 20,000 windows it found four patches of five, and the
cameras stayed at the mean, since nothing carried on *where* the patch was that it found. So a
`FlowReader`, one linear layer after each of those blocks that exists in training only, has to
read the patch's displacement from its token.

The point of a patch falls between the centres of four patches; these share its weight bilinearly,
so that attention learns the place to a fraction of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vggt_ros.geometry.camera import project
from vggt_ros.lab.training.truth import Truth
from vggt_ros.model import VGGT
from vggt_ros.model.attention import AttentionFunction

_OCCLUDED = 0.03  # relative depth by which a point may lie behind what is seen in its pixel


@dataclass(frozen=True)
class MatchingLoss:
    """Which attention is taught what."""

    weight: float = 1.0
    blocks: tuple[int, ...] = (1, 2)  # of the global blocks
    first_frame_head: int = 0  # looks for the patch in the first frame
    any_frame_head: int = 1  # looks for it in all other frames
    flow: float = 1.0  # weight of the displacement that is read from the tokens, beside attention

    def check(self, model: VGGT) -> None:
        """:raises ValueError: if the network has no such blocks or heads."""
        agg = model.config.agg
        heads = (self.first_frame_head, self.any_frame_head)
        if not all(0 <= block < agg.depth for block in self.blocks) or not all(
            0 <= head < agg.num_heads for head in heads
        ):
            raise ValueError(
                f'matching wants blocks {self.blocks} and heads {heads}; the network has '
                f'{agg.depth} blocks of {agg.num_heads} heads'
            )


class FlowReader(nn.Module):
    """Reads from a patch's token how far its point is displaced in the first frame."""

    def __init__(self, model: VGGT, settings: MatchingLoss) -> None:
        """Begin with no displacement, for the blocks that are taught."""
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(block): nn.Linear(2 * model.config.embed_dim, 2) for block in settings.blocks}
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def loss(
        self, kept: dict[int, Tensor], targets: Tensor, special: int, grid: tuple[int, int]
    ) -> Tensor:
        """
        Compare displacements: the mean absolute error in patches, where the point is seen.

        :param kept: tokens (B, S, special + P, 2C) after the layers of the taught blocks.
        :param targets: see `true_places`.
        """
        centres = torch.cartesian_prod(*(torch.arange(side) for side in grid)).to(targets)
        to_first = targets[:, 1:, :, 0]  # (B, S - 1, P, P)
        known = to_first.sum(-1)
        expected = to_first @ centres - known[..., None] * centres
        errors = [
            (layer(kept[int(block)][:, 1:, special:]) - expected).abs().mean(-1)
            for block, layer in self.layers.items()
        ]
        total = (torch.stack(errors).mean(0) * known).sum()
        return total / known.sum().clamp(min=1)


@contextmanager
def record_attention(
    model: VGGT, settings: MatchingLoss | None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """
    Record queries and keys of the chosen blocks while the network runs.

    :param settings: None records nothing.
    :returns: a list that fills with (B, heads, N, D) queries and keys, block by block.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def recording(attend: AttentionFunction) -> AttentionFunction:
        def record(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((q, k))
            return attend(q, k, v)

        return record

    modules = [
        model.aggregator.global_blocks[index].attn
        for index in (settings.blocks if settings else ())
    ]
    before = [module.attend for module in modules]
    for module in modules:
        module.attend = recording(module.attend)
    try:
        yield kept
    finally:
        for module, old in zip(modules, before, strict=True):
            module.attend = old


def matching_loss(
    kept: list[tuple[Tensor, Tensor]],
    targets: Tensor,
    special: int,
    settings: MatchingLoss,
) -> dict[str, Tensor]:
    """
    Compare attention with the true places of the patches.

    :param kept: see `recorded`.
    :param targets: see `true_places`.
    :param special: tokens of each frame before its patches.
    :returns: `matching`, the mean cross-entropy, and `matching_first`, the attention's share on
        the right patches of the first frame.
    """
    frames, patches = targets.shape[1:3]
    to_first = targets[:, 1:, :, 0]  # (B, S - 1, P, P)
    others = targets / targets.sum(dim=(3, 4), keepdim=True).clamp(min=1e-6)
    first, every = settings.first_frame_head, settings.any_frame_head
    entropies, shares = [], []
    for queries, keys in kept:
        q, k = (tensor.unflatten(2, (frames, special + patches)) for tensor in (queries, keys))
        to_one = _log_attention(q[:, first, 1:, special:], k[:, first])[..., 0, special:]
        entropies.append(-(to_first * to_one).sum() / to_first.sum().clamp(min=1))
        to_all = _log_attention(q[:, every, :, special:], k[:, every])[..., special:]
        entropies.append(-(others * to_all).sum() / others.sum().clamp(min=1))
        with torch.no_grad():
            right = ((to_first > 0) * to_one.exp()).sum(-1)
            known = to_first.sum(-1) > 0
            shares.append((right * known).sum() / known.sum().clamp(min=1))
    return {
        'matching': torch.stack(entropies).mean(),
        'matching_first': torch.stack(shares).mean(),
    }


def _log_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """
    Return the logarithm of the attention of one head.

    :param queries: (B, Q, P, D), of some frames' patches.
    :param keys: (B, S, T, D), of all tokens of all frames.
    :returns: (B, Q, P, S, T).
    """
    scale = queries.shape[-1] ** -0.5
    logits = queries.flatten(1, 2).float() @ keys.flatten(1, 2).float().transpose(1, 2) * scale
    logs: Tensor = logits.log_softmax(-1)
    return logs.unflatten(2, keys.shape[1:3]).unflatten(1, queries.shape[1:3])


@torch.no_grad()
def true_places(truth: Truth, grid: tuple[int, int]) -> Tensor:
    """
    Find where the point in the middle of each patch is seen in the other frames.

    :param grid: patches (h, w) of an image.
    :returns: (B, S, P, S, P): of query frame and patch, weights of the patches of each frame that
        see the same point. They sum to 1 per frame, or to 0 where it is not seen, and in the
        frame itself.
    """
    frames, height, width = truth.depth.shape[1:]
    h, w = grid
    tall, wide = height // h, width // w
    rows, columns = slice(tall // 2, None, tall), slice(wide // 2, None, wide)
    points = truth.points[:, :, rows, columns].flatten(2, 3)  # (B, S, P, 3)
    known = truth.valid[:, :, rows, columns].flatten(2, 3)
    everywhere = points.flatten(1, 2)[:, None].expand(-1, frames, -1, -1)
    pixels, in_camera = project(everywhere, truth.camera_from_world, truth.intrinsics)
    limit = pixels.new_tensor([width - 1, height - 1])
    inside = ((pixels >= 0) & (pixels <= limit)).all(-1) & (in_camera[..., 2] > 0)
    pixels = torch.where(inside[..., None], pixels, 0.0)
    x, y = pixels.round().long().unbind(-1)
    seen_depth = truth.depth.flatten(2).gather(2, y * width + x)
    seen = inside & (in_camera[..., 2] < (1 + _OCCLUDED) * seen_depth)
    seen &= known.flatten(1)[:, None]
    place = (pixels + 0.5) / pixels.new_tensor([wide, tall]) - 0.5
    by_column, by_row = (
        (1 - (place[..., axis, None] - torch.arange(count, device=place.device)).abs()).clamp(0)
        for axis, count in ((0, w), (1, h))
    )
    weights = (by_row[..., :, None] * by_column[..., None, :]).flatten(-2)  # (B, S, S·P, P)
    # Near the border of the image a part of the weight has no patch to go to.
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) * seen[..., None]
    weights = weights.unflatten(2, (frames, -1)).permute(0, 2, 3, 1, 4)
    same = torch.eye(frames, dtype=torch.bool, device=weights.device)
    return weights.masked_fill(same[None, :, None, :, None], 0.0)
