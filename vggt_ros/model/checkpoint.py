# SPDX-License-Identifier: Apache-2.0
"""Trained weights from a file or from the Hugging Face hub into a network, all or nothing.

Reads `.safetensors` and `.pt` (never running code from it), flat or as a training checkpoint
wraps them. The whole file is checked before the first weight is copied, so a refused checkpoint
leaves the network as it was. Does not guess: each key must be there, in shape, and no other.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vggt_ros.model.config import VGGTConfig
from vggt_ros.model.vggt import VGGT

TORCH_SUFFIXES = ('.pt', '.pth', '.ckpt', '.bin')
SUFFIXES = ('.safetensors', *TORCH_SUFFIXES)
HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
HUB_FILES = {
    'facebook/VGGT-1B-Commercial': 'vggt_1B_commercial.pt',
    'facebook/VGGT_tracker_fixed': 'model_tracker_fixed_e20.pt',
}
HUB_DEFAULT_FILE = 'model.safetensors'
LISTED = 10  # keys of each kind that an error names


class CheckpointError(Exception):
    """A checkpoint that cannot be had, read or used; one sentence says why."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What was loaded, for the log and the diagnostics."""

    path: Path
    tensors: int
    parameters: int


def build_vggt(
    config: VGGTConfig, checkpoint: str | Path, device: torch.device | str = 'cpu'
) -> VGGT:
    """A network with trained weights, without first drawing random ones.

    :raises CheckpointError: see `load_checkpoint`.
    """
    with torch.device('meta'):
        model = VGGT(config)
    path = resolve(checkpoint)  # before a gigabyte is allocated for a file that is not there
    model.to_empty(device=device)
    load_checkpoint(model, path)
    model.eval()
    return model


def load_checkpoint(model: VGGT, checkpoint: str | Path) -> LoadedCheckpoint:
    """Copy trained weights into `model`, where its parameters are and in their types.

    :param checkpoint: a `.safetensors` or `.pt` file with the official key names, or the
        'owner/name' of a repository on the Hugging Face hub (if no such path exists).
    :raises CheckpointError: if anything is missing, surplus, misshapen, not finite or unreadable.
    """
    path = resolve(checkpoint)
    tensors = _read(path)
    targets = model.state_dict()
    if any(target.is_meta for target in targets.values()):
        raise ValueError('model is on the meta device; expected one with memory, see build_vggt')
    _verify(path, tensors, targets)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    return LoadedCheckpoint(path, len(targets), sum(t.numel() for t in targets.values()))


def resolve(checkpoint: str | Path) -> Path:
    """The file that `checkpoint` means, downloaded first if it is a hub repository.

    :raises CheckpointError: if there is none.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        raise CheckpointError(f'{path} is a directory; expected one of its files')
    if path.suffix.lower() not in SUFFIXES:
        if not path.exists() and HUB_ID.fullmatch(str(checkpoint)):
            return _download(str(checkpoint))
        raise CheckpointError(
            f'{checkpoint} is neither a file ending in {", ".join(SUFFIXES)} '
            "nor an 'owner/name' on the Hugging Face hub"
        )
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty')
    return path


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f'{repository} is no local file, and huggingface_hub is not installed to fetch it'
        ) from error
    name = HUB_FILES.get(repository, HUB_DEFAULT_FILE)
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # its own classes and those of whichever HTTP client it uses
        raise CheckpointError(
            f'{repository} is no local file, and {name} could not be fetched from the hub: '
            f'{_first_line(error)}'
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by key, mapped from the file rather than read where the format allows it."""
    try:
        if path.suffix.lower() == '.safetensors':
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            # Files of before torch 1.6 are no zip archives and cannot be mapped.
            content = torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a damaged file makes the parsers raise nearly anything
        raise CheckpointError(
            f'{path} is damaged or no checkpoint: {_first_line(error)}'
        ) from error
    if isinstance(content, dict) and isinstance(content.get('model'), dict):
        content = content['model']
    if not isinstance(content, dict):
        raise CheckpointError(
            f'{path} holds a {type(content).__name__}; expected tensors by their names'
        )
    foreign = [
        str(key)
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if foreign:
        raise CheckpointError(f'{path} holds {_listed(foreign)} that are no named tensors')
    return content


def _verify(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """
    Compare a checkpoint with what it is to fill.

    :raises CheckpointError: unless every target can be filled and nothing is left over.
    """
    missing = [key for key in targets if key not in tensors]
    surplus = [key for key in tensors if key not in targets]
    misshapen = [
        f'{key} {tuple(tensors[key].shape)} instead of {tuple(target.shape)}'
        for key, target in targets.items()
        if key in tensors and tensors[key].shape != target.shape
    ]
    faults = [
        f'{len(keys)} {kind} ({_listed(keys)})'
        for kind, keys in (('missing', missing), ('surplus', surplus), ('misshapen', misshapen))
        if keys
    ]
    if faults:
        raise CheckpointError(f'{path} does not fit this network: {"; ".join(faults)}')
    typed = [f'{k} {t.dtype}' for k, t in tensors.items() if not t.is_floating_point()]
    if typed:
        raise CheckpointError(f'{path} holds {_listed(typed)}; expected floating point')
    broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise CheckpointError(f'{path} holds NaN or infinity in {_listed(broken)}')


def _listed(keys: Sequence[str]) -> str:
    more = f' and {len(keys) - LISTED} more' if len(keys) > LISTED else ''
    return ', '.join(keys[:LISTED]) + more


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip('.: ') if lines else type(error).__name__
