#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vggt reconstruct`: recordings to maps on disk, with a progress bar and an orderly Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from vggt_ros.cli.command import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    Command,
    CommandError,
    Flag,
    SettingValues,
)
from vggt_ros.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from vggt_ros.offline.reconstruct import Reconstructed
    from vggt_ros.offline.run import Progress as RunProgress

    # Reconstructs a recording; reports progress, and asks whether to stop.
    Reconstruction = Callable[[Callable[[RunProgress], None], Callable[[], bool]], Reconstructed]


@dataclass(frozen=True)
class Reconstruct(Command):
    """
    Reconstruct a bag, a video or a folder of images: trajectory, point cloud, depth, COLMAP model.

        vggt reconstruct drive.mcap --output drive_map --checkpoint facebook/VGGT-1B
        vggt reconstruct 'shots/*.jpg' --output room --all-at-once
        vggt reconstruct a.mcap b.mcap c.mp4 --output maps --jobs 2

    The same command resumes an interrupted run. Needs pip install 'vggt_ros[offline]'.
    """

    name: ClassVar[str] = 'reconstruct'

    input: Annotated[
        Positional[tuple[str, ...]], arg(metavar='INPUT...', help_behavior_hint='(required)')
    ]
    """Bag (folder, .mcap, .db3), video, folder of images, or a pattern of image files."""
    output: Path
    """Folder to write; with several inputs, the parent of their folders."""
    jobs: int = 1
    """Inputs reconstructed in parallel, by Ray."""
    topic: str = ''
    """Image topic, if the bag has several."""
    rate: float = 10.0
    """Images per second of a folder, whose files have no time stamps."""
    every: int = 1
    """Use every n-th image."""
    odom_frame: str = 'odom'
    """Fixed frame of the camera motion on /tf of a bag, for --scale-source tf."""
    all_at_once: Flag = False
    """Put all images into one window."""
    no_images: Flag = False
    """Do not copy the images to the output."""
    voxel: float = 0.0
    """Voxel size of the cloud, in units of the map; 0: derived from the scene."""
    cloud_points: int = 1_000_000
    """Maximum number of points in cloud.ply."""
    refine: Flag = False
    """Bundle adjustment over tracks of the network's track head."""
    to_bag: Path | None = None
    """Also write an .mcap bag of what the node would publish; for a single input."""
    restart: Flag = False
    """Discard an earlier, interrupted run instead of resuming it."""
    overwrite: Flag = False
    """Replace a finished output folder."""
    settings: OmitArgPrefixes[SettingValues] = field(default_factory=SettingValues)
    """Settings, as the node's parameters."""

    def run(self) -> int:
        """Reconstruct one input with a progress bar, or several as jobs."""
        Settings.from_flat(self.settings)  # before anything is imported or loaded
        if not self.input:
            raise ValueError('no input is given; expected a bag, a video, a folder or a pattern')
        if self.to_bag and len(self.input) > 1:
            raise ValueError('--to-bag is for a single input')
        if self.every < 1 or not self.rate > 0:
            raise ValueError(
                f'--every is {self.every}, --rate {self.rate:g}; expected more than 0'
            )
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_time=False)
        logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[handler])
        try:
            if len(self.input) > 1:
                return self._run_jobs()
            return self._run_one(console)
        except OSError as error:
            raise CommandError(f'{error}; {self.output} is not complete') from error

    def _run_one(self, console: Console) -> int:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[rate]}'),
            TimeRemainingColumn(),
        )
        reconstruct = self._prepare(self.input[0], self.output)
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(Path(self.input[0]).name, total=None, rate='')

            def show(now: RunProgress) -> None:
                speed = bar.tasks[0].speed
                rate = f'{speed:.1f} images/s, {now.windows} windows' if speed else ''
                bar.update(task, completed=now.images, total=now.total, rate=rate)

            result = reconstruct(show, Interruption(console.print))
        if not result.complete:
            sys.stderr.write(
                f'{self.name}: interrupted; {result.folder} holds the results so far, the same '
                'command resumes\n'
            )
            return INTERRUPTED
        _print_result(result)
        return COMPLETE

    def _run_jobs(self) -> int:
        from vggt_ros.offline.jobs import run_jobs

        failures = run_jobs(self.input, self.output, self._run_job, self.jobs, print)
        for recording, error in failures.items():
            sys.stderr.write(f'{self.name}: {recording} failed: {error}\n')
        return FAILED if failures else COMPLETE

    def _run_job(self, recording: str, output: Path) -> str:
        """Reconstruct one of several inputs; returns the error, or ''."""
        from vggt_ros.model.checkpoint import CheckpointError

        try:
            self._prepare(recording, output)(lambda _: None, lambda: False)
        except (ValueError, CheckpointError, OSError) as error:
            return str(error)
        return ''

    def _prepare(self, recording: str, output: Path) -> Reconstruction:
        """Open the recording and load the network."""
        from vggt_ros.inference.load import load_network
        from vggt_ros.io.recordings import open_frames
        from vggt_ros.offline.export import ExportOptions
        from vggt_ros.offline.reconstruct import ReconstructOptions, reconstruct_recording
        from vggt_ros.offline.run import RunOptions

        settings = Settings.from_flat(self.settings)
        options = ReconstructOptions(
            RunOptions(self.every, self.all_at_once, not self.no_images, self.refine),
            ExportOptions(self.voxel, self.cloud_points, self.refine),
            self.restart,
            self.overwrite,
            self.to_bag,
        )
        source = open_frames(recording, self.topic, self.rate, self.odom_frame)
        network = load_network(settings.model)
        return partial(reconstruct_recording, source, network, settings, options, output)


class Interruption:
    """The first SIGINT or SIGTERM requests a stop, the second one raises KeyboardInterrupt."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._requested = False
        self._notify = notify
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        self._notify('stopping after this window; results are kept (again: stop immediately)')

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._requested


def _print_result(result: Reconstructed) -> None:
    assert result.export is not None
    description = result.export.description
    print(
        f'{result.folder}: {description["title"]}, {description["points"]} points, '
        f'unit: {description["unit"]}'
    )
    if 'refinement' in description:
        print(description['refinement'])
    if description['unreadable']:
        print(f'{len(description["unreadable"])} images could not be read; see report.html')
    if description['warning']:
        print(description['warning'])


if __name__ == '__main__':
    sys.exit(Reconstruct.main())
