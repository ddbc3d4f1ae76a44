# SPDX-License-Identifier: Apache-2.0
"""
The settings of a training run, and named recipes; `docs/training.md` compares them.

Each recipe is a full `TrainSettings`; only the budget is left to the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from vggt_ros.lab.training.losses import CameraLoss, DenseLoss, LossSettings, TrackLoss
from vggt_ros.lab.training.matching import MatchingLoss
from vggt_ros.model.vggt import ALL_HEADS

PARTS = ('aggregator', 'camera_head', 'depth_head', 'point_head', 'track_head')


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run; with network and dataset they determine its result."""

    windows: int = 100_000  # in total; the schedule ends there
    batch: int = 16  # windows of a step, over all processes and accumulated parts
    frames: tuple[int, ...] = (2, 3, 4, 5, 6, 8)  # of a step's windows, cyclically
    accumulate: int = 1  # parts of a step, computed one after the other to save memory
    # Heads to run in each step, cyclically; those without a loss do not run. () runs all.
    head_schedule: tuple[tuple[str, ...], ...] = ()
    # Frames of a window that the dense heads, which cost the most, decode, different ones in each
    # step; 0: all.
    dense_frames: int = 0
    learning_rate: float = 1e-3  # at the peak
    warm_up: float = 0.03  # share of the windows
    weight_decay: float = 0.05
    clip: float = 1.0  # largest gradient norm of each part
    ema: float = 0.999  # decay of the averaged weights per step
    frozen: tuple[str, ...] = ()  # of `PARTS`; not trained
    precision: str = 'bfloat16'  # of the aggregator: 'bfloat16' or 'float32'
    recompute: bool = False  # gradient checkpointing of blocks, to save memory
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
            raise ValueError(f'frames is {self.frames}; expected positive numbers')
        if self.dense_frames < 0:
            raise ValueError(f'dense_frames is {self.dense_frames}; expected at least 0')
        for heads in self.head_schedule:
            if not set(heads) <= set(ALL_HEADS) or not set(heads) & set(self.heads):
                raise ValueError(
                    f'head_schedule has {heads}; expected heads of {ALL_HEADS} that have a loss'
                )
        unknown = set(self.frozen) - set(PARTS)
        if unknown:
            raise ValueError(f'frozen has {sorted(unknown)}; expected some of {PARTS}')
        if self.precision not in ('bfloat16', 'float32'):
            raise ValueError(f"precision is {self.precision!r}; expected 'bfloat16' or 'float32'")

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the heads that have a loss."""
        return tuple(head for head in ALL_HEADS if getattr(self.losses, head) is not None)

    def heads_at(self, step: int) -> tuple[str, ...]:
        """Return the heads that run in a step."""
        if not self.head_schedule:
            return self.heads
        # each entry with all `frames`
        scheduled = self.head_schedule[step // len(self.frames) % len(self.head_schedule)]
        return tuple(head for head in self.heads if head in scheduled)

    def learning_rate_at(self, windows: int) -> float:
        """Return the rate after a number of windows: linear warm-up, then half a cosine."""
        progress = windows / self.windows
        if progress < self.warm_up:
            return self.learning_rate * max(progress / self.warm_up, 1e-4)
        rest = (progress - self.warm_up) / max(1 - self.warm_up, 1e-9)
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * min(rest, 1.0)))


# --- recipes

HEIGHT, WIDTH = 84, 112  # pixels of the small network's training images
QUERIES = 16  # points to track in each window

_LOSSES = LossSettings(
    camera=CameraLoss(),
    depth=DenseLoss(),
    points=DenseLoss(shape='normal'),
    tracks=TrackLoss(),
)

# The dense heads take two thirds of a step that runs everything: two frames of each window, and
# depth, points and tracks in alternation, cost a third and cover three times as many rooms.
_WITHOUT_MATCHING = TrainSettings(
    losses=_LOSSES,
    head_schedule=(('camera', 'depth'), ('camera', 'points'), ('camera', 'tracks')),
    dense_frames=2,
)

_ON_CPU = TrainSettings(
    windows=200_000,
    batch=16,
    frames=(4,),
    losses=replace(_LOSSES, tracks=None),
    head_schedule=(('camera', 'depth'), ('camera',), ('camera', 'depth'), ('camera', 'points')),
    dense_frames=1,
    matching=MatchingLoss(),
    validate_every=2_000,
    validation_windows=32,
)

RECIPES: dict[str, TrainSettings] = {
    # With attention supervised: each patch's match in the first frame and in all others.
    'small': replace(_WITHOUT_MATCHING, matching=MatchingLoss()),
    # The same in the last blocks, which leaves fewer blocks to compute a pose from the matches.
    'late_matching': replace(_WITHOUT_MATCHING, matching=MatchingLoss(blocks=(2, 3))),
    # Pose, depth, points and tracks alone, as VGGT is trained from a pre-trained encoder.
    'no_matching': _WITHOUT_MATCHING,
    # A day on a CPU: images of 84 x 56 pixels, one window length, tracks untrained.
    'small_on_cpu': _ON_CPU,
    # Its second half, once the matches are found and the poses begin to improve.
    'small_on_cpu_poses': replace(
        _ON_CPU,
        losses=replace(_ON_CPU.losses, camera=CameraLoss(weight=10.0)),
        matching=MatchingLoss(weight=0.3),
    ),
    # A trained network on one's own recordings: the heads learn, the aggregator stays.
    'fine_tune': TrainSettings(
        windows=20_000,
        batch=4,
        frames=(2, 4, 6, 8),
        learning_rate=5e-5,
        warm_up=0.05,
        frozen=('aggregator',),
        validate_every=1000,
        validation_windows=32,
    ),
}
