# SPDX-License-Identifier: Apache-2.0
"""
Draw synthetic training windows to look at: frames with tracked points, and the first depth.

    python -m vggt_ros.cli.contact_sheet windows.png --windows 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vggt_ros.lab.evaluation.plots import draw_windows
from vggt_ros.lab.synthetic.windows import SPLITS, render_windows, window_seeds


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('picture', type=Path, help='the PNG to write')
    parser.add_argument('--windows', type=int, default=10)
    parser.add_argument('--frames', type=int, default=4)
    parser.add_argument('--split', choices=SPLITS, default='train')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--height', type=int, default=168)
    parser.add_argument('--width', type=int, default=224)
    asked = parser.parse_args()
    seeds = window_seeds(asked.split, asked.seed, 0, asked.windows)
    windows = render_windows(seeds, asked.frames, asked.height, asked.width, queries=12)
    draw_windows(windows, asked.picture)
    print(f'{asked.windows} windows drawn: {asked.picture}')


if __name__ == '__main__':
    main()
