# SPDX-License-Identifier: Apache-2.0
"""Evaluate the map of a recording against its ground truth: trajectory, depth, cloud and scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import sample_source
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.camera import unproject
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.inference.network import Network
from vggt_ros.io.rgbd import Depth, RgbdFrame, RgbdRecording
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.lab.evaluation.plots import ESTIMATE_COLOUR, TRUTH_COLOUR
from vggt_ros.lab.evaluation.trajectory_errors import compare_trajectories, relative_pose_errors
from vggt_ros.lab.evaluation.window_metrics import WindowErrors
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.settings import Settings

_POINTS_PER_FRAME = 500  # in the comparison of clouds
_POINTS_PER_CHUNK = 1000


@dataclass
class _MapRecord:
    """The frames of one map, each with the window that its pose and points come from."""

    poses: dict[float, tuple[int, Array]] = field(default_factory=dict)  # (4, 4), by stamp
    scales: list[tuple[float, float]] = field(default_factory=list)  # stamp, m in a map unit
    points: list[tuple[int, Array]] = field(default_factory=list)  # (N, 3), of new frames
    true_points: list[Array] = field(default_factory=list)  # (N, 3), measured, world frame

    def correct(self, corrections: Mapping[int, Sim3]) -> None:
        """Apply corrections of a loop closure, by window id."""
        self.poses = {
            stamp: (window, corrections[window].transform_poses(pose))
            for stamp, (window, pose) in self.poses.items()
        }
        self.points = [(window, corrections[window].apply(xyz)) for window, xyz in self.points]


@dataclass(frozen=True)
class RecordingEvaluation:
    """The largest map of a recording beside the ground truth of its S frames."""

    name: str
    metrics: dict[str, Any]
    stamps: Array  # (S,), s
    truth: Array  # (S, 4, 4)
    estimate: Array  # (S, 4, 4), aligned with the truth by one similarity
    scales: Array  # (W, 2): stamp, s, and scale relative to the first window's

    def save(self, folder: Path) -> None:
        """Write `truth.tum`, `estimate.tum` and `path.png` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_trajectory(folder / 'truth.tum', list(self.stamps), self.truth)
        write_trajectory(folder / 'estimate.tum', list(self.stamps), self.estimate)
        self._draw(folder / 'path.png')

    def _draw(self, path: Path) -> None:
        figure = Figure(figsize=(15, 5), dpi=100, layout='constrained')
        FigureCanvasAgg(figure)
        ate_m, ate_percent = self.metrics['ate_m'], self.metrics['ate_percent']
        figure.suptitle(
            f'{self.name}: {len(self.stamps)} frames, '
            f'position {ate_m:.3f} m rms ({ate_percent:.1f} %), '
            f'rotation {self.metrics["rotation_deg"]:.1f} deg'
        )
        trajectory, error, scale = figure.subplots(1, 3)
        # the plane in which the camera moved the most
        centres = self.truth[:, :3, 3]
        first, second = np.sort(np.argsort(np.ptp(centres, axis=0))[1:])
        for poses, colour, label in (
            (self.truth, TRUTH_COLOUR, 'truth'),
            (self.estimate, ESTIMATE_COLOUR, 'estimate'),
        ):
            trajectory.plot(*poses[:, (first, second), 3].T, color=colour, label=label)
        trajectory.set(
            xlabel=f'{"xyz"[first]} (m)', ylabel=f'{"xyz"[second]} (m)', title='trajectory'
        )
        trajectory.set_aspect('equal', adjustable='datalim')
        trajectory.legend()
        seconds = self.stamps - self.stamps[0]
        distance = np.linalg.norm(self.estimate[:, :3, 3] - centres, axis=1)
        error.plot(seconds, distance, color=ESTIMATE_COLOUR)
        error.set(xlabel='time (s)', ylabel='position error (m)', title='error')
        stamps, relative = self.scales.T
        scale.plot(stamps - self.stamps[0], 100 * (relative - 1), color='#1f77b4')
        scale.set(xlabel='time (s)', ylabel='scale drift (%)', title='scale')
        for axes in (trajectory, error, scale):
            axes.grid(alpha=0.3)
        figure.savefig(path, format='png')


def evaluate_recording(
    network: Network, recording: RgbdRecording, settings: Settings, step: int = 1, frames: int = 0
) -> RecordingEvaluation:
    """
    Map a recording and compare the largest map with the ground truth.

    :param step: use every `step`-th frame.
    :param frames: largest number of frames; 0: all.
    :returns: with the metrics `ate_m`, `ate_percent`, `rotation_deg`, `rpe_m`, `rpe_deg` (medians,
        between consecutive frames), `scale_drift_percent`, `absrel`, `delta1` (after one scale for
        each window), `cloud_accuracy_m` and `cloud_completeness_m` (see `compare_clouds`), `maps`,
        `frames`.
    :raises ValueError: if there is no map.
    """
    engine = StreamingEngine(settings, network)
    maps: dict[int, _MapRecord] = {}
    depth_errors = WindowErrors()
    truths: dict[float, RgbdFrame] = {}
    recent: dict[int, RgbdFrame] = {}  # by stamp in ns, of the frames that a window may contain
    for index in list(range(0, len(recording), step))[: frames or None]:
        true_frame = recording.frame(index)
        stamp_ns = round(true_frame.stamp * 1e9)
        recent[stamp_ns] = true_frame
        frame = Frame(true_frame.image, stamp_ns, recording.name, true_frame.calibration)
        try:
            update = engine.add(frame)
        except PredictionError:
            continue  # counted by the engine, which starts a new map
        if update is None:
            continue
        record = maps.setdefault(update.map_id, _MapRecord())
        if update.loop_closure is not None:
            record.correct(update.loop_closure.corrections)
        _compare_depth(update, recent, record, depth_errors)
        _add_points(update, recent, record)
        for frame, pose in zip(update.batch.frames, update.world_from_camera, strict=True):
            true_frame = recent[frame.stamp_ns]
            truths[true_frame.stamp] = true_frame
            record.poses.setdefault(true_frame.stamp, (update.window_id, pose))
        oldest = update.batch.frames[0].stamp_ns
        recent = {stamp: each for stamp, each in recent.items() if stamp >= oldest}
    if not maps:
        raise ValueError(
            f'{recording.name}: there is no map; the recording is shorter than a window'
        )
    largest = max(maps.values(), key=lambda record: len(record.poses))
    stamps = np.array(sorted(largest.poses))
    truth = np.stack([truths[stamp].world_from_camera for stamp in stamps])
    estimate = np.stack([largest.poses[stamp][1] for stamp in stamps])
    errors = compare_trajectories(truth, estimate)
    aligned = errors.truth_from_estimate.transform_poses(estimate)
    translation_errors, rotation_errors = relative_pose_errors(truth, aligned)
    scales = np.array(largest.scales).reshape(-1, 2)
    metrics: dict[str, Any] = {
        'ate_m': errors.position_rms,
        'ate_percent': errors.position_percent,
        'rotation_deg': math.degrees(errors.rotation_mean),
        'rpe_m': float(np.median(translation_errors)),
        'rpe_deg': math.degrees(float(np.median(rotation_errors))),
        'maps': len(maps),
        'frames': len(stamps),
        **depth_errors.metrics(),
    }
    if largest.true_points:
        cloud = errors.truth_from_estimate.apply(
            np.concatenate([xyz for _, xyz in largest.points])
        )
        accuracy, completeness = compare_clouds(np.concatenate(largest.true_points), cloud)
        metrics['cloud_accuracy_m'], metrics['cloud_completeness_m'] = accuracy, completeness
    if len(scales):
        scales[:, 1] /= scales[0, 1]
        metrics['scale_drift_percent'] = 100 * float(np.abs(scales[:, 1] - 1).max())
    return RecordingEvaluation(recording.name, metrics, stamps, truth, aligned, scales)


def _compare_depth(
    update: MapUpdate, truths: dict[int, RgbdFrame], record: _MapRecord, errors: WindowErrors
) -> None:
    """Compare a window's depth with the measured depth, if there is any."""
    frames, depth = update.batch.frames, update.reconstruction.depth
    estimate = update.world_from_window.scale * np.stack(list(depth.values()))
    true = np.stack([_measured_depth(update, i, truths[frames[i].stamp_ns].depth) for i in depth])
    valid = true > 0  # False for NaN
    if not valid.any():
        return
    newest = truths[update.batch.frames[-1].stamp_ns].stamp
    record.scales.append((newest, float(np.median(true[valid] / estimate[valid]))))
    errors.add_depth(
        *(torch.from_numpy(each)[None] for each in (estimate, np.nan_to_num(true), valid))
    )


def _add_points(update: MapUpdate, truths: dict[int, RgbdFrame], record: _MapRecord) -> None:
    """Add estimated and measured points of each new frame."""
    for i, frame in enumerate(update.batch.frames):
        truth, image = truths[frame.stamp_ns], update.batch.images[i]
        depth = _measured_depth(update, i, truth.depth)
        valid = depth > 0
        if not update.is_new[i] or not valid.any():
            continue
        source = truth.intrinsics if image.source_intrinsics is None else image.source_intrinsics
        matrix = torch.from_numpy(np.linalg.inv(image.source_from_network) @ source)
        in_camera = unproject(torch.from_numpy(depth).double(), matrix).numpy()[valid]
        pose = truth.world_from_camera
        measured = in_camera @ pose[:3, :3].T + pose[:3, 3]
        record.true_points.append(_subsample(measured))
        estimate = _subsample(update.point_cloud(i).xyz.astype(np.float64))
        record.points.append((update.window_id, estimate))


def _subsample(points: Array) -> Array:
    count = min(len(points), _POINTS_PER_FRAME)
    return points[np.linspace(0, len(points) - 1, count).astype(np.intp)]


def compare_clouds(truth: Array, estimate: Array) -> tuple[float, float]:
    """
    Compute accuracy and completeness as the DTU benchmark does (Jensen et al., CVPR 2014).

    :param truth: (N, 3), m.
    :param estimate: (M, 3), aligned with the truth.
    :returns: accuracy, the mean distance of estimated points to the nearest true one, and
        completeness, that of true points to the nearest estimated one.
    """
    true, estimated = torch.from_numpy(truth), torch.from_numpy(estimate)
    means = []
    for points, reference in ((estimated, true), (true, estimated)):
        nearest = [
            torch.cdist(chunk, reference).amin(1) for chunk in points.split(_POINTS_PER_CHUNK)
        ]
        means.append(float(torch.cat(nearest).mean()))
    return means[0], means[1]


def _measured_depth(update: MapUpdate, i: int, depth: Depth) -> Depth:
    """Return the measured depth at the pixels of the network's image."""
    image = update.batch.images[i]
    rows, columns = np.indices(update.reconstruction.image_size)
    size = update.batch.frames[i].image.shape[:2]
    return sample_source(depth, size, image.source_from_network, rows, columns, image.pixel_map)


def recording_table(evaluation: RecordingEvaluation) -> str:
    """Format the metrics, one a line."""
    lines = [f'  {name:20} {value:.4g}' for name, value in evaluation.metrics.items()]
    return '\n'.join([evaluation.name, *lines])
