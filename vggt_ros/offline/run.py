# SPDX-License-Identifier: Apache-2.0
"""
A recording goes through the engine, window by window, and leaves files behind.

Nothing grows in memory: each window is written when it is done (`record`), with pictures and
depth of its new frames, and then the state of the engine (`snapshot`). A run that was ended in
any way goes on from there and loses at most the window it was at. Until the end the folder is
called `<name>.partial`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

import vggt_ros
from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import PreprocessedImage
from vggt_ros.frames.frame import Frame
from vggt_ros.inference.network import Network, VGGTNetwork
from vggt_ros.io.frame_source import FrameSource
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.offline.atomic_write import PARTIAL, atomic_writer
from vggt_ros.offline.depth_images import write_depth_png, write_picture
from vggt_ros.offline.point_tracks import find_tracks
from vggt_ros.offline.record import make_record, record_files
from vggt_ros.offline.snapshot import load_snapshot, save_snapshot
from vggt_ros.settings import Settings

ABOUT, STATE = 'run.json', 'state.pickle'
JPEG_QUALITY = 92

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run does beside the settings of the core."""

    every: int = 1  # of how many pictures one is used
    all_at_once: bool = False  # one window of all pictures
    images: bool = True  # the pictures are kept beside the depth
    tracks: bool = False  # points are followed through each window, see `point_tracks`


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    pictures: int  # of the source, passed so far
    of: int | None  # in all; None: unknown
    windows: int
    maps: int


@dataclass(frozen=True, slots=True)
class RunEnd:
    """What a run ended with."""

    complete: bool  # False: it was asked to stop
    counts: dict[str, int]  # of the engine
    resumed_at: int  # picture that it went on with; 0: it began


def partial_folder(output: Path) -> Path:
    """Name the folder of a run that has not ended."""
    return output.with_name(output.name + PARTIAL)


def process_recording(
    source: FrameSource,
    network: VGGTNetwork,
    settings: Settings,
    options: RunOptions,
    folder: Path,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> RunEnd:
    """
    Reconstruct a recording, or go on with it.

    :param folder: where a run of the same recording and settings may have begun.
    :param report: hears where the run is, for each picture.
    :param stop: asked between pictures.
    :raises ValueError: if another run is in the folder, the settings ask for what the recording
        does not have, or there are too few pictures.
    """
    _claim(folder, source, network, settings, options)
    scale = source.scale_source(settings.scale)
    engine = StreamingEngine(settings, network, scale)
    state = folder / STATE
    start = load_snapshot(state, engine, network, scale) + 1 if state.exists() else 0
    windows = len(record_files(folder))
    newest = start - 1
    complete = True
    for place, update in _updates(engine, source.frames(start), options.every):
        newest = place
        if update is not None:
            _write(folder, update, network, options)
            # The record comes first: of a window without a state it is written again.
            if not options.all_at_once:
                save_snapshot(state, engine, place, network, scale)
            windows += 1
        report(Progress(place + 1, source.count, windows, engine.counts.get('maps', 0)))
        if stop():
            complete = False
            break
    if complete and (update := _finish(engine)) is not None:
        _write(folder, update, network, options)
        windows += 1
        report(Progress(newest + 1, source.count, windows, engine.counts.get('maps', 0)))
    if complete and not windows:
        raise ValueError(
            f'{source.name}: {engine.counts.get("received", 0)} pictures made no window; expected '
            'at least two that differ'
        )
    return RunEnd(complete, engine.counts, start)


def _updates(
    engine: StreamingEngine,
    frames: Iterator[tuple[int, Frame]],
    every: int,
) -> Iterator[tuple[int, MapUpdate | None]]:
    for place, frame in frames:
        if place % every:
            continue
        try:
            yield place, engine.add(frame)
        except PredictionError as error:
            logger.warning('a window is lost: %s', error)
            yield place, None


def _finish(engine: StreamingEngine) -> MapUpdate | None:
    try:
        return engine.finish()
    except PredictionError as error:
        logger.warning('the last window is lost: %s', error)
        return None


def _claim(
    folder: Path,
    source: FrameSource,
    network: Network,
    settings: Settings,
    options: RunOptions,
) -> None:
    """Make the folder this run's, or see that it is."""
    mine: dict[str, Any] = {
        'vggt_ros': vggt_ros.__version__,
        'source': source.name,
        'pictures': source.count,
        'model': network.name,
        'model_trained': network.trained,
        'options': asdict(options),
        'settings': asdict(settings),
    }
    mine = json.loads(json.dumps(mine))
    path = folder / ABOUT
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f'{path} does not describe a run: {error}') from error
        different = [name for name in mine if there.get(name) != mine[name]]
        if different:
            raise ValueError(
                f'{folder} was begun with another {", ".join(different)}; expected the same to go '
                'on with it, or --restart'
            )
        return
    with atomic_writer(path) as file:
        file.write(json.dumps(mine, indent=1).encode())


def _write(folder: Path, update: MapUpdate, network: VGGTNetwork, options: RunOptions) -> None:
    """Write what a window adds."""
    steps = np.zeros(len(update.batch.ids))
    for i, new in enumerate(update.is_new):
        if not new:
            continue
        name = f'{update.batch.ids[i]:06d}'
        depth = update.depth(i) / np.float32(update.world_from_window.scale)
        steps[i] = write_depth_png(folder / 'depth' / f'{name}.png', depth)
        if options.images:
            shown = as_pinhole(update.batch.frames[i], update.batch.images[i])
            quality = (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
            write_picture(folder / 'images' / f'{name}.jpg', shown[..., ::-1], quality)
    tracks = None
    if options.tracks:
        batch, confidence = update.batch, update.reconstruction.confidence
        tracks = find_tracks(network, batch.stack(), confidence).tracks
    make_record(update, steps, tracks).save(folder)


def as_pinhole(frame: Frame, fitted: PreprocessedImage) -> npt.NDArray[np.uint8]:
    """Give the picture (H, W, 3) whose pixels `source_from_network` speaks of."""
    if fitted.pixel_map is None:
        return frame.image
    rows, columns = fitted.pixel_map
    return cv2.remap(frame.image, columns, rows, cv2.INTER_LINEAR)  # type: ignore[return-value]
