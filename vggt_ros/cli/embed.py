# SPDX-License-Identifier: Apache-2.0
"""
Make a trained network the one that comes with the package.

    python -m vggt_ros.cli.embed training_output/small/best.pt --image-width 112 \
        --training '1 million windows: make train-small'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vggt_ros.inference.load import load_model
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.model.embedded import FOLDER, write_embedded


def main() -> None:
    """Write the folder of weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', help='as the node takes it')
    parser.add_argument('--image-width', type=int, required=True, help='pixels, as trained')
    parser.add_argument('--trained-on', default='synthetic rooms only', help='for the log')
    parser.add_argument('--training', required=True, help='commands, seeds, windows')
    parser.add_argument('--folder', type=Path, default=FOLDER)
    asked = parser.parse_args()
    try:
        model = load_model(asked.checkpoint)
        about = write_embedded(
            model, asked.image_width, asked.trained_on, asked.training, asked.folder
        )
    except (CheckpointError, ValueError) as error:
        sys.exit(f'embed: {error}')
    print(f'{asked.folder}: {about}')


if __name__ == '__main__':
    main()
