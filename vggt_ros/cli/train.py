# SPDX-License-Identifier: Apache-2.0
"""`vggt train`, and what goes with it: plot the run, look at its data, embed its weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from vggt_ros.cli.command import COMPLETE, Command, CommandError

Recipe = Literal[
    'small', 'late_matching', 'no_matching', 'small_on_cpu', 'small_on_cpu_poses', 'fine_tune'
]
Split = Literal['train', 'validation', 'test']


@dataclass(frozen=True)
class Train(Command):
    r"""
    Train the small network on synthetic rooms, or any checkpoint on recordings; resumable.

        vggt train --folder training_output/small --windows 1000000
        vggt train --folder training_output/mine --recipe fine_tune \
            --checkpoint facebook/VGGT-1B --width 518 --data my_bag rgbd_dataset_freiburg1_desk
        python -m torch.distributed.run --nproc-per-node 2 -m vggt_ros train ...
    """

    name: ClassVar[str] = 'train'

    folder: Path
    """Output folder for checkpoints and the training curve; an existing run is resumed."""
    recipe: Recipe = 'small'
    """Named set of training settings."""
    windows: int | None = None
    """Training windows in total; the learning rate schedule ends there."""
    until: int | None = None
    """Pause after this many windows."""
    batch: int | None = None
    """Windows per step, over all processes."""
    frames: tuple[int, ...] = ()
    """Frames per window; several values alternate."""
    learning_rate: float | None = None
    """Peak learning rate."""
    seed: int = 0
    """Seed of weights and windows."""
    checkpoint: str = ''
    """Initial weights, as the setting of that name; random if not given."""
    data: tuple[Path, ...] | None = None
    """Recordings with ground truth (TUM RGB-D, 7-Scenes, bags); synthetic rooms if not given."""
    width: int | None = None
    """Width of the images of --data, pixels; 112 if not given."""
    size: Annotated[tuple[int, int] | None, arg(metavar='HEIGHT WIDTH')] = None
    """Size of synthetic images, pixels; 84 112 if not given."""
    device: str = 'auto'
    """Torch device, as the setting of that name."""

    def run(self) -> int:
        """Train or resume, with a progress bar."""
        if self.data == ():
            raise ValueError('--data is empty, expected at least one recording')
        if self.width is not None and not self.data:
            raise ValueError('--width is for --data; the size of synthetic images is --size')
        if self.size is not None and self.data:
            raise ValueError('--size is for synthetic rooms; the width of recordings is --width')
        from vggt_ros.lab.training.start import run_training

        changes = {
            'windows': self.windows,
            'batch': self.batch,
            'learning_rate': self.learning_rate,
            'frames': self.frames or None,
        }
        size = {} if self.width is None else {'width': self.width}
        if self.size is not None:
            size = {'height': self.size[0], 'width': self.size[1]}
        try:
            run_training(
                self.folder,
                self.recipe,
                {name: value for name, value in changes.items() if value is not None},
                until=self.until,
                seed=self.seed,
                checkpoint=self.checkpoint,
                recordings=self.data or (),
                device=self.device,
                **size,
            )
        except FloatingPointError as error:
            raise CommandError(str(error)) from error
        return COMPLETE


@dataclass(frozen=True)
class PlotTraining(Command):
    """
    Plot the training and validation curves of a run.

        vggt plot-training training_output/small/curve.csv --output curve.png
    """

    name: ClassVar[str] = 'plot-training'

    curve: Positional[Path]
    """curve.csv of the run."""
    output: Path = Path('curve.png')
    """PNG to write."""

    def run(self) -> int:
        """Plot."""
        from vggt_ros.lab.training.loop import plot_curve

        plot_curve(self.curve, self.output)
        return COMPLETE


@dataclass(frozen=True)
class ContactSheet(Command):
    """
    Draw synthetic training windows: frames with tracked points, and the first depth image.

        vggt contact-sheet windows.png --windows 10
    """

    name: ClassVar[str] = 'contact-sheet'

    output: Positional[Path]
    """PNG to write."""
    windows: int = 10
    """Number of windows."""
    frames: int = 4
    """Frames per window."""
    split: Split = 'train'
    """Split of the synthetic data."""
    seed: int = 0
    """Seed of the windows."""
    height: int = 168
    """Height of the images, pixels."""
    width: int = 224
    """Width of the images, pixels."""

    def run(self) -> int:
        """Render and draw."""
        from vggt_ros.lab.evaluation.plots import draw_windows
        from vggt_ros.lab.synthetic.windows import render_windows, window_seeds

        seeds = window_seeds(self.split, self.seed, 0, self.windows)
        windows = render_windows(seeds, self.frames, self.height, self.width, queries=12)
        draw_windows(windows, self.output)
        print(f'{self.output}: {self.windows} windows')
        return COMPLETE


@dataclass(frozen=True)
class EmbedWeights(Command):
    r"""
    Make a trained checkpoint the embedded network of the package.

        vggt embed-weights training_output/small/best.pt --image-width 112 \
            --training '1 million windows: make train-small'
    """

    name: ClassVar[str] = 'embed-weights'

    checkpoint: Positional[str]
    """Trained weights, as the setting of that name."""
    image_width: int
    """Width of the training images, pixels."""
    training: str
    """How it was trained: commands, seeds, windows."""
    trained_on: str = 'synthetic rooms only'
    """Training data, for the log and reports."""
    folder: Path | None = None
    """Folder to write; default: that of the package."""

    def run(self) -> int:
        """Convert and write."""
        from vggt_ros.inference.load import load_model
        from vggt_ros.model.embedded import FOLDER, write_embedded

        folder = self.folder or FOLDER
        model = load_model(self.checkpoint)
        about = write_embedded(model, self.image_width, self.trained_on, self.training, folder)
        print(f'{folder}: {about}')
        return COMPLETE


if __name__ == '__main__':
    sys.exit(Train.main())
