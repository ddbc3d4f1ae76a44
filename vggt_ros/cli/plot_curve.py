# SPDX-License-Identifier: Apache-2.0
"""
Draw what a training run told on its way.

    python -m vggt_ros.cli.plot_curve training_output/small/curve.csv --output curve.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Columns of the curve, each with what a person would call it.
SHOWN = {
    'matching_first': 'attention on the right patch of the first frame',
    'flow': 'displacement read from a token (patches)',
    'camera_rotation': 'rotation (L1 of the quaternion)',
    'camera_translation': 'translation (L1, scene sizes)',
    'camera_field_of_view': 'field of view (L1, rad)',
    'depth_error': 'depth (L1, scene sizes)',
}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw each column for training and, of the averaged weights, for validation windows."""
    figure = Figure(figsize=(15, 7), dpi=80, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, SHOWN.items(), strict=True):
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
    figure.savefig(path, format='png')


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('curve', type=Path, help='curve.csv of a run')
    parser.add_argument('--output', type=Path, default=Path('curve.png'))
    asked = parser.parse_args()
    with asked.curve.open(newline='') as file:
        draw(list(csv.DictReader(file)), asked.output)


if __name__ == '__main__':
    main()
