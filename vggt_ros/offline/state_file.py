# SPDX-License-Identifier: Apache-2.0
"""
Nested state as a safetensors file: arrays are its tensors, everything else is JSON beside them.

A state consists of dictionaries with string keys, lists, strings, numbers, booleans, None and
numpy arrays of booleans, integers or floats. A file cannot make anything else, nor an array larger
than itself. NaN and infinities are kept in arrays and as numbers (`NaN` and `Infinity` in the
JSON); where they are allowed is for the owner of the state to check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vggt_ros.offline.folder_files import read_file, write_file

_TREE = 'state'  # key of the JSON in the file's metadata
_TENSOR = '$tensor'  # {"$tensor": name} refers to an array
_MAX_HEADER = 1 << 25  # bytes; parsed, it takes about fifty times the memory
_KINDS = 'biuf'  # of dtypes: boolean, signed, unsigned, float

Tensors = dict[str, npt.NDArray[Any]]


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """
    Write a state atomically.

    :param name: of the file, relative to the folder.
    :raises TypeError: if it contains something else than the types above.
    """
    write_file(folder, name, encode_state(state))


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """
    Read a state back; arrays are writable copies.

    :raises ValueError: if the file is anything else; the message names it.
    :raises FileNotFoundError: if there is none.
    """
    data = read_file(folder, name)
    try:
        return decode_state(data)
    except ValueError as error:
        raise ValueError(f'{folder / name} cannot be read: {error}') from error


def encode_state(state: Mapping[str, Any]) -> bytes:
    """Encode a state; see `write_state`."""
    tensors: Tensors = {}
    tree = {key: _detach(value, key, tensors) for key, value in state.items()}
    data: bytes = save(tensors, metadata={_TREE: json.dumps(tree)})
    if _header_length(data) > _MAX_HEADER:
        raise ValueError(f'the state needs a header of more than {_MAX_HEADER} bytes')
    return data


def decode_state(data: bytes) -> dict[str, Any]:
    """
    Decode a state.

    :raises ValueError: if the data are anything else.
    """
    length = _header_length(data)
    if length > _MAX_HEADER:
        raise ValueError(f'its header has {length} bytes; expected at most {_MAX_HEADER}')
    try:
        tensors: Tensors = load(data)  # compares shapes and offsets with the length of the data
        header = json.loads(data[8 : 8 + length])
        tree = json.loads(header['__metadata__'][_TREE])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'it is no safetensors file with a state ({error})') from error
    except RecursionError as error:
        raise ValueError('its JSON is nested too deeply') from error
    if not isinstance(tree, dict):
        raise ValueError(f'its state is a {type(tree).__name__}; expected an object')
    try:
        state = {key: _attach(value, tensors) for key, value in tree.items()}
    except RecursionError as error:
        raise ValueError('its JSON is nested too deeply') from error
    if tensors:
        raise ValueError(f'its state does not refer to the tensor {next(iter(tensors))!r}')
    return state


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], 'little')


def _detach(value: Any, path: str, tensors: Tensors) -> Any:
    """Replace arrays by references."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _KINDS or path in tensors:
            raise TypeError(f'{path} is an array of {value.dtype}; expected numbers, and one name')
        tensors[path] = np.array(value, order='C')
        return {_TENSOR: path}
    if isinstance(value, dict):
        if _TENSOR in value or not all(isinstance(key, str) for key in value):
            raise TypeError(f'{path} has the keys {list(value)}; expected other strings')
        return {key: _detach(each, f'{path}/{key}', tensors) for key, each in value.items()}
    if isinstance(value, list):
        return [_detach(each, f'{path}/{i}', tensors) for i, each in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f'{path} is a {type(value).__name__}, which a state cannot contain')


def _attach(value: Any, tensors: Tensors) -> Any:
    """Replace references by arrays, each once."""
    if isinstance(value, list):
        return [_attach(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR not in value:
        return {key: _attach(each, tensors) for key, each in value.items()}
    name = value[_TENSOR]
    array = tensors.pop(name, None) if isinstance(name, str) and len(value) == 1 else None
    if array is None or array.dtype.kind not in _KINDS:
        raise ValueError(f'its state refers to {name!r}; expected each tensor once')
    return np.array(array)
