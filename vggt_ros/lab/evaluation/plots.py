# SPDX-License-Identifier: Apache-2.0
"""
One picture of a run: the path beside the truth, an image beside its depth, the cloud, the rates.

Draws plain arrays with matplotlib into a file, without a screen. It fits and converts nothing:
positions come in one frame whose z axis points up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_ros.geometry.outliers import inlier_mask

Array = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

ESTIMATE_COLOUR = '#d62728'
TRUTH_COLOUR = '#333333'


@dataclass(frozen=True)
class RunPicture:
    """Everything that is drawn; positions in one frame, z up."""

    title: str
    warning: str  # shown in red, '' for none
    path_note: str  # what the fit left over
    unit: str  # of lengths
    estimate: Array  # (S, 4, 4) world_from_camera
    truth: Array | None  # (T, 4, 4) world_from_camera
    image: Pixels  # (H, W, 3)
    depth: Array  # (h, w), NaN where not trusted
    cloud: Array  # (N, 3)
    cloud_colours: Pixels  # (N, 3)
    table: str  # monospaced


def draw_run(run: RunPicture, path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(16, 10), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(run.title, fontsize=15)
    axes = figure.subplots(2, 3)
    _draw_image(axes[0, 0], run)
    _draw_depth(figure, axes[0, 1], run)
    _draw_path(axes[0, 2], run)
    _draw_cloud(axes[1, 0], run, 1, 'point cloud from above', f'y ({run.unit})')
    _draw_cloud(axes[1, 1], run, 2, 'point cloud from the side', f'z, up ({run.unit})')
    _draw_table(axes[1, 2], run)
    if run.warning:
        figure.supxlabel(run.warning, fontsize=15, color='white', backgroundcolor='#c00000')
    figure.savefig(path, format='png')


def _draw_image(axes: Any, run: RunPicture) -> None:
    axes.imshow(run.image)
    axes.set_title('an image that was sent')
    axes.set_axis_off()


def _draw_depth(figure: Figure, axes: Any, run: RunPicture) -> None:
    axes.set_title('the depth that came back for it')
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor('#bbbbbb')
    trusted = np.isfinite(run.depth)
    axes.set_xlabel(f'{trusted.mean():.0%} of the pixels are trusted (the others are grey)')
    if not trusted.any():
        return
    low, high = np.percentile(run.depth[trusted], (1, 99))
    drawn = axes.imshow(np.ma.masked_invalid(run.depth), cmap='turbo_r', vmin=low, vmax=high)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label=f'depth along the optical axis ({run.unit})')


def _draw_path(axes: Any, run: RunPicture) -> None:
    if run.truth is not None:
        _draw_cameras(axes, run.truth, TRUTH_COLOUR, 'truth', width=5, alpha=0.35)
    _draw_cameras(axes, run.estimate, ESTIMATE_COLOUR, 'estimate', width=1.5, alpha=1)
    axes.set_title(f'camera path from above\n{run.path_note}', fontsize=11)
    axes.legend(loc='best')
    _finish(axes, f'x ({run.unit})', f'y ({run.unit})')
    axes.set_aspect('equal', adjustable='datalim')


def _draw_cameras(
    axes: Any, poses: Array, colour: str, label: str, width: float, alpha: float
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


def _draw_cloud(axes: Any, run: RunPicture, vertical: int, title: str, label: str) -> None:
    axes.set_title(f'{title} ({len(run.cloud)} points)')
    axes.set_facecolor('#f4f4f4')
    _finish(axes, f'x ({run.unit})', label)
    axes.set_aspect('equal', adjustable='datalim')
    if len(run.cloud) == 0:
        return
    shown = inlier_mask(run.cloud)
    # Far points first, so that what is nearest to the viewer lies on top.
    order = np.argsort(run.cloud[shown, 2] if vertical == 1 else -run.cloud[shown, 1])
    points, colours = run.cloud[shown][order], run.cloud_colours[shown][order]
    axes.scatter(points[:, 0], points[:, vertical], s=1.2, c=colours / 255, linewidths=0)
    axes.plot(
        run.estimate[:, 0, 3], run.estimate[:, vertical, 3], color=ESTIMATE_COLOUR, linewidth=1.5
    )


def _draw_table(axes: Any, run: RunPicture) -> None:
    axes.set_axis_off()
    axes.set_title('what was received')
    axes.text(0, 0.97, run.table, family='monospace', fontsize=7.5, va='top')


def _finish(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
