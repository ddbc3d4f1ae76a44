# SPDX-License-Identifier: Apache-2.0
"""
Time the network as the engine runs it against whole windows, in the same run.

    python -m vggt_ros.cli.benchmark --size vggt_1b --frames 4 --stride 1 --resolution 392x294

Weights are random (their values cost no time); see `vggt_ros/evaluation/speed.py` for the figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from vggt_ros.inference.memory import predict_peak
from vggt_ros.inference.network import choose_device, choose_precision
from vggt_ros.inference.warm_up import Load
from vggt_ros.lab.benchmarks.speed import benchmark_network, speed_table
from vggt_ros.lab.benchmarks.speed_plot import draw_speed
from vggt_ros.model import VGGT, VGGTConfig, cast_linear_weights
from vggt_ros.model.dpt_head import FRAMES_CHUNK_SIZE
from vggt_ros.settings import PATCH_SIZE

SIZES = {'small': VGGTConfig.small, 'vggt_1b': VGGTConfig.vggt_1b}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', choices=SIZES, default='small')
    parser.add_argument('--frames', type=int, nargs='+', default=[8], help='of a window')
    parser.add_argument('--stride', type=int, nargs='+', default=[1, 4], help='new frames')
    parser.add_argument(
        '--resolution', type=_resolution, nargs='+', default=[(84, 56)], metavar='WxH'
    )
    parser.add_argument('--windows', type=int, default=10, help='that are timed of each')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--precision', default='auto')
    parser.add_argument(
        '--compile', action='store_true', help='time the engine with compiled layers too'
    )
    parser.add_argument('--json', type=Path, help='file for all figures')
    parser.add_argument('--plot', type=Path, help='PNG of time and memory over frames')
    return parser.parse_args()


def _resolution(text: str) -> tuple[int, int]:
    sides = tuple(int(side) for side in text.split('x') if side.isdigit())
    if len(sides) != 2 or any(side < 1 or side % PATCH_SIZE for side in sides):
        raise argparse.ArgumentTypeError(
            f'found {text!r}, expected WIDTHxHEIGHT in multiples of {PATCH_SIZE}'
        )
    return sides


def main() -> None:
    """Measure every combination that is possible."""
    asked = parse()
    device = choose_device(asked.device)
    precision = choose_precision(asked.precision, device)
    torch.manual_seed(0)
    model = VGGT(SIZES[asked.size]()).eval().requires_grad_(False)
    if precision != torch.float32:
        cast_linear_weights(model, precision)
    model = model.to(device)
    found = []
    for width, height in asked.resolution:
        for frames in asked.frames:
            for stride in sorted({min(each, frames) for each in asked.stride}):
                load = Load(frames, stride, height, width)
                told = benchmark_network(model, load, asked.windows, asked.compile)
                found.append(
                    {
                        'size': asked.size,
                        'frames': frames,
                        'stride': stride,
                        'resolution': f'{width}x{height}',
                        'decoded': len(load.depth_frames),
                        'device': str(device),
                        'precision': str(precision).removeprefix('torch.'),
                        'predicted_memory_bytes': predict_peak(model, load, FRAMES_CHUNK_SIZE),
                        **told,
                    }
                )
                print(speed_table(found[-1:]).splitlines()[2], flush=True)
    print(speed_table(found))
    if asked.plot is not None:
        draw_speed(found, asked.plot)
    if asked.json is not None:
        about = {
            'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            'machine': f'{platform.machine()}, {torch.get_num_threads()} threads',
            'torch': torch.__version__,
        }
        told = {**about, 'results': found} if len(found) > 1 else {**about, **found[0]}
        asked.json.write_text(json.dumps(told, indent=1) + '\n')


if __name__ == '__main__':
    main()
