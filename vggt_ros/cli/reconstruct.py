#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Make a map of a recording: a bag, a video or a folder of pictures.

    python -m vggt_ros.cli.reconstruct drive.mcap --output drive_map --checkpoint embedded
    python -m vggt_ros.cli.reconstruct 'shots/*.jpg' --output room --all-at-once
    python -m vggt_ros.cli.reconstruct a.mcap b.mcap c.mp4 --output maps --jobs 2

What was interrupted goes on with the same command. Every setting of the node is an option. Needs
`pip install vggt_ros[offline]`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vggt_ros.inference.load import load_network
from vggt_ros.io.frame_source import IMAGE_RATE
from vggt_ros.io.recordings import open_frames
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.offline.export import ExportOptions
from vggt_ros.offline.jobs import run_jobs
from vggt_ros.offline.reconstruct import Reconstructed, ReconstructOptions, reconstruct_recording
from vggt_ros.offline.run import Progress as RunProgress
from vggt_ros.offline.run import RunOptions
from vggt_ros.settings import Settings, all_settings

FAILURES = (ValueError, CheckpointError, OSError)

console = Console(stderr=True)


class Interruption:
    """Ctrl-C once: end in order. Twice: end."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.print('stopping after this window; what is done is kept (again: stop at once)')

    def __call__(self) -> bool:
        """Say whether somebody asked to stop."""
        return self.asked


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'input', nargs='+', help='bag (folder, .mcap, .db3), video, folder or pattern'
    )
    parser.add_argument(
        '--output', type=Path, required=True, help='folder to make; of several inputs, for theirs'
    )
    parser.add_argument('--jobs', type=int, default=1, help='of several inputs at once, on Ray')
    parser.add_argument('--topic', default='', help='image topic of a bag with several')
    parser.add_argument(
        '--rate', type=float, default=IMAGE_RATE, help='pictures of a folder per second'
    )
    parser.add_argument('--every', type=int, default=1, help='take every so many pictures')
    parser.add_argument('--all-at-once', action='store_true', help='one window of all pictures')
    parser.add_argument('--no-images', action='store_true', help='do not keep the pictures')
    parser.add_argument('--voxel', type=float, default=0.0, help='side of the voxels of the cloud')
    parser.add_argument(
        '--cloud-points', type=int, default=1_000_000, help='of cloud.ply, at most'
    )
    parser.add_argument(
        '--refine', action='store_true', help='bundle adjustment by the tracks of the network'
    )
    parser.add_argument(
        '--to-bag', type=Path, help="bag (mcap) to make, with the node's topics, of one input"
    )
    parser.add_argument('--restart', action='store_true', help='do not go on with an earlier run')
    parser.add_argument('--overwrite', action='store_true', help='replace a finished folder')
    group = parser.add_argument_group('settings, as of the node')
    for entry in all_settings():
        _add_setting(group, entry)
    asked = parser.parse_args()
    if asked.to_bag and len(asked.input) > 1:
        parser.error('--to-bag is for one input')
    return asked


def _add_setting(group: Any, entry: Any) -> None:
    flag = '--' + entry.name.replace('_', '-')
    text = f'{entry.metadata["description"]} Default: {entry.default}'.replace('%', '%%')
    if isinstance(entry.default, bool):
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    group.add_argument(
        flag,
        type=type(entry.default),
        choices=entry.metadata['choices'] or None,
        metavar=entry.name.upper(),
        default=argparse.SUPPRESS,
        help=text,
    )


def make_map(
    asked: argparse.Namespace,
    where: str,
    output: Path,
    report: Callable[[RunProgress], None],
    stop: Callable[[], bool],
) -> Reconstructed:
    """
    Load the network and reconstruct one recording.

    :param where: the recording.
    """
    names = {entry.name for entry in all_settings()}
    settings = Settings.from_flat({n: value for n, value in vars(asked).items() if n in names})
    if asked.every < 1 or not asked.rate > 0:
        raise ValueError(f'--every is {asked.every}, --rate {asked.rate:g}; expected more than 0')
    options = ReconstructOptions(
        RunOptions(asked.every, asked.all_at_once, not asked.no_images, asked.refine),
        ExportOptions(asked.voxel, asked.cloud_points, asked.refine),
        asked.restart,
        asked.overwrite,
        asked.to_bag,
    )
    source = open_frames(where, asked.topic, asked.rate)
    network = load_network(settings.model)
    return reconstruct_recording(source, network, settings, options, output, report, stop)


def make_one(asked: argparse.Namespace, where: str, output: Path) -> int:
    """Make one map and show how far it is; returns the exit code."""
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[rate]}'),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(Path(where).name, total=None, rate='')

        def show(now: RunProgress) -> None:
            speed = bar.tasks[0].speed
            rate = f'{speed:.1f} pictures/s, {now.windows} windows' if speed else ''
            bar.update(task, completed=now.images, total=now.total, rate=rate)

        done = make_map(asked, where, output, show, Interruption())
    if not done.complete:
        say_error(f'stopped; what is done is in {done.folder}, the same command goes on')
        return 130
    assert done.export is not None
    about = done.export.description
    print(f'{done.folder}: {about["title"]}, {about["points"]} points, unit: {about["unit"]}')
    if 'refinement' in about:
        print(about['refinement'])
    if about['unreadable']:
        print(f'{len(about["unreadable"])} images could not be read; see report.html')
    if about['warning']:
        print(about['warning'])
    return 0


def make_quietly(asked: argparse.Namespace, where: str, output: Path) -> str:
    """Make one map of many; returns what went wrong."""
    try:
        make_map(asked, where, output, lambda _: None, lambda: False)
    except FAILURES as error:
        return str(error)
    return ''


def make_many(asked: argparse.Namespace) -> int:
    """Make all maps; 1 if one of them failed."""
    one = partial(make_quietly, asked)
    failures = run_jobs(asked.input, asked.output, one, asked.jobs, print)
    for where, error in failures.items():
        say_error(f'{where} failed: {error}')
    return 1 if failures else 0


def say_error(sentence: str) -> None:
    """Say what went wrong."""
    sys.stderr.write(f'reconstruct: {sentence}\n')


def main() -> int:
    """Make maps. 0: complete; 130: stopped; 2: the input or a setting is wrong; 1: else."""
    asked = parse()
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format='%(message)s', handlers=[handler])
    try:
        if len(asked.input) > 1:
            return make_many(asked)
        return make_one(asked, asked.input[0], asked.output)
    except (ValueError, CheckpointError) as error:
        say_error(str(error))
        return 2
    except OSError as error:
        say_error(f'{error}; {asked.output} is not complete')
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
