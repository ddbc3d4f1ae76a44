# SPDX-License-Identifier: Apache-2.0
"""
Measure a network on synthetic windows that training never saw, beside simple baselines.

    python -m vggt_ros.cli.evaluate --synthetic --seed 1 --windows 200 --frames 8 --json out.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vggt_ros.evaluation.synthetic import as_table, evaluate_windows
from vggt_ros.inference import load_network
from vggt_ros.settings import ModelSettings
from vggt_ros.training.recipes import HEIGHT, QUERIES, WIDTH
from vggt_ros.training.samples import SyntheticSource


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--synthetic', action='store_true', required=True)
    parser.add_argument('--checkpoint', default=ModelSettings().checkpoint)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--seed', type=int, default=0, help='of the test windows')
    parser.add_argument('--windows', type=int, default=200)
    parser.add_argument('--frames', type=int, default=8)
    parser.add_argument('--json', type=Path, help='file for the figures')
    asked = parser.parse_args()
    network = load_network(ModelSettings(checkpoint=asked.checkpoint, device=asked.device))
    source = SyntheticSource('test', asked.seed, HEIGHT, WIDTH, QUERIES)
    figures = evaluate_windows(network, source, asked.windows, asked.frames)
    if not network.trained:
        print('the network is UNTRAINED: its column means nothing')
    print(as_table(figures))
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
