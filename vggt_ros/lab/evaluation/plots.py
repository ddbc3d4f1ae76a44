# SPDX-License-Identifier: Apache-2.0
"""
Figures as PNG files: a run of the node beside the ground truth, synthetic windows, benchmarks.

Drawn with matplotlib, without a display. Nothing is aligned or converted: the positions of a run
come in one frame whose z axis points up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from vggt_ros.geometry.outliers import inlier_mask
from vggt_ros.geometry.rotation import rotation_angle
from vggt_ros.lab.synthetic.windows import SyntheticWindows

_Array = npt.NDArray[np.floating[Any]]

ESTIMATE_COLOUR = '#d62728'
TRUTH_COLOUR = '#333333'


@dataclass(frozen=True)
class RunFigure:
    """The contents of the figure of a run; positions in one frame, z up."""

    title: str
    warning: str  # shown in red, '' for none
    trajectory_note: str  # the remaining errors
    unit: str  # of lengths
    estimate: _Array  # (S, 4, 4) world_from_camera
    truth: _Array | None  # (T, 4, 4) world_from_camera
    image: npt.NDArray[np.uint8]  # (H, W, 3)
    depth: _Array  # (h, w), NaN where invalid
    cloud: _Array  # (N, 3)
    cloud_colours: npt.NDArray[np.uint8]  # (N, 3)
    table: str  # monospaced


def draw_run(run: RunFigure, path: Path) -> None:
    """Write the figure: trajectory, an image and its depth, the cloud from two sides, a table."""
    figure = Figure(figsize=(16, 10), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(run.title, fontsize=15)
    axes = figure.subplots(2, 3)
    _draw_image(axes[0, 0], run)
    _draw_depth(figure, axes[0, 1], run)
    _draw_trajectory(axes[0, 2], run)
    _draw_cloud(axes[1, 0], run, 1, 'point cloud from above', f'y ({run.unit})')
    _draw_cloud(axes[1, 1], run, 2, 'point cloud from the side', f'z, up ({run.unit})')
    _draw_table(axes[1, 2], run)
    if run.warning:
        figure.supxlabel(run.warning, fontsize=15, color='white', backgroundcolor='#c00000')
    figure.savefig(path, format='png')


def _draw_image(axes: Any, run: RunFigure) -> None:
    axes.imshow(run.image)
    axes.set_title('camera image')
    axes.set_axis_off()


def _draw_depth(figure: Figure, axes: Any, run: RunFigure) -> None:
    axes.set_title('its depth')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor('#bbbbbb')
    valid = np.isfinite(run.depth)
    axes.set_xlabel(f'{valid.mean():.0%} of the pixels are valid (invalid ones are grey)')
    if not valid.any():
        return
    low, high = np.percentile(run.depth[valid], (1, 99))
    drawn = axes.imshow(np.ma.masked_invalid(run.depth), cmap='turbo_r', vmin=low, vmax=high)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label=f'depth along the optical axis ({run.unit})')


def _draw_trajectory(axes: Any, run: RunFigure) -> None:
    if run.truth is not None:
        _draw_cameras(axes, run.truth, TRUTH_COLOUR, 'truth', width=5, alpha=0.35)
    _draw_cameras(axes, run.estimate, ESTIMATE_COLOUR, 'estimate', width=1.5, alpha=1)
    axes.set_title(f'camera trajectory from above\n{run.trajectory_note}', fontsize=11)
    axes.legend(loc='best')
    _label_axes(axes, f'x ({run.unit})', f'y ({run.unit})')
    axes.margins(0.1)
    axes.set_aspect('equal', adjustable='box')


def _draw_cameras(
    axes: Any, poses: _Array, colour: str, label: str, width: float, alpha: float
) -> None:
    """Draw a line through the centres, a dot at the start and a few viewing directions."""
    x, y = poses[:, 0, 3], poses[:, 1, 3]
    axes.plot(x, y, color=colour, linewidth=width, alpha=alpha, label=label)
    axes.plot(x[:1], y[:1], 'o', color=colour, markersize=8, alpha=alpha)
    few = poses[np.unique(np.linspace(0, len(poses) - 1, 8).astype(int))]
    axes.quiver(
        *few[:, :2, 3].T,
        *few[:, :2, 2].T,
        color=colour,
        alpha=alpha,
        angles='xy',
        scale=12,
        width=0.004,
    )


def _draw_cloud(axes: Any, run: RunFigure, vertical: int, title: str, label: str) -> None:
    axes.set_title(f'{title} ({len(run.cloud)} points)')
    axes.set_facecolor('#f4f4f4')
    _label_axes(axes, f'x ({run.unit})', label)
    axes.set_aspect('equal', adjustable='datalim')
    if len(run.cloud) == 0:
        return
    inliers = inlier_mask(run.cloud)
    # Far points first, so that the nearest to the viewer are on top.
    order = np.argsort(run.cloud[inliers, 2] if vertical == 1 else -run.cloud[inliers, 1])
    points, colours = run.cloud[inliers][order], run.cloud_colours[inliers][order]
    axes.scatter(points[:, 0], points[:, vertical], s=1.2, c=colours / 255, linewidths=0)
    axes.plot(
        run.estimate[:, 0, 3], run.estimate[:, vertical, 3], color=ESTIMATE_COLOUR, linewidth=1.5
    )


def _draw_table(axes: Any, run: RunFigure) -> None:
    axes.set_axis_off()
    axes.set_title('received messages')
    axes.text(0, 0.97, run.table, family='monospace', fontsize=7.5, va='top')


def _label_axes(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)


# --- synthetic windows


def draw_windows(windows: SyntheticWindows, path: Path) -> None:
    """Write a contact sheet: a row for each window, its frames with tracks, and one depth."""
    count, frames, _, height, width = windows.images.shape
    figure = Figure(
        figsize=(2.6 * (frames + 1), 2.6 * height / width * count + 0.4 * count),
        dpi=80,
        layout='constrained',
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(count, frames + 1, squeeze=False)
    colours = matplotlib.colormaps['hsv'].resampled(windows.tracks.shape[2] + 1)
    for row, axes in enumerate(grid):
        for frame, axis in enumerate(axes[:-1]):
            axis.imshow(windows.images[row, frame].permute(1, 2, 0).cpu().numpy())
            visible = windows.visible[row, frame].cpu()
            points = windows.tracks[row, frame].cpu()[visible].numpy()
            point_colours = [colours(int(index)) for index in visible.nonzero()[:, 0]]
            axis.scatter(*points.T, s=14, c=point_colours or None, edgecolors='white', lw=0.5)
        axes[0].set_title(_window_title(windows, row), fontsize=8, loc='left')
        depth = windows.depth[row, 0].cpu().numpy()
        axes[-1].imshow(depth, cmap='turbo', vmin=0)
        axes[-1].set_title(f'depth {depth.min():.1f} to {depth.max():.1f} m', fontsize=8)
        for axis in axes:
            axis.set_xlim(-0.5, width - 0.5)
            axis.set_ylim(height - 0.5, -0.5)
            axis.set_axis_off()
    figure.savefig(path, format='png')


def _window_title(windows: SyntheticWindows, row: int) -> str:
    poses = windows.world_from_camera[row].double().cpu()
    baseline = float((poses[:, :3, 3] - poses[:1, :3, 3]).norm(dim=-1).max())
    rotations = poses[:1, :3, :3].mT @ poses[:, :3, :3]
    rotation = math.degrees(float(rotation_angle(rotations).max()))
    focal = float(windows.intrinsics[row, 0, 0, 0])
    view = math.degrees(2 * math.atan(windows.images.shape[-1] / 2 / focal))
    return f'baseline {baseline:.2f} m, rotation {rotation:.0f}°, field of view {view:.0f}°'


# --- benchmarks


def draw_speed(results: Sequence[dict[str, Any]], path: Path) -> None:
    """
    Plot time and memory over the frames of a window, as PNG.

    :param results: of `benchmark_sizes`, of one size of network and one device.
    """
    figure = Figure(figsize=(11, 4.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for resolution in dict.fromkeys(each['resolution'] for each in results):
        own = [each for each in results if each['resolution'] == resolution]
        for stride in sorted({each['stride'] for each in own}):
            line = sorted((e for e in own if e['stride'] == stride), key=lambda e: e['frames'])
            frames = [each['frames'] for each in line]
            milliseconds = [1e3 * each['engine']['p50'] for each in line]
            label = f'{resolution}, {stride} new'
            time_axes.plot(frames, milliseconds, 'o-', label=f'engine, {label}')
            measured = [each['peak_memory_bytes'] for each in line]
            if None not in measured:
                megabytes = [each / 1e6 for each in measured]
                memory_axes.plot(frames, megabytes, 's--', label=f'measured, {label}')
        predicted = {each['frames']: each['predicted_memory_bytes'] / 1e6 for each in own}
        memory_axes.plot(*zip(*sorted(predicted.items())), 'o-', label=f'predicted, {resolution}')
        naive = {each['frames']: 1e3 * each['naive']['p50'] for each in own}
        time_axes.plot(*zip(*sorted(naive.items())), 'k:', label=f'whole windows, {resolution}')
    time_axes.set_ylabel('time for a window, ms (median)')
    memory_axes.set_ylabel('memory with the weights, MB')
    for axes in (time_axes, memory_axes):
        axes.set_xlabel('frames in a window')
        axes.set_xscale('log', base=2)
        axes.set_xticks(sorted({each['frames'] for each in results}))
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter('%g'))
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=8)
    first = results[0]
    figure.suptitle(f'{first["size"]} on {first["device"]}, {first["precision"]}')
    figure.savefig(path)
