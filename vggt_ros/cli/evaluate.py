# SPDX-License-Identifier: Apache-2.0
"""
Measure a network on synthetic scenes that training never saw, beside simple baselines.

Windows, each by itself:

    python -m vggt_ros.cli.evaluate --synthetic --seed 1 --windows 200 --frames 8 --json out.json

A recording with truth (TUM RGB-D, 7-Scenes, EuRoC, a bag), as one map:

    python -m vggt_ros.cli.evaluate --recording rgbd_dataset_freiburg1_desk --output figures

A long way, as one map; `--model truth` measures everything but the network:

    python -m vggt_ros.cli.evaluate --sequence corridor --model truth --noise 1,0.3,1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import Network, VGGTNetwork
from vggt_ros.io.recordings import open_recording
from vggt_ros.lab.evaluation import recording, sequences, synthetic_windows
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, TruthNetwork
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.lab.training.recipes import QUERIES
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.settings import PATCH_SIZE, ModelSettings, Settings

_TRUTH = 'truth'


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scenes = parser.add_mutually_exclusive_group(required=True)
    scenes.add_argument('--synthetic', action='store_true', help='windows of random rooms')
    scenes.add_argument(
        '--sequence', choices=[*SEQUENCES, 'all'], help='a long way through one room'
    )
    scenes.add_argument('--recording', type=Path, help='folder or bag with truth')
    parser.add_argument(
        '--model',
        default=ModelSettings().checkpoint,
        help='checkpoint, as the node takes it; with --sequence also truth',
    )
    parser.add_argument('--device', default='auto')
    parser.add_argument('--seed', type=int, default=0, help='of rooms and noise')
    parser.add_argument('--windows', type=int, default=200, help='of --synthetic')
    parser.add_argument(
        '--width', type=int, default=0, help="of --synthetic images, pixels; 0: the network's own"
    )
    parser.add_argument(
        '--frames',
        type=int,
        help='of each window, 8 if not given; of the way, 500; of the recording, all',
    )
    parser.add_argument('--step', type=int, default=1, help='of --recording: every so many frames')
    parser.add_argument('--output', type=Path, help='of --recording: folder for paths and picture')
    parser.add_argument(
        '--noise',
        type=_errors,
        default=PredictionNoise(),
        metavar='DEPTH,TURN,SHIFT',
        help='of truth: per cent of depth, degrees, per cent of the extent of a window',
    )
    parser.add_argument(
        '--loop-closure', action='store_true', help='of --sequence and --recording; needs GTSAM'
    )
    parser.add_argument(
        '--anchor-windows', type=int, default=0, help='of --sequence and --recording'
    )
    parser.add_argument('--drop-window', type=int, help='of --sequence, counted from 0')
    parser.add_argument('--json', type=Path, help='file for the figures; of all, a list')
    asked = parser.parse_args()
    if asked.model == _TRUTH and not asked.sequence:
        parser.error('--model truth is for --sequence')
    if asked.model != _TRUTH and asked.noise != PredictionNoise():
        parser.error('--noise is for --model truth')
    return asked


def _errors(text: str) -> PredictionNoise:
    parts = [float(part) for part in text.split(',')]
    if len(parts) != 3 or min(parts) < 0:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected three numbers, 0 or more')
    return PredictionNoise(parts[0] / 100, math.radians(parts[1]), parts[2] / 100)


def judge_sequence(asked: argparse.Namespace, name: str, loaded: Network | None) -> dict[str, Any]:
    """Map a sequence and compare; without a network, with one that knows the truth."""
    frames = asked.frames or 500
    way = SEQUENCES[name](frames)
    truth = way.world_from_camera.numpy()
    told = {'sequence': name, 'frames': frames, 'seed': asked.seed}
    world = sequences.sequence_world(way)
    mapping = map_settings(asked)
    network = loaded or TruthNetwork(world, asked.noise, seed=asked.seed)
    height, width = image_size(network.image_width)
    if loaded is None:
        stamps = [i * sequences.FRAME_PERIOD_NS for i in range(frames)]
        images = np.stack([world.render_image(stamp, height, width) for stamp in stamps])
        updates = sequences.map_sequence(network, images, asked.drop_window, **mapping)
        found = sequences.evaluate_sequence(
            updates,
            truth,
            lambda i: world.depth(i * sequences.FRAME_PERIOD_NS, height, width),
            None,
        )
    else:
        images, depth = sequences.render_sequence(way, asked.seed, height, width)
        updates = sequences.map_sequence(network, images, asked.drop_window, **mapping)
        found = sequences.evaluate_sequence(updates, truth, lambda i: depth[i], images)
    return {**told, 'model': network.name, **found}


def map_settings(asked: argparse.Namespace) -> dict[str, Any]:
    """Gather the settings of the map, by their names."""
    return {'loop_closure': asked.loop_closure, 'anchor_windows': asked.anchor_windows}


def image_size(width: int) -> tuple[int, int]:
    """Return height and width of 4:3 images in whole patches."""
    return max(round(0.75 * width / PATCH_SIZE), 1) * PATCH_SIZE, width


def load(asked: argparse.Namespace) -> VGGTNetwork:
    """Load the network, and say so if its figures mean nothing."""
    network = load_network(ModelSettings(checkpoint=asked.model, device=asked.device))
    if not network.trained:
        print('the network is UNTRAINED: its figures mean nothing')
    return network


def main() -> None:
    """Evaluate."""
    asked = parse()
    figures: dict[str, Any] | list[dict[str, Any]]
    try:
        if asked.sequence:
            names = list(SEQUENCES) if asked.sequence == 'all' else [asked.sequence]
            network = None if asked.model == _TRUTH else load(asked)
            figures = [judge_sequence(asked, name, network) for name in names]
            print(sequences.sequence_table(figures))
            figures = figures if asked.sequence == 'all' else figures[0]
        elif asked.recording:
            way = recording.evaluate_recording(
                load(asked),
                open_recording(asked.recording),
                Settings.from_flat(map_settings(asked)),
                asked.step,
                asked.frames or 0,
            )
            figures = {'recording': way.name, **way.metrics}
            print(recording.recording_table(way))
            if asked.output:
                way.save(asked.output)
        else:
            judged = load(asked)
            size = image_size(asked.width or judged.image_width)
            source = SyntheticDataset('test', asked.seed, *size, QUERIES)
            figures = synthetic_windows.evaluate_windows(
                judged, source, asked.windows, asked.frames or 8
            )
            print(synthetic_windows.window_table(figures))
    except (ValueError, CheckpointError) as error:
        sys.exit(f'evaluate: {error}')
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
    main()
