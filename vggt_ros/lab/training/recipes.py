# SPDX-License-Identifier: Apache-2.0
"""
Named ways to train the small network on synthetic rooms; `docs/training.md` compares them.

Each is a full `TrainSettings`, so that a name says everything but the budget.
"""

from __future__ import annotations

from dataclasses import replace

from vggt_ros.lab.training.loop import TrainSettings
from vggt_ros.lab.training.losses import CameraLoss, DenseLoss, LossSettings, TrackLoss
from vggt_ros.lab.training.matching import MatchingLoss

HEIGHT, WIDTH = 84, 112  # pixels of the images that the small network is trained on
QUERIES = 16  # points to track in each window

_LOSSES = LossSettings(
    camera=CameraLoss(),
    depth=DenseLoss(),
    points=DenseLoss(shape='normal'),
    tracks=TrackLoss(),
)

# The dense heads take two thirds of a step that runs everything: two frames of each window, and
# depth, points and tracks in turn, cost a third and show the network three times as many rooms.
_WITHOUT_MATCHING = TrainSettings(
    losses=_LOSSES,
    turns=(('camera', 'depth'), ('camera', 'points'), ('camera', 'tracks')),
    dense_frames=2,
)

_ON_CPU = TrainSettings(
    windows=200_000,
    batch=16,
    frames=(4,),
    losses=replace(_LOSSES, tracks=None),
    turns=(('camera', 'depth'), ('camera',), ('camera', 'depth'), ('camera', 'points')),
    dense_frames=1,
    matching=MatchingLoss(),
    validate_every=2_000,
    validation_windows=32,
)

RECIPES: dict[str, TrainSettings] = {
    # Attention taught where each patch is in the first frame, and where in all others.
    'small': replace(_WITHOUT_MATCHING, matching=MatchingLoss()),
    # The same in the last blocks only, which leaves fewer to make a pose of it.
    'late_matching': replace(_WITHOUT_MATCHING, matching=MatchingLoss(blocks=(2, 3))),
    # Pose, depth, points and tracks alone, as a pre-trained VGGT is trained.
    'no_matching': _WITHOUT_MATCHING,
    # What a CPU can do in a day: images of 84 x 56 pixels, one length, tracks left untrained.
    'small_on_cpu': _ON_CPU,
    # The second half of that, once matches are found and poses begin to follow from them.
    'small_on_cpu_poses': replace(
        _ON_CPU,
        losses=replace(_ON_CPU.losses, camera=CameraLoss(weight=10.0)),
        matching=MatchingLoss(weight=0.3),
    ),
    # A trained network on recordings of one's own: the heads learn, what finds matches stays.
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
