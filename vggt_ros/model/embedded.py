# SPDX-License-Identifier: Apache-2.0
"""
The small trained network that is included in the package, `checkpoint: embedded`.

A folder of three files: weights in float16, `config.json` with the configuration of the network,
and `about.json` with the origin of the weights and their hash.
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
MAX_BYTES = 16_000_000  # of the weights


@dataclass(frozen=True)
class WeightsInfo:
    """Origin and hash of the weights."""

    sha256: str  # of the weights file
    image_width: int  # pixels of the training images
    trained_on: str  # for the log
    training: str  # commands, seeds, number of windows
    licence: str = 'Apache-2.0'


def find_embedded(folder: Path = FOLDER) -> tuple[Path, WeightsInfo]:
    """
    Return the path of the weights, after checking their hash, and their description.

    :raises CheckpointError: if a file is missing or differs from the released one.
    """
    path = folder / WEIGHTS
    try:
        about = WeightsInfo(**json.loads((folder / ABOUT).read_text()))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f'the embedded weights cannot be read: {error}') from error
    if found != about.sha256:
        raise CheckpointError(
            f'{path} has the SHA-256 {found}, expected {about.sha256}: it is corrupt or was '
            'modified; reinstall the package'
        )
    return path, about


def write_embedded(
    model: VGGT, image_width: int, trained_on: str, training: str, folder: Path = FOLDER
) -> WeightsInfo:
    """
    Write the folder from a trained network.

    :raises ValueError: if a weight exceeds the range of float16 or the file would be too large.
    """
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    overflows = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if overflows:
        raise ValueError(f'{overflows} have values outside the range of float16')
    size = sum(2 * tensor.numel() for tensor in weights.values())
    if size > MAX_BYTES:
        raise ValueError(f'the weights take {size} bytes, expected at most {MAX_BYTES}')
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / 'config.json').write_text(json.dumps(model.config.to_dict(), indent=1) + '\n')
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    about = WeightsInfo(digest, image_width, trained_on, training)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=1) + '\n')
    return about
