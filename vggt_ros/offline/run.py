# SPDX-License-Identifier: Apache-2.0
"""
Processes a recording window by window; an interrupted run can be resumed.

Memory does not grow with the recording: each window is written when it is complete (its record,
and images and depth of its new frames), and then the state of the engine. A resumed run continues
from that state and repeats at most one window. Until it is complete, the output folder is called
`<name>.partial`.
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
from vggt_ros.offline.folder_files import PARTIAL, has_file, list_files, read_file, write_file
from vggt_ros.offline.frame_images import write_frame_depth, write_frame_image
from vggt_ros.offline.point_tracks import track_window
from vggt_ros.offline.state_file import read_state, write_state
from vggt_ros.offline.window_record import (
    WINDOWS,
    list_records,
    make_record,
    read_records,
    write_record,
)
from vggt_ros.settings import Settings

RUN_FILE, STATE_FILE = 'run.json', 'state.safetensors'
_MAX_RUN_FILE = 1 << 20  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run does beside the settings of the core."""

    every: int = 1  # every n-th image is used
    all_at_once: bool = False  # one window of all images
    images: bool = True  # images are copied to the output
    tracks: bool = False  # points are tracked through each window, see `point_tracks`


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    images: int  # read or skipped so far
    total: int | None  # None: unknown
    windows: int
    maps: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """The end of a run."""

    complete: bool  # False: it was stopped
    counts: dict[str, int]  # of the engine
    resumed_at: int  # index of the image from which it was resumed; 0: it was not
    description: dict[str, Any]  # as in `run.json`


def partial_folder(output: Path) -> Path:
    """Name the folder of an incomplete run."""
    return output.with_name(output.name + PARTIAL)


def process_recording(
    source: FrameSource,
    network: VGGTNetwork,
    settings: Settings,
    options: RunOptions,
    folder: Path,
    report: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> RunResult:
    """
    Reconstruct a recording, or resume it.

    :param folder: empty, or of an interrupted run with the same recording, network and settings.
    :param report: called after each image.
    :param stop: called after each image; True stops the run.
    :raises ValueError: if the folder contains anything else, the settings require what the
        recording does not have, or there are too few images.
    """
    description = _describe(source, network, settings, options)
    _check_description(folder, description)
    engine = StreamingEngine(settings, network, source.scale_source(settings.scale))
    start = _load_state(folder, engine, source.count)
    windows = sum(1 for _ in read_records(folder))  # a damaged one is found before hours of work

    def progress(images: int) -> Progress:
        return Progress(images, source.count, windows, engine.counts.get('maps', 0))

    last = start - 1
    complete = True
    for index, update in _process(engine, source.frames(start), options.every):
        last = index
        if update is not None:
            # The record first: without a newer state the window is repeated and written again.
            _write_window(folder, update, network, options)
            windows = len(list_records(folder))
            if not options.all_at_once:
                _save_state(folder, engine, index)
        report(progress(index + 1))
        if stop():
            complete = False
            break
    if complete and (update := _finish(engine)) is not None:
        _write_window(folder, update, network, options)
        windows = len(list_records(folder))
        report(progress(last + 1))
    if complete and not windows:
        raise ValueError(
            f'{source.name}: no window from {engine.counts.get("received", 0)} images; expected '
            'at least two different images'
        )
    return RunResult(complete, engine.counts, start, description)


def read_description(folder: Path) -> dict[str, Any]:
    """
    Read what a run was started with.

    :raises ValueError: if the file is damaged.
    :raises FileNotFoundError: if there is none.
    """
    try:
        description = json.loads(read_file(folder, RUN_FILE, _MAX_RUN_FILE))
        if not isinstance(description, dict):
            raise ValueError(f'it contains a {type(description).__name__}')
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{folder / RUN_FILE} does not describe a run: {error}') from error
    return description


def _describe(
    source: FrameSource, network: Network, settings: Settings, options: RunOptions
) -> dict[str, Any]:
    description: dict[str, Any] = {
        'vggt_ros': vggt_ros.__version__,
        'source': source.name,
        'images': source.count,
        'model': network.name,
        'model_trained': network.trained,
        'options': asdict(options),
        'settings': asdict(settings),
    }
    decoded: dict[str, Any] = json.loads(json.dumps(description))
    return decoded


def _check_description(folder: Path, description: dict[str, Any]) -> None:
    """Mark a new folder as that of this run, or check that it is."""
    if not has_file(folder, RUN_FILE):
        if has_file(folder, STATE_FILE) or list_files(folder, WINDOWS, ''):
            raise ValueError(
                f'{folder} has results but no {RUN_FILE}; expected those of an interrupted run, '
                'or --restart'
            )
        write_file(folder, RUN_FILE, json.dumps(description, indent=1).encode())
        return
    found = read_description(folder)
    keys = [*description, *(key for key in found if key not in description)]
    different = [key for key in keys if found.get(key) != description.get(key)]
    if different:
        raise ValueError(
            f'{folder} is of a run with other {", ".join(different)}; expected the same to resume '
            'it, or --restart'
        )


def _save_state(folder: Path, engine: StreamingEngine, index: int) -> None:
    """
    Write how far the run is.

    :param index: of the last image that the engine received.
    """
    write_state(folder, STATE_FILE, {'index': index, 'engine': engine.state_dict()})


def _load_state(folder: Path, engine: StreamingEngine, count: int | None) -> int:
    """
    Restore the engine, if there is a state.

    :param count: images of the recording.
    :returns: index of the next image.
    """
    if not has_file(folder, STATE_FILE):
        return 0
    state = read_state(folder, STATE_FILE)
    index, engine_state = state.get('index'), state.get('engine')
    if type(index) is not int or not 0 <= index < (2**31 if count is None else count):
        raise ValueError(
            f'{folder / STATE_FILE} has the index {index!r}; expected one of the {count} images'
        )
    try:
        if not isinstance(engine_state, dict):
            raise ValueError('it has no state of the engine')
        engine.load_state_dict(engine_state)
    except ValueError as error:
        raise ValueError(f'{folder / STATE_FILE} cannot be resumed: {error}') from error
    return index + 1


def _process(
    engine: StreamingEngine, frames: Iterator[tuple[int, Frame]], every: int
) -> Iterator[tuple[int, MapUpdate | None]]:
    for index, frame in frames:
        if index % every:
            continue
        try:
            yield index, engine.add(frame)
        except PredictionError as error:
            logger.warning('window dropped: %s', error)
            yield index, None


def _finish(engine: StreamingEngine) -> MapUpdate | None:
    try:
        return engine.finish()
    except PredictionError as error:
        logger.warning('last window dropped: %s', error)
        return None


def _write_window(
    folder: Path, update: MapUpdate, network: VGGTNetwork, options: RunOptions
) -> None:
    """Write the files of a window and its new frames."""
    batch = update.batch
    steps = np.zeros(len(batch.ids))
    for i, frame_id in enumerate(batch.ids):
        if not update.is_new[i]:
            continue
        depth = update.depth(i) / np.float32(update.world_from_window.scale)
        steps[i] = write_frame_depth(folder, frame_id, depth)
        if options.images:
            image = _rectify(batch.frames[i], batch.images[i])
            write_frame_image(folder, frame_id, image)
    tracks = None
    if options.tracks:
        tracks = track_window(network, batch.stack(), update.reconstruction.confidence).tracks
    write_record(folder, make_record(update, steps, tracks))


def _rectify(frame: Frame, preprocessed: PreprocessedImage) -> npt.NDArray[np.uint8]:
    """Return the image (H, W, 3) whose pixels `source_from_network` refers to."""
    if preprocessed.pixel_map is None:
        return frame.image
    rows, columns = preprocessed.pixel_map
    return cv2.remap(frame.image, columns, rows, cv2.INTER_LINEAR)  # type: ignore[return-value]
