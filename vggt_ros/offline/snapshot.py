# SPDX-License-Identifier: Apache-2.0
"""
The state of an engine as a file, so that an interrupted reconstruction goes on.

It is a pickle that is read by an unpickler which makes nothing but this package's dataclasses,
arrays and containers: a file from elsewhere can be wrong, but it cannot run anything. What the
engine did not make itself (the network, the source of scale, modules) is not stored: the engine
that goes on has its own.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.typing as npt
import torch

from vggt_ros.engine import StreamingEngine
from vggt_ros.inference.network import Network
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.offline.atomic_write import atomic_writer

_SAFE = {
    ('collections', 'Counter'),
    ('collections', 'deque'),
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
    ('numpy._core.numeric', '_frombuffer'),
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'),
    ('numpy.core.numeric', '_frombuffer'),
}
_SAFE.add((__name__, '_make_tensor'))
_MODULES = ('gtsam',)


class SnapshotError(ValueError):
    """A file that is no state of an engine."""


def save_snapshot(
    path: Path, engine: StreamingEngine, place: int, network: Network, scale: ScaleSource | None
) -> None:
    """
    Write where a reconstruction is.

    :param place: of the newest picture that the engine took.
    """
    with atomic_writer(path) as file:
        _Pickler(file, network, scale).dump({'place': place, 'engine': engine.state_dict()})


def load_snapshot(
    path: Path, engine: StreamingEngine, network: Network, scale: ScaleSource | None
) -> int:
    """
    Put an engine where another one was.

    :returns: the place of the newest picture that it took.
    :raises SnapshotError: if the file is something else.
    """
    try:
        with path.open('rb') as file:
            stored = _Unpickler(file, network, scale).load()
        engine.load_state_dict(stored['engine'])
        return int(stored['place'])
    except (
        pickle.UnpicklingError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise SnapshotError(
            f'{path} does not say where the reconstruction was: {error}'
        ) from error


def _make_tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values)


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, network: Network, scale: ScaleSource | None) -> None:
        super().__init__(file, protocol=5)
        self._outside = {id(network): 'network'} | ({id(scale): 'scale'} if scale else {})

    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, ModuleType):
            return f'module {value.__name__}'
        return self._outside.get(id(value))

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):  # as an array, whose pickles are plain
            return _make_tensor, (value.numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, network: Network, scale: ScaleSource | None) -> None:
        super().__init__(file)
        self._outside: dict[str, Any] = {'network': network, 'scale': scale}

    def persistent_load(self, name: str) -> Any:
        kind, _, module = name.partition(' ')
        if kind == 'module' and module in _MODULES:
            return importlib.import_module(module)
        if name not in self._outside:
            raise pickle.UnpicklingError(f'it asks for {name!r}')
        return self._outside[name]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        if module.startswith('vggt_ros.'):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')
