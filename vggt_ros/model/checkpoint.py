# SPDX-License-Identifier: Apache-2.0
"""Loads trained weights from a file or the Hugging Face hub into a network, all or nothing.

Reads `.safetensors` and `.pt` (without executing code from it), flat or nested in a training
checkpoint. The whole file is checked before the first weight is copied, so a rejected checkpoint
leaves the network unchanged. Loading is strict: no missing, unexpected or misshapen keys.
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
MAX_LISTED = 10  # keys of each kind that an error message names


class CheckpointError(Exception):
    """A checkpoint that cannot be found, read or used; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """Summary of a loaded checkpoint, for the log and the diagnostics."""

    path: Path
    tensors: int
    parameters: int


def build_vggt(
    config: VGGTConfig, checkpoint: str | Path, device: torch.device | str = 'cpu'
) -> VGGT:
    """Build a network with trained weights, without initialising random ones first.

    :raises CheckpointError: see `load_checkpoint`.
    """
    with torch.device('meta'):
        model = VGGT(config)
    path = resolve_checkpoint(checkpoint)  # fails before gigabytes are allocated
    model.to_empty(device=device)
    load_checkpoint(model, path)
    model.eval()
    return model


def load_checkpoint(model: VGGT, checkpoint: str | Path) -> LoadedCheckpoint:
    """Copy trained weights into `model`, keeping the device and dtype of its parameters.

    :param checkpoint: a `.safetensors` or `.pt` file with the official key names, or the
        'owner/name' of a repository on the Hugging Face hub (if no such path exists).
    :raises CheckpointError: if the file is unreadable, or a key is missing, unexpected, of another
        shape or not finite.
    """
    path = resolve_checkpoint(checkpoint)
    tensors = _read(path)
    targets = model.state_dict()
    if any(target.is_meta for target in targets.values()):
        raise ValueError('model is on the meta device; expected allocated weights, see build_vggt')
    _verify(path, tensors, targets)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    return LoadedCheckpoint(path, len(targets), sum(t.numel() for t in targets.values()))


def resolve_checkpoint(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint, downloading it first if it is a hub repository.

    :raises CheckpointError: if there is no such file.
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
            f'{repository} is not a local file, and downloading it needs huggingface_hub, which '
            'is not installed'
        ) from error
    name = HUB_FILES.get(repository, HUB_DEFAULT_FILE)
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # its own classes and those of its HTTP client
        raise CheckpointError(
            f'{repository} is not a local file, and {name} could not be downloaded from the hub: '
            f'{_first_line(error)}'
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """Return tensors by key, memory-mapped where the format allows it."""
    try:
        if path.suffix.lower() == '.safetensors':
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
            content = torch.load(
                path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # on a corrupt file the parsers raise nearly anything
        raise CheckpointError(
            f'{path} is corrupt or not a checkpoint: {_first_line(error)}'
        ) from error
    if isinstance(content, dict) and isinstance(content.get('model'), dict):
        content = content['model']
    if not isinstance(content, dict):
        raise CheckpointError(
            f'{path} contains a {type(content).__name__}; expected a dictionary of tensors'
        )
    invalid = [
        str(key)
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if invalid:
        raise CheckpointError(f'{path} has entries that are not named tensors: {_listed(invalid)}')
    return content


def _verify(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """
    Compare a checkpoint with the parameters of the network.

    :raises CheckpointError: unless keys, shapes and dtypes match and all values are finite.
    """
    missing = [key for key in targets if key not in tensors]
    unexpected = [key for key in tensors if key not in targets]
    misshapen = [
        f'{key} {tuple(tensors[key].shape)} instead of {tuple(target.shape)}'
        for key, target in targets.items()
        if key in tensors and tensors[key].shape != target.shape
    ]
    mismatches = [
        f'{len(keys)} {kind} ({_listed(keys)})'
        for kind, keys in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('misshapen', misshapen),
        )
        if keys
    ]
    if mismatches:
        raise CheckpointError(f'{path} does not match this network: {"; ".join(mismatches)}')
    not_float = [f'{k} {t.dtype}' for k, t in tensors.items() if not t.is_floating_point()]
    if not_float:
        raise CheckpointError(f'{path} has {_listed(not_float)}; expected floating point')
    not_finite = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not_finite:
        raise CheckpointError(f'{path} has NaN or infinity in {_listed(not_finite)}')


def _listed(keys: Sequence[str]) -> str:
    more = f' and {len(keys) - MAX_LISTED} more' if len(keys) > MAX_LISTED else ''
    return ', '.join(keys[:MAX_LISTED]) + more


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip('.: ') if lines else type(error).__name__
