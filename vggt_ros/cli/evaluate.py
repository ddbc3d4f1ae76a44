# SPDX-License-Identifier: Apache-2.0
"""`vggt evaluate`: a network against ground truth."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import arg, create_mutex_group

from vggt_ros.cli.command import COMPLETE, Command, Flag

if TYPE_CHECKING:
    from vggt_ros.inference.network import VGGTNetwork

TRUTH = 'truth'  # the model that knows the ground truth
SequenceName = Literal['corridor', 'loop', 'stop_and_go', 'rotation', 'handheld', 'all']
Data = create_mutex_group(required=True, title='data')


@dataclass(frozen=True)
class Evaluate(Command):
    """
    Evaluate a network against ground truth, beside simple baselines.

    Single windows of synthetic rooms that training never uses:

        vggt evaluate --synthetic --seed 1 --windows 200 --frames 8 --json out.json

    A recording with ground truth (TUM RGB-D, 7-Scenes, EuRoC, a bag), as one map:

        vggt evaluate --recording rgbd_dataset_freiburg1_desk --output figures

    A long synthetic sequence, as one map; --model truth evaluates everything but the network:

        vggt evaluate --sequence corridor --model truth --noise 1,0.3,1
    """

    name: ClassVar[str] = 'evaluate'

    synthetic: Annotated[Flag, Data] = False
    """Windows of random rooms."""
    sequence: Annotated[SequenceName | None, Data] = None
    """A long synthetic sequence, or all of them."""
    recording: Annotated[Path | None, Data] = None
    """Folder or bag with ground truth."""
    model: str = 'embedded'
    """Checkpoint, as the setting of that name; with --sequence also truth."""
    device: str = 'auto'
    """Torch device, as the setting of that name."""
    seed: int = 0
    """Seed of rooms and noise."""
    windows: int = 200
    """Number of windows, with --synthetic."""
    width: int = 0
    """Image width with --synthetic, pixels; 0: the width that the network was trained for."""
    frames: int | None = None
    """Frames per window (default 8), of the sequence (500) or of the recording (all)."""
    step: int = 1
    """Use every n-th frame, with --recording."""
    output: Path | None = None
    """Folder for trajectories and a plot, with --recording."""
    noise: Annotated[str, arg(metavar='DEPTH,ROTATION,TRANSLATION')] = '0,0,0'
    """Errors of --model truth: percent of depth, degrees, percent of a window's extent."""
    loop_closure: Flag = False
    """The setting of that name, with --sequence and --recording; needs GTSAM."""
    anchor_windows: int = 0
    """The setting of that name, with --sequence and --recording."""
    drop_window: int | None = None
    """Index of a window that is lost, with --sequence."""
    json: Path | None = None
    """File for the figures; of all sequences, a list."""

    def run(self) -> int:
        """Evaluate, print a table and write the figures."""
        noise = parse_noise(self.noise)
        for name, value in (
            ('windows', self.windows),
            ('frames', self.frames),
            ('step', self.step),
        ):
            if value is not None and value < 1:
                raise ValueError(f'--{name} is {value}, expected at least 1')
        if self.model == TRUTH and not self.sequence:
            raise ValueError('--model truth is for --sequence')
        if self.model != TRUTH and any(noise):
            raise ValueError('--noise is for --model truth')
        if self.sequence:
            figures: Any = self._evaluate_sequences(noise)
        elif self.recording:
            figures = self._evaluate_recording(self.recording)
        else:
            figures = self._evaluate_windows()
        if self.json is not None:
            self.json.write_text(json.dumps(figures, indent=1) + '\n')
        return COMPLETE

    def _evaluate_sequences(self, noise: tuple[float, float, float]) -> Any:
        from vggt_ros.lab.evaluation.sequences import evaluate_named_sequence, sequence_table
        from vggt_ros.lab.evaluation.truth_network import PredictionNoise
        from vggt_ros.lab.synthetic.trajectories import SEQUENCES

        errors = PredictionNoise(noise[0] / 100, math.radians(noise[1]), noise[2] / 100)
        names = list(SEQUENCES) if self.sequence == 'all' else [str(self.sequence)]
        network = None if self.model == TRUTH else self._load()
        figures = [
            evaluate_named_sequence(
                name,
                self.frames or 500,
                self.seed,
                network,
                errors,
                self.drop_window,
                **self._map_settings(),
            )
            for name in names
        ]
        print(sequence_table(figures))
        return figures if self.sequence == 'all' else figures[0]

    def _evaluate_recording(self, path: Path) -> Any:
        from vggt_ros.io.recordings import open_recording
        from vggt_ros.lab.evaluation.recording import evaluate_recording, recording_table
        from vggt_ros.settings import Settings

        result = evaluate_recording(
            self._load(),
            open_recording(path),
            Settings.from_flat(self._map_settings()),
            self.step,
            self.frames or 0,
        )
        print(recording_table(result))
        if self.output:
            result.save(self.output)
        return {'recording': result.name, **result.metrics}

    def _evaluate_windows(self) -> Any:
        from vggt_ros.lab.evaluation.synthetic_windows import evaluate_test_windows, window_table

        figures = evaluate_test_windows(
            self._load(), self.seed, self.width, self.windows, self.frames or 8
        )
        print(window_table(figures))
        return figures

    def _map_settings(self) -> dict[str, Any]:
        return {'loop_closure': self.loop_closure, 'anchor_windows': self.anchor_windows}

    def _load(self) -> VGGTNetwork:
        from vggt_ros.inference.load import load_network
        from vggt_ros.settings import ModelSettings

        network = load_network(ModelSettings(checkpoint=self.model, device=self.device))
        if not network.trained:
            print('the network is UNTRAINED: its figures mean nothing')
        return network


def parse_noise(text: str) -> tuple[float, float, float]:
    """
    Parse the option --noise.

    :returns: percent of depth, degrees, percent of the extent.
    :raises ValueError: if it is not three numbers of 0 or more.
    """
    with suppress(ValueError):
        depth, rotation, translation = (float(part) for part in text.split(','))
        if depth >= 0 and rotation >= 0 and translation >= 0:
            return depth, rotation, translation
    raise ValueError(f'--noise is {text!r}, expected three numbers, 0 or more')


if __name__ == '__main__':
    sys.exit(Evaluate.main())
