# SPDX-License-Identifier: Apache-2.0
"""
Evaluate the map of a long synthetic sequence against the ground truth, beside baselines.

- `centres`: the same windows, registered by their camera centres alone.
- `two_view`: no network; SIFT odometry.
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
from vggt_ros.lab.evaluation.baselines import register_by_centres, sift_odometry
from vggt_ros.lab.evaluation.synthetic_windows import image_size
from vggt_ros.lab.evaluation.trajectory_errors import compare_trajectories, orientation_errors
from vggt_ros.lab.evaluation.truth_network import (
    PredictionNoise,
    TruthNetwork,
    World,
    true_intrinsics,
)
from vggt_ros.lab.synthetic.random_streams import RandomStreams
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.rooms import random_rooms, remove_obstacles
from vggt_ros.lab.synthetic.trajectories import SEQUENCES, SyntheticSequence
from vggt_ros.lab.synthetic.windows import window_seeds
from vggt_ros.mapping.map_update import MapUpdate, corrected_registrations
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

FRAME_PERIOD_NS = 50_000_000
_FRAMES_PER_CHUNK = 20  # rendered together
_STATIONARY = 1e-6  # m; a trajectory of smaller extent has no position error

DepthLookup = Callable[[int], npt.NDArray[np.floating]]  # frame index to depth (H, W), m


def sequence_world(sequence: SyntheticSequence) -> World:
    """Return a sequence in an empty room with the origin in its middle."""
    poses = sequence.world_from_camera.numpy().copy()
    poses[:, 2, 3] -= sequence.half_room[2]
    return World(
        np.array(sequence.half_room), lambda stamps: poses[np.array(stamps) // FRAME_PERIOD_NS]
    )


def render_sequence(
    sequence: SyntheticSequence, seed: int, height: int, width: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """
    Render a sequence in a furnished room.

    :param seed: of the furniture, in the test split.
    :returns: images (S, H, W, 3), RGB, and depth (S, H, W) in m.
    """
    random = RandomStreams(window_seeds('test', seed, 0, 1))
    poses = sequence.world_from_camera.float()
    room = random_rooms(random, torch.tensor([sequence.half_room]))
    room = remove_obstacles(room, poses[None, :, :3, 3])
    matrix = torch.from_numpy(true_intrinsics(height, width)).float()
    chunks = [
        render(room, chunk, matrix.expand(len(chunk), 3, 3), height, width)
        for chunk in poses.split(_FRAMES_PER_CHUNK)
    ]
    images, depth = (torch.cat(each).numpy() for each in zip(*chunks, strict=True))
    return images, depth


def evaluate_named_sequence(
    name: str,
    frames: int,
    seed: int,
    network: Network | None,
    noise: PredictionNoise,
    failed_window: int | None = None,
    **settings: object,
) -> dict[str, Any]:
    """
    Map a sequence of `SEQUENCES` and evaluate the map.

    :param network: None: one that predicts the ground truth of an empty room, with noise.
    :param failed_window: see `map_sequence`, as `settings`.
    :returns: see `evaluate_sequence`; also `sequence`, `frames`, `seed` and `model`.
    :raises ValueError: if the sequence is shorter than a window.
    """
    sequence = SEQUENCES[name](frames)
    truth = sequence.world_from_camera.numpy()
    world = sequence_world(sequence)
    model = network or TruthNetwork(world, noise, seed=seed)
    height, width = image_size(model.image_width)
    if network is None:
        stamps = [i * FRAME_PERIOD_NS for i in range(frames)]
        images = np.stack([world.render_image(stamp, height, width) for stamp in stamps])
        updates = map_sequence(model, images, failed_window, **settings)
        results = evaluate_sequence(
            updates, truth, lambda i: world.depth(i * FRAME_PERIOD_NS, height, width), None
        )
    else:
        images, depth = render_sequence(sequence, seed, height, width)
        updates = map_sequence(model, images, failed_window, **settings)
        results = evaluate_sequence(updates, truth, lambda i: depth[i], images)
    return {'sequence': name, 'frames': frames, 'seed': seed, 'model': model.name, **results}


def map_sequence(
    network: Network,
    images: Iterable[npt.NDArray[np.uint8]],
    failed_window: int | None = None,
    **settings: object,
) -> list[MapUpdate]:
    """
    Run the engine on a sequence, with windows of 8 frames and a stride of 4.

    :param images: S images (H, W, 3); frame i has the stamp i · `FRAME_PERIOD_NS`.
    :param failed_window: index of a window for which the network predicts NaN.
    :param settings: others than these defaults.
    """
    flat = {'window_size': 8, 'window_stride': 4, 'min_parallax': 0.0, **settings}
    if failed_window is not None:
        network = _FailingNetwork(network, failed_window)
    engine = StreamingEngine(Settings.from_flat(flat), network)
    updates = []
    for i, image in enumerate(images):
        try:
            update = engine.add(Frame(image, i * FRAME_PERIOD_NS, 'camera'))
        except PredictionError:
            continue
        if update is not None:
            updates.append(update)
    return updates


class _FailingNetwork:
    """A network whose depth is NaN for one window."""

    def __init__(self, network: Network, window_id: int) -> None:
        self.name, self.trained = network.name, network.trained
        self.device, self.precision = network.device, network.precision
        self.image_width, self.tracks_trained = network.image_width, network.tracks_trained
        self.attention = network.attention
        self._network, self._window_id = network, window_id

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        prediction = self._network(batch, heads)
        if batch.window_id == self._window_id and prediction.depth is not None:
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
    true_depth: DepthLookup,
    images: npt.NDArray[np.uint8] | None,
) -> dict[str, Any]:
    """
    Compare the largest map with the ground truth.

    :param updates: of `map_sequence`.
    :param truth: (S, 4, 4), camera-to-world, of all frames.
    :param images: (S, H, W, 3) for the baseline `two_view`; None omits it.
    :returns: `ours` and `baselines` by name, each with `ate_percent` (absolute trajectory error
        after one Sim(3), rms, of the trajectory's length), `rotation_deg` (mean, after one
        rotation), `scale_drift_percent` (largest change of scale against the first window),
        `maps`, `windows` and `frames`; `ours` also `loops`, the number of loop closures. A metric
        is None where it is undefined.
    """
    map_ids = sorted({update.map_id for update in updates})
    if not map_ids:
        raise ValueError('there is no map: the sequence is shorter than a window')
    maps = [[update for update in updates if update.map_id == map_id] for map_id in map_ids]
    largest = max(maps, key=len)
    windows = [(update.batch.ids, update.reconstruction) for update in largest]
    counts = {'maps': len(maps), 'windows': len(largest)}
    loops = sum(update.loop_closure is not None for update in largest)
    baselines: dict[str, dict[str, Any]] = {}
    try:
        registered = register_by_centres(windows)
    except ValueError:  # the centres coincide
        metrics = {**_pose_metrics({}, truth), 'scale_drift_percent': None}
    else:
        metrics = _map_metrics(largest, registered, truth, true_depth)
    baselines['centres'] = {**metrics, **counts}
    if images is not None:
        poses = sift_odometry(images, true_intrinsics(*images.shape[1:3]))
        baselines['two_view'] = {
            **_pose_metrics(dict(enumerate(poses)), truth),
            'scale_drift_percent': None,
            'maps': 1,
            'windows': len(poses) - 1,
        }
    ours = _map_metrics(largest, corrected_registrations(largest), truth, true_depth)
    return {'ours': {**ours, **counts, 'loops': loops}, 'baselines': baselines}


def _map_metrics(
    updates: list[MapUpdate], map_from_window: list[Sim3], truth: Array, true_depth: DepthLookup
) -> dict[str, Any]:
    """Compute the metrics of registered windows; each frame counts in its first window."""
    poses: dict[int, Array] = {}
    scales = []
    for update, transform in zip(updates, map_from_window, strict=True):
        cameras = transform.transform_poses(update.reconstruction.window_from_camera)
        for frame_id, camera in zip(update.batch.ids, cameras, strict=True):
            poses.setdefault(frame_id, camera)
        depth = transform.scale * update.reconstruction.depth[len(update.batch.ids) - 1]
        scales.append(np.median(depth / true_depth(update.batch.ids[-1])))
    drift = np.abs(np.array(scales) / scales[0] - 1).max()
    return {**_pose_metrics(poses, truth), 'scale_drift_percent': 100 * float(drift)}


def _pose_metrics(poses: dict[int, Array], truth: Array) -> dict[str, Any]:
    """Compare poses by frame id with the truth of all frames."""
    ids = sorted(poses)
    metrics: dict[str, Any] = {'ate_percent': None, 'rotation_deg': None, 'frames': len(ids)}
    if not ids:
        return metrics
    true, estimate = truth[ids], np.stack([poses[frame_id] for frame_id in ids])
    metrics['rotation_deg'] = math.degrees(orientation_errors(true, estimate).mean())
    if np.ptp(true[:, :3, 3], axis=0).max() > _STATIONARY:
        # the alignment of a stationary estimate is undetermined
        with suppress(ValueError):
            metrics['ate_percent'] = compare_trajectories(true, estimate).position_percent
    return metrics


COLUMNS = ('ate_percent', 'rotation_deg', 'scale_drift_percent', 'maps', 'windows', 'frames')


def sequence_table(sequences: Sequence[dict[str, Any]]) -> str:
    """Format the metrics of sequences as a Markdown table."""
    lines = ['| sequence | registration | ' + ' | '.join(COLUMNS) + ' |', '|---|---|' + '--:|' * 6]
    for sequence in sequences:
        for row, metrics in {'ours': sequence['ours'], **sequence['baselines']}.items():
            cells = ' | '.join(_cell(metrics[name]) for name in COLUMNS)
            lines.append(f'| {sequence["sequence"]} | {row} | {cells} |')
    return '\n'.join(lines)


def _cell(value: float | None) -> str:
    return '-' if value is None else f'{value:.3g}'
