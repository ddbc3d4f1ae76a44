# SPDX-License-Identifier: Apache-2.0
"""Synthetic windows as one picture, for a person who wants to know what is trained on."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_ros.geometry.rotation import rotation_angle
from vggt_ros.lab.synthetic.windows import SyntheticWindows


def draw_windows(windows: SyntheticWindows, path: Path) -> None:
    """Write a PNG: a row for each window, its frames with the points they share, and a depth."""
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
            seen = windows.visible[row, frame].cpu()
            points = windows.tracks[row, frame].cpu()[seen].numpy()
            chosen = [colours(int(index)) for index in seen.nonzero()[:, 0]]
            axis.scatter(
                points[:, 0], points[:, 1], s=14, c=chosen or None, edgecolors='white', lw=0.5
            )
        axes[0].set_title(_describe(windows, row), fontsize=8, loc='left')
        depth = windows.depth[row, 0].cpu().numpy()
        axes[-1].imshow(depth, cmap='turbo', vmin=0)
        axes[-1].set_title(f'depth {depth.min():.1f} to {depth.max():.1f} m', fontsize=8)
        for axis in axes:
            axis.set_xlim(-0.5, width - 0.5)
            axis.set_ylim(height - 0.5, -0.5)
            axis.set_axis_off()
    figure.savefig(path, format='png')


def _describe(windows: SyntheticWindows, row: int) -> str:
    poses = windows.world_from_camera[row].double().cpu()
    travel = float((poses[:, :3, 3] - poses[:1, :3, 3]).norm(dim=-1).max())
    turns = poses[:1, :3, :3].mT @ poses[:, :3, :3]
    turn = math.degrees(float(rotation_angle(turns).max()))
    focal = float(windows.intrinsics[row, 0, 0, 0])
    view = math.degrees(2 * math.atan(windows.images.shape[-1] / 2 / focal))
    return f'{travel:.2f} m, {turn:.0f}° of motion, {view:.0f}° of view'
