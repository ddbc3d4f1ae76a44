# SPDX-License-Identifier: Apache-2.0
"""State as plain data: dataclasses become dictionaries of JSON values and numpy arrays, and back.

Reading checks everything against the annotations of the dataclasses: fields, types, array dtypes,
and that numbers are finite; their `__post_init__` checks shapes and ranges. Only the dataclasses
named in these annotations are ever made. msgspec does the conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar, get_args

import numpy as np

T = TypeVar('T')
AnyArray = np.ndarray[Any, Any]

_ARRAY = 'array'  # key of a reference to an array, in a dictionary by itself
_MAX_INTEGER = 2**62  # the sum of two still fits into 64 bits


def to_state_dict(state: object) -> dict[str, Any]:
    """Convert a dataclass to nested dictionaries and lists of JSON values and arrays."""
    arrays: list[AnyArray] = []

    def encode(value: object) -> object:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {_ARRAY: len(arrays) - 1}
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f'{type(value).__name__} is not plain data')

    tree = _import_msgspec().to_builtins(state, enc_hook=encode, str_keys=True)
    state_dict: dict[str, Any] = _insert_arrays(tree, arrays)
    return state_dict


def from_state_dict(kind: type[T], state_dict: Mapping[str, Any]) -> T:
    """
    Convert the result of `to_state_dict` back.

    :param kind: the dataclass.
    :raises ValueError: naming what was found, where, and what was expected.
    """
    _check_numbers(state_dict, 'state')
    try:
        state: T = _import_msgspec().convert(
            dict(state_dict), kind, str_keys=True, dec_hook=_check_array
        )
    except ValueError as error:  # of which msgspec's errors are
        raise ValueError(f'not a state of this package: {error}') from error
    return state


def _insert_arrays(tree: Any, arrays: list[AnyArray]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_ARRAY}:
            return arrays[tree[_ARRAY]]
        return {key: _insert_arrays(value, arrays) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_insert_arrays(value, arrays) for value in tree]
    return tree


def _check_array(kind: Any, value: object) -> object:
    """Check an array against an annotation such as `NDArray[np.float64]`."""
    (dtype,) = get_args(get_args(kind)[1])
    if isinstance(value, np.ndarray) and not np.issubdtype(value.dtype, dtype):
        raise ValueError(f'array of {value.dtype}, expected {np.dtype(dtype)}')
    return value  # msgspec checks that it is an array


def _check_numbers(tree: object, name: str) -> None:
    """Check that all numbers are finite and all integers fit into 62 bits."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _check_numbers(value, f'{name}.{key}')
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            _check_numbers(value, f'{name}[{i}]')
    elif isinstance(tree, np.ndarray):
        if tree.dtype.kind == 'f' and not np.isfinite(tree).all():
            raise ValueError(f'{name} has values that are not finite')
    elif (isinstance(tree, float) and not np.isfinite(tree)) or (
        isinstance(tree, int) and abs(tree) > _MAX_INTEGER
    ):
        raise ValueError(f'{name} is {tree}, expected a finite number below 2^62')


def _import_msgspec() -> ModuleType:
    try:
        import msgspec
    except ImportError as error:
        raise ValueError('saving and loading state needs msgspec: pip install msgspec') from error
    module: ModuleType = msgspec
    return module
