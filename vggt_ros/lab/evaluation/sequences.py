# SPDX-License-Identifier: Apache-2.0
"""
The map of a long way against the truth, beside simpler ways to join what a network said.

- `centres`: the same windows, joined by their camera centres alone, as peers do.
- `two_view`: no network; the motions of neighbouring frames from SIFT and OpenCV, chained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch, PreprocessedImage
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.inference.network import Network
from vggt_ros.lab.evaluation.baselines import sift_odometry
from vggt_ros.lab.evaluation.naive_join import join_by_centres
from vggt_ros.lab.evaluation.trajectory import compare_orientations, compare_paths
from vggt_ros.lab.evaluation.truth_network import World, true_intrinsics
from vggt_ros.lab.synthetic.draws import Draws
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.rooms import clear_path, furnish
from vggt_ros.lab.synthetic.sequences import Sequence as Way
from vggt_ros.lab.synthetic.windows import window_seeds
from vggt_ros.mapping.map_update import MapUpdate, corrected_registrations
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

STEP_NS = 50_000_000  # from frame to frame
_RENDERED_AT_ONCE = 20  # frames
_STANDING = 1e-6  # m; a way that is shorter has no position error

DepthOf = Callable[[int], npt.NDArray[np.floating]]  # of a frame: (H, W) m


def world_of(way: Way) -> World:
    """Put a sequence into an empty room with the origin in its middle."""
    poses = way.world_from_camera.numpy().copy()
    poses[:, 2, 3] -= way.half_room[2]
    return World(np.array(way.half_room), lambda stamps: poses[np.array(stamps) // STEP_NS])


def render_sequence(
    way: Way, seed: int, height: int, width: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """
    Show what a camera sees on its way through a furnished room.

    :param seed: of the furniture; that of the test split.
    :returns: images (S, H, W, 3), RGB, and depth (S, H, W) in m.
    """
    draws = Draws(window_seeds('test', seed, 0, 1))
    poses = way.world_from_camera.float()
    room = clear_path(furnish(draws, torch.tensor([way.half_room])), poses[None, :, :3, 3])
    matrix = torch.from_numpy(true_intrinsics(height, width)).float()
    parts = [
        render(room, part, matrix.expand(len(part), 3, 3), height, width)
        for part in poses.split(_RENDERED_AT_ONCE)
    ]
    images, depth = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return images, depth


def map_sequence(
    network: Network,
    images: Iterable[npt.NDArray[np.uint8]],
    lost: int | None = None,
    **settings: object,
) -> list[MapUpdate]:
    """
    Send frames through an engine with windows of 8 and a stride of 4.

    :param images: S images (H, W, 3); frame i has the stamp i · `STEP_NS`.
    :param lost: a window, counted from 0, of which the network says nothing that can be used.
    :param settings: other ones than the defaults.
    """
    flat = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, **settings}
    engine = StreamingEngine(
        Settings.from_flat(flat), network if lost is None else _Losing(network, lost)
    )
    updates = []
    for i, image in enumerate(images):
        try:
            update = engine.add(Frame(image, i * STEP_NS, 'camera'))
        except PredictionError:
            continue
        if update is not None:
            updates.append(update)
    return updates


class _Losing:
    """A network that fails once."""

    def __init__(self, network: Network, window: int) -> None:
        self.name, self.trained = network.name, network.trained
        self.device, self.precision = network.device, network.precision
        self.image_width, self.tracks_trained = network.image_width, network.tracks_trained
        self.attention = network.attention
        self._network, self._window = network, window

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        prediction = self._network(batch, heads)
        if batch.window_id == self._window and prediction.depth is not None:
            prediction.depth.fill_(torch.nan)
        return prediction

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        self._network.encode_ahead(images)

    def prepare(self, settings: Settings) -> Settings:
        return self._network.prepare(settings)

    def save_memory(self) -> str:
        return self._network.save_memory()


def evaluate_sequence(
    updates: Sequence[MapUpdate],
    truth: Array,
    depth_of: DepthOf,
    images: npt.NDArray[np.uint8] | None,
) -> dict[str, Any]:
    """
    Compare the largest map with the truth.

    :param updates: of `map_sequence`.
    :param truth: (S, 4, 4), camera-to-world, of all frames.
    :param images: (S, H, W, 3), for the baseline that needs them; None: it is left out.
    :returns: `ours` and `baselines` by name, each with `ate_percent` (absolute trajectory error
        after one Sim(3), rms, of the length of the way), `rotation_deg` (mean, after one
        rotation), `scale_drift_percent` (largest change of the unit against the first window),
        `maps`, `windows` and `frames`; `ours` also `loops`, those that were closed. None stands
        where a figure has no meaning.
    """
    maps = sorted({update.map_id for update in updates})
    mine = {each: [u for u in updates if u.map_id == each] for each in maps}
    if not mine:
        raise ValueError('there is no map: the way is shorter than a window')
    largest = max(mine.values(), key=len)
    windows = [(update.batch.ids, update.reconstruction) for update in largest]
    told = {'maps': len(maps), 'windows': len(largest)}
    loops = sum(update.loop_closure is not None for update in largest)
    baselines: dict[str, dict[str, Any]] = {}
    try:
        joined = join_by_centres(windows)
    except ValueError:  # centres that are all in one place determine nothing
        baselines['centres'] = {**_figures({}, truth), 'scale_drift_percent': None, **told}
    else:
        baselines['centres'] = {**_judge(largest, joined, truth, depth_of), **told}
    if images is not None:
        poses = sift_odometry(images, true_intrinsics(*images.shape[1:3]))
        baselines['two_view'] = {
            **_figures(dict(enumerate(poses)), truth),
            'scale_drift_percent': None,
            'maps': 1,
            'windows': len(poses) - 1,
        }
    ours = _judge(largest, corrected_registrations(largest), truth, depth_of)
    return {'ours': {**ours, **told, 'loops': loops}, 'baselines': baselines}


def _judge(
    updates: list[MapUpdate], map_from_window: list[Sim3], truth: Array, depth_of: DepthOf
) -> dict[str, Any]:
    """Measure the frames of windows from the first window that has them."""
    poses: dict[int, Array] = {}
    units = []
    for update, placed in zip(updates, map_from_window, strict=True):
        cameras = placed.transform_poses(update.reconstruction.window_from_camera)
        for number, camera in zip(update.batch.ids, cameras, strict=True):
            poses.setdefault(number, camera)
        found = placed.scale * update.reconstruction.depth[len(update.batch.ids) - 1]
        units.append(np.median(found / depth_of(update.batch.ids[-1])))
    drift = np.abs(np.array(units) / units[0] - 1).max()
    return {**_figures(poses, truth), 'scale_drift_percent': 100 * float(drift)}


def _figures(poses: dict[int, Array], truth: Array) -> dict[str, Any]:
    numbers = sorted(poses)
    figures: dict[str, Any] = {
        'ate_percent': None,
        'rotation_deg': None,
        'frames': len(numbers),
    }
    if not numbers:
        return figures
    true, estimate = truth[numbers], np.stack([poses[number] for number in numbers])
    figures['rotation_deg'] = math.degrees(compare_orientations(true, estimate).mean())
    if np.ptp(true[:, :3, 3], axis=0).max() > _STANDING:
        # an estimate that stands still has no similarity to the truth
        with suppress(ValueError):
            figures['ate_percent'] = compare_paths(true, estimate).position_percent
    return figures


COLUMNS = ('ate_percent', 'rotation_deg', 'scale_drift_percent', 'maps', 'windows', 'frames')


def sequence_table(found: Sequence[dict[str, Any]]) -> str:
    """Lay the figures of some sequences out for a person, as Markdown."""
    lines = ['| sequence | joined by | ' + ' | '.join(COLUMNS) + ' |', '|---|---|' + '--:|' * 6]
    for each in found:
        for row, figures in {'ours': each['ours'], **each['baselines']}.items():
            cells = ' | '.join(_cell(figures[name]) for name in COLUMNS)
            lines.append(f'| {each["sequence"]} | {row} | {cells} |')
    return '\n'.join(lines)


def _cell(value: float | None) -> str:
    return '-' if value is None else f'{value:.3g}'
