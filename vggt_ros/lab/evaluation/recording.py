# SPDX-License-Identifier: Apache-2.0
"""The map of a recording against its truth: path, depth, and how both change on the way."""

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
from vggt_ros.lab.evaluation.trajectory import compare_paths, relative_errors
from vggt_ros.lab.evaluation.window_metrics import WindowErrors
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.settings import Settings

_POINTS = 500  # of each frame, for the comparison of clouds
_AT_ONCE = 1000  # points


@dataclass
class _Map:
    """What one map says of the frames in it, and by which window."""

    poses: dict[float, tuple[int, Array]] = field(default_factory=dict)  # (4, 4), by stamp
    units: list[tuple[float, float]] = field(default_factory=list)  # stamp, m in a unit, by depth
    points: list[tuple[int, Array]] = field(default_factory=list)  # (N, 3), of new frames
    true_points: list[Array] = field(default_factory=list)  # (N, 3), measured, in the world

    def correct(self, corrections: Mapping[int, Sim3]) -> None:
        """Move what windows, by number, have told."""
        self.poses = {
            stamp: (window, corrections[window].transform_poses(pose))
            for stamp, (window, pose) in self.poses.items()
        }
        self.points = [(window, corrections[window].apply(xyz)) for window, xyz in self.points]


@dataclass(frozen=True)
class RecordingEvaluation:
    """The largest map of a recording beside the truth of the same S frames."""

    name: str
    figures: dict[str, Any]
    stamps: Array  # (S,), s
    truth: Array  # (S, 4, 4)
    estimate: Array  # (S, 4, 4), fitted to the truth by one similarity
    units: Array  # (W, 2): stamp, s, and the change of the map's unit against its first window

    def save(self, folder: Path) -> None:
        """Write `truth.tum`, `estimate.tum` and `path.png` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_trajectory(folder / 'truth.tum', list(self.stamps), self.truth)
        write_trajectory(folder / 'estimate.tum', list(self.stamps), self.estimate)
        self._draw(folder / 'path.png')

    def _draw(self, path: Path) -> None:
        figure = Figure(figsize=(15, 5), dpi=100, layout='constrained')
        FigureCanvasAgg(figure)
        figure.suptitle(
            f'{self.name}: {len(self.stamps)} frames, '
            f'position {self.figures["ate_m"]:.3f} m rms ({self.figures["ate_percent"]:.1f} %), '
            f'rotation {self.figures["rotation_deg"]:.1f} deg'
        )
        from_above, over_time, unit = figure.subplots(1, 3)
        # the plane in which the camera moved the most
        centres = self.truth[:, :3, 3]
        first, second = np.sort(np.argsort(np.ptp(centres, axis=0))[1:])
        for poses, colour, label in (
            (self.truth, '#333333', 'truth'),
            (self.estimate, '#d62728', 'estimate'),
        ):
            from_above.plot(*poses[:, (first, second), 3].T, color=colour, label=label)
        from_above.set(xlabel=f'{"xyz"[first]} (m)', ylabel=f'{"xyz"[second]} (m)', title='path')
        from_above.set_aspect('equal', adjustable='datalim')
        from_above.legend()
        seconds = self.stamps - self.stamps[0]
        off = np.linalg.norm(self.estimate[:, :3, 3] - centres, axis=1)
        over_time.plot(seconds, off, color='#d62728')
        over_time.set(xlabel='time (s)', ylabel='position error (m)', title='error')
        unit.plot(self.units[:, 0] - self.stamps[0], 100 * (self.units[:, 1] - 1), color='#1f77b4')
        unit.set(xlabel='time (s)', ylabel="change of the map's unit (%)", title='scale')
        for axes in (from_above, over_time, unit):
            axes.grid(alpha=0.3)
        figure.savefig(path, format='png')


def evaluate_recording(
    network: Network, recording: RgbdRecording, settings: Settings, step: int = 1, frames: int = 0
) -> RecordingEvaluation:
    """
    Map a recording and compare the largest map with the truth.

    :param step: every so many frames are taken.
    :param frames: at most so many are; 0: all.
    :returns: with the figures `ate_m`, `ate_percent`, `rotation_deg`, `rpe_m`, `rpe_deg` (medians,
        from frame to frame), `scale_drift_percent`, `absrel`, `delta1` (after one scale for each
        window), `cloud_accuracy_m` and `cloud_completeness_m` (see `compare_clouds`), `maps`,
        `frames`.
    :raises ValueError: if there is nothing that can be compared.
    """
    engine = StreamingEngine(settings, network)
    maps: dict[int, _Map] = {}
    depths = WindowErrors()
    truths: dict[float, RgbdFrame] = {}
    waiting: dict[int, RgbdFrame] = {}  # by stamp in ns, of the frames that a window may hold
    for index in list(range(0, len(recording), step))[: frames or None]:
        shot = recording.frame(index)
        stamp_ns = round(shot.stamp * 1e9)
        waiting[stamp_ns] = shot
        try:
            update = engine.add(Frame(shot.image, stamp_ns, recording.name, shot.calibration))
        except PredictionError:
            continue  # the engine has counted it, and a new map says so
        if update is None:
            continue
        known = maps.setdefault(update.map_id, _Map())
        if update.loop_closure is not None:
            known.correct(update.loop_closure.corrections)
        _compare_depth(update, waiting, known, depths)
        _gather_points(update, waiting, known)
        for frame, pose in zip(update.batch.frames, update.world_from_camera, strict=True):
            shown = waiting[frame.stamp_ns]
            truths[shown.stamp] = shown
            known.poses.setdefault(shown.stamp, (update.window_id, pose))
        oldest = update.batch.frames[0].stamp_ns
        waiting = {stamp: each for stamp, each in waiting.items() if stamp >= oldest}
    if not maps:
        raise ValueError(
            f'{recording.name}: there is no map; the recording is shorter than a window'
        )
    largest = max(maps.values(), key=lambda each: len(each.poses))
    stamps = np.array(sorted(largest.poses))
    truth = np.stack([truths[stamp].world_from_camera for stamp in stamps])
    estimate = np.stack([largest.poses[stamp][1] for stamp in stamps])
    errors = compare_paths(truth, estimate)
    fitted = errors.truth_from_estimate.transform_poses(estimate)
    moved, turned = relative_errors(truth, fitted)
    units = np.array(largest.units).reshape(-1, 2)
    figures: dict[str, Any] = {
        'ate_m': errors.position_rms,
        'ate_percent': errors.position_percent,
        'rotation_deg': math.degrees(errors.rotation_mean),
        'rpe_m': float(np.median(moved)),
        'rpe_deg': math.degrees(float(np.median(turned))),
        'maps': len(maps),
        'frames': len(stamps),
        **depths.figures(),
    }
    if largest.true_points:
        found = errors.truth_from_estimate.apply(
            np.concatenate([xyz for _, xyz in largest.points])
        )
        told = compare_clouds(np.concatenate(largest.true_points), found)
        figures['cloud_accuracy_m'], figures['cloud_completeness_m'] = told
    if len(units):
        units[:, 1] /= units[0, 1]
        figures['scale_drift_percent'] = 100 * float(np.abs(units[:, 1] - 1).max())
    return RecordingEvaluation(recording.name, figures, stamps, truth, fitted, units)


def _compare_depth(
    update: MapUpdate, shots: dict[int, RgbdFrame], known: _Map, errors: WindowErrors
) -> None:
    """Compare a window's depth with what was measured, if anything was."""
    frames, depth = update.batch.frames, update.reconstruction.depth
    found = update.world_from_window.scale * np.stack(list(depth.values()))
    true = np.stack([_measured(update, i, shots[frames[i].stamp_ns].depth) for i in depth])
    valid = true > 0  # NaN compares false
    if not valid.any():
        return
    newest = update.batch.frames[-1].stamp_ns
    known.units.append((shots[newest].stamp, float(np.median(true[valid] / found[valid]))))
    errors.add_depth(
        *(torch.from_numpy(each)[None] for each in (found, np.nan_to_num(true), valid))
    )


def _gather_points(update: MapUpdate, shots: dict[int, RgbdFrame], known: _Map) -> None:
    """Take some points of each new frame, as the map has them and as they were measured."""
    for i, frame in enumerate(update.batch.frames):
        shot, fitted = shots[frame.stamp_ns], update.batch.images[i]
        depth = _measured(update, i, shot.depth)
        valid = depth > 0
        if not update.is_new[i] or not valid.any():
            continue
        source = shot.intrinsics if fitted.source_intrinsics is None else fitted.source_intrinsics
        matrix = torch.from_numpy(np.linalg.inv(fitted.source_from_network) @ source)
        in_camera = unproject(torch.from_numpy(depth).double(), matrix).numpy()[valid]
        pose = shot.world_from_camera
        measured = in_camera @ pose[:3, :3].T + pose[:3, 3]
        known.true_points.append(_thin(measured))
        found = _thin(update.point_cloud(i).xyz.astype(np.float64))
        known.points.append((update.window_id, found))


def _thin(points: Array) -> Array:
    return points[np.linspace(0, len(points) - 1, min(len(points), _POINTS)).astype(np.intp)]


def compare_clouds(truth: Array, found: Array) -> tuple[float, float]:
    """
    Measure how near two clouds are, as DTU's benchmark does (Jensen et al., CVPR 2014).

    :param truth: (N, 3), m.
    :param found: (M, 3), fitted to it.
    :returns: accuracy, the mean distance of found points to the nearest true one, and
        completeness, that of true points to the nearest found one.
    """
    one, other = torch.from_numpy(truth), torch.from_numpy(found)
    means = []
    for here, there in ((other, one), (one, other)):
        nearest = [torch.cdist(part, there).amin(1) for part in here.split(_AT_ONCE)]
        means.append(float(torch.cat(nearest).mean()))
    return means[0], means[1]


def _measured(update: MapUpdate, i: int, depth: Depth) -> Depth:
    fitted = update.batch.images[i]
    rows, columns = np.indices(update.reconstruction.image_size)
    size = update.batch.frames[i].image.shape[:2]
    return sample_source(depth, size, fitted.source_from_network, rows, columns, fitted.pixel_map)


def recording_table(way: RecordingEvaluation) -> str:
    """Lay the figures out for a person."""
    lines = [way.name, *(f'  {name:20} {value:.4g}' for name, value in way.figures.items())]
    return '\n'.join(lines)
