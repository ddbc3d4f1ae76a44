# SPDX-License-Identifier: Apache-2.0
"""
A recording becomes a folder: windows, exported files, a report, and at last the folder's name.

Until then it is called `<name>.partial`; a folder without that suffix is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.io.frame_source import FrameSource
from vggt_ros.offline.export import Export, ExportOptions, export, export_bag
from vggt_ros.offline.folder_files import check_folder, remove_folder
from vggt_ros.offline.report import write_report
from vggt_ros.offline.run import (
    STATE_FILE,
    Progress,
    RunOptions,
    partial_folder,
    process_recording,
)
from vggt_ros.offline.window_record import list_records
from vggt_ros.settings import Settings

MAX_WINDOW = 512  # frames


@dataclass(frozen=True, slots=True)
class ReconstructOptions:
    """What is made of a recording, and how."""

    run: RunOptions = field(default_factory=RunOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    restart: bool = False  # an interrupted run is discarded
    overwrite: bool = False  # a finished folder is replaced
    bag: Path | None = None  # to write what the node would have published


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """The result of a reconstruction."""

    folder: Path  # ends with .partial if the run was stopped
    complete: bool
    export: Export | None  # None: stopped before the first window
    resumed_at: int  # index of the image from which it was resumed; 0: it was not


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

    :param report: called after each image.
    :param stop: called after each image; True stops the run. Its results so far are kept, and
        exported.
    :raises ValueError: if the folder exists, or as `process_recording` does.
    :raises OSError: if the disk is full, or something cannot be written.
    """
    check_folder(output)
    if output.exists() and not options.overwrite:
        raise ValueError(f'{output} exists; expected a new folder, or --overwrite')
    if options.bag is not None and (options.bag.exists() or options.bag.suffix != '.mcap'):
        raise ValueError(f'the bag to write is {options.bag}; expected a new file *.mcap')
    if options.run.all_at_once:
        settings = _use_one_window(settings, source, options.run)
    folder = partial_folder(output)
    check_folder(folder)
    if options.restart:
        remove_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = process_recording(source, network, settings, options.run, folder, report, stop)
    if not run.complete and not list_records(folder):
        return Reconstructed(folder, False, None, run.resumed_at)
    counts = {name: run.counts.get(name, 0) for name in ('received', 'no_parallax', 'windows')}
    exported = export(
        folder,
        options.export,
        run.description,
        {**counts, 'counts': run.counts, 'unreadable': source.unreadable},
    )
    write_report(exported)
    if not run.complete:
        return Reconstructed(folder, False, exported, run.resumed_at)
    if options.bag is not None:
        export_bag(exported.map, options.bag)
    (folder / STATE_FILE).unlink(missing_ok=True)
    remove_folder(output)
    os.replace(folder, output)
    return Reconstructed(output, True, exported, run.resumed_at)


def _use_one_window(settings: Settings, source: FrameSource, options: RunOptions) -> Settings:
    """Make the window large enough for all images; it is complete when they are."""
    if source.count is not None and source.count > MAX_WINDOW * options.every:
        raise ValueError(
            f'{source.name} has {source.count} images; expected at most {MAX_WINDOW} for one '
            f'window, as with --every {-(-source.count // MAX_WINDOW)}'
        )
    window = replace(settings.window, window_size=MAX_WINDOW, window_stride=MAX_WINDOW - 1)
    return replace(settings, window=window)
