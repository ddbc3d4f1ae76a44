# SPDX-License-Identifier: Apache-2.0
"""
A recording becomes a folder: the run, the files, the report, and at last the folder's name.

While it is being made the folder is called `<name>.partial`; only what is complete has its name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.io.frame_source import FrameSource
from vggt_ros.offline.export import Export, ExportOptions, export
from vggt_ros.offline.replay import write_bag
from vggt_ros.offline.report import write_report
from vggt_ros.offline.run import STATE, Progress, RunOptions, partial_folder, process_recording
from vggt_ros.settings import Settings

LARGEST_WINDOW = 512  # frames


@dataclass(frozen=True, slots=True)
class ReconstructOptions:
    """What is made of a recording, and how."""

    run: RunOptions = field(default_factory=RunOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    restart: bool = False  # what an earlier run left is thrown away
    overwrite: bool = False  # a finished folder is replaced
    bag: Path | None = None  # to write what the node would have published


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """What came of it."""

    folder: Path  # ends with .partial if it was asked to stop
    complete: bool
    made: Export | None  # None: stopped before the first window
    resumed_at: int  # picture that it went on with; 0: it began


def reconstruct_recording(
    source: FrameSource,
    network: VGGTNetwork,
    settings: Settings,
    options: ReconstructOptions,
    output: Path,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> Reconstructed:
    """
    Reconstruct a recording into a folder.

    :param report: hears where the run is.
    :param stop: asked between pictures; what is done by then is kept, and gets its files.
    :raises ValueError: if the folder is there already, or see `run`.
    :raises OSError: if the disk is full, or something may not be written.
    """
    if output.exists() and not options.overwrite:
        raise ValueError(f'{output} is there already; expected a new folder, or --overwrite')
    bag = options.bag
    if bag is not None and (bag.exists() or bag.suffix != '.mcap'):
        raise ValueError(f'{bag} is asked for as a bag; expected a new file that ends with .mcap')
    if options.run.all_at_once:
        settings = _in_one_window(settings, source, options.run)
    folder = partial_folder(output)
    if options.restart and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end = process_recording(source, network, settings, options.run, folder, report, stop)
    if not end.complete and not any((folder / 'windows').glob('*.npz')):
        return Reconstructed(folder, False, None, end.resumed_at)
    told = {name: end.counts.get(name, 0) for name in ('received', 'no_parallax', 'windows')}
    made = export(
        folder, options.export, {**told, 'counts': end.counts, 'unreadable': source.unreadable}
    )
    write_report(folder, made, source.unreadable)
    if not end.complete:
        return Reconstructed(folder, False, made, end.resumed_at)
    if bag is not None:
        write_bag(folder, made.joined, bag)
    (folder / STATE).unlink(missing_ok=True)
    if output.exists():
        shutil.rmtree(output)
    os.replace(folder, output)
    return Reconstructed(output, True, made, end.resumed_at)


def _in_one_window(settings: Settings, source: FrameSource, options: RunOptions) -> Settings:
    """Let the window hold everything; it is handed out when nothing more comes."""
    if source.count is not None and source.count > LARGEST_WINDOW * options.every:
        raise ValueError(
            f'{source.name} has {source.count} pictures; expected at most {LARGEST_WINDOW} for '
            f'one window: --every {-(-source.count // LARGEST_WINDOW)} takes few enough'
        )
    window = replace(settings.window, window_size=LARGEST_WINDOW, window_stride=LARGEST_WINDOW - 1)
    return replace(settings, window=window)
