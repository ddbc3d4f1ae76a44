# SPDX-License-Identifier: Apache-2.0
"""The training and validation curves of a run, as a plot."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Columns of curve.csv and their titles.
_SHOWN = {
    'matching_first': 'attention on the matching patch of the first frame',
    'flow': 'displacement read from a token (patches)',
    'camera_rotation': 'rotation (L1 of the quaternion)',
    'camera_translation': 'translation (L1, scene sizes)',
    'camera_field_of_view': 'field of view (L1, rad)',
    'depth_error': 'depth (L1, scene sizes)',
}


def plot_curve(curve: Path, output: Path) -> None:
    """
    Plot each column, for training and for validation with the averaged weights.

    :param curve: `curve.csv` of `train`.
    :param output: PNG to write.
    """
    with curve.open(newline='') as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(15, 7), dpi=80, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, _SHOWN.items(), strict=True):
        for kind, colour in (('train', '#999999'), ('validation', '#d62728')):
            points = [
                (float(row['windows']) / 1000, float(row[f'{kind}_{name}']))
                for row in rows
                if row.get(f'{kind}_{name}')
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=kind)
        axes.set(title=title, xlabel='thousand windows', ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(output, format='png')
