# SPDX-License-Identifier: Apache-2.0
"""
Measure what the settings that trade exactness for speed cost on synthetic windows.

    python -m vggt_ros.cli.approximations --windows 100
"""

from __future__ import annotations

import argparse

from vggt_ros.inference.load import EMBEDDED, load_network
from vggt_ros.lab.benchmarks.approximations import (
    EXACT,
    Variant,
    approximation_table,
    compare_variants,
    full_resolution,
    half_resolution,
    use_bfloat16_rope,
)
from vggt_ros.lab.training.dataset import SyntheticDataset
from vggt_ros.settings import PATCH_SIZE, ModelSettings


def main() -> None:
    """Compare them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default=EMBEDDED, help='checkpoint, as the node takes it')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--seed', type=int, default=1, help='of rooms and noise')
    parser.add_argument('--windows', type=int, default=100)
    parser.add_argument('--frames', type=int, default=8)
    parser.add_argument('--int8', action='store_true', help='also 8-bit weights; needs torchao')
    asked = parser.parse_args()

    def load(**settings: object) -> Variant:
        return full_resolution(load_settings(**settings))

    def load_settings(**settings: object):
        given = {'checkpoint': asked.model, 'device': asked.device, **settings}
        return load_network(ModelSettings(**given))

    plain = load_settings()
    width = plain.image_width
    # twice as many patches as half the size has
    height = max(round(0.75 * width / PATCH_SIZE / 2), 1) * 2 * PATCH_SIZE
    rounded = load_settings()
    use_bfloat16_rope(rounded, height, width)
    ways = {EXACT: full_resolution(plain)}
    ways |= {f'frame_only_blocks: {count}': load(frame_only_blocks=count) for count in (1, 2)}
    if asked.int8:
        ways |= {f'int8: {way}': load(int8=way) for way in ('weights', 'dynamic')}
    if width % (2 * PATCH_SIZE) == 0:
        ways['half the resolution'] = half_resolution(plain)
    ways['RoPE table in bfloat16'] = full_resolution(rounded)
    source = SyntheticDataset('test', asked.seed, height, width, 0)
    print(approximation_table(compare_variants(ways, source, asked.windows, asked.frames)))


if __name__ == '__main__':
    main()
