# SPDX-License-Identifier: Apache-2.0
"""
The small trained network that comes with the package, `checkpoint: embedded`.

A folder of three files: weights in float16, `config.json` with the sizes of the network, and
`about.json` with what a person should know of the weights and the hash that they are checked by.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from vggt_ros.model import VGGT
from vggt_ros.model.checkpoint import CheckpointError

FOLDER = Path(__file__).parent / 'weights'
WEIGHTS, ABOUT = 'small.safetensors', 'about.json'
LARGEST = 16_000_000  # bytes of the weights


@dataclass(frozen=True)
class About:
    """What is known of the weights."""

    sha256: str  # of the file of weights
    image_width: int  # pixels of the images that it was trained on
    trained_on: str  # for the log
    training: str  # how they were made: commands, seeds, number of windows
    licence: str = 'Apache-2.0'


def find_embedded(folder: Path = FOLDER) -> tuple[Path, About]:
    """
    Return the file of weights, whole and unchanged, and what is known of them.

    :raises CheckpointError: if a file is missing or is not the one that was shipped.
    """
    path = folder / WEIGHTS
    try:
        about = About(**json.loads((folder / ABOUT).read_text()))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f'the embedded weights cannot be read: {error}') from error
    if found != about.sha256:
        raise CheckpointError(
            f'{path} has the SHA-256 {found}, expected {about.sha256}: it is damaged or was '
            'changed; install the package anew'
        )
    return path, about


def write_embedded(
    model: VGGT, image_width: int, trained_on: str, training: str, folder: Path = FOLDER
) -> About:
    """
    Make the folder from a trained network.

    :raises ValueError: if a weight does not fit into float16 or the file becomes too large.
    """
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(f'{broken} have values beyond float16')
    size = sum(2 * tensor.numel() for tensor in weights.values())
    if size > LARGEST:
        raise ValueError(f'the weights take {size} bytes, expected at most {LARGEST}')
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / 'config.json').write_text(json.dumps(model.config.to_dict(), indent=1) + '\n')
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    about = About(digest, image_width, trained_on, training)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1) + '\n')
    return about
