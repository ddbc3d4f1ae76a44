# SPDX-License-Identifier: Apache-2.0
"""
The vertices of a PLY file, with all their properties.

Of the readers on PyPI, trimesh gives properties other than position and colour only as an
underscored dictionary, and plyfile is under the GPL. Read is what this package writes: binary,
little-endian, vertices first, no lists among their properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TYPES = {
    'char': 'i1', 'int8': 'i1', 'uchar': 'u1', 'uint8': 'u1',
    'short': '<i2', 'int16': '<i2', 'ushort': '<u2', 'uint16': '<u2',
    'int': '<i4', 'int32': '<i4', 'uint': '<u4', 'uint32': '<u4',
    'float': '<f4', 'float32': '<f4', 'double': '<f8', 'float64': '<f8',
}  # fmt: skip
_LONGEST_HEADER = 1 << 16  # bytes


def read_vertices(path: Path, needed: Sequence[str]) -> npt.NDArray[Any]:
    """
    Read the vertices.

    :param needed: properties that must be there.
    :returns: (N,), a field for each property.
    :raises ValueError: if the file cannot be read, is another kind of PLY, or is cut off.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror})') from error
    end = data.find(b'end_header\n', 0, _LONGEST_HEADER)
    lines = data[:end].decode('ascii', 'replace').splitlines() if end >= 0 else []
    if lines[:2] != ['ply', 'format binary_little_endian 1.0']:
        raise ValueError(f'{path} is not a binary little-endian PLY file')
    count, layout = _layout(path, lines)
    start = end + len(b'end_header\n')
    if not set(needed) <= set(layout.names or ()):
        raise ValueError(
            f'the vertices of {path} have {layout.names}, expected also {tuple(needed)}'
        )
    if len(data) - start < count * layout.itemsize:
        raise ValueError(
            f'{path} has {len(data) - start} bytes of points, expected '
            f'{count * layout.itemsize}: it is cut off'
        )
    return np.frombuffer(data, layout, count, start)


def _layout(path: Path, lines: list[str]) -> tuple[int, np.dtype[Any]]:
    """Read the number of vertices and what each consists of from the lines of the header."""
    starts = [i for i, line in enumerate(lines) if line.startswith('element')] + [len(lines)]
    words = lines[starts[0]].split() if len(starts) > 1 else []
    if len(words) != 3 or words[1] != 'vertex' or not words[2].isdigit():
        raise ValueError(f'{path} does not begin with vertices')
    properties = [
        line.split()[1:] for line in lines[starts[0] : starts[1]] if line.startswith('property')
    ]
    if any(len(one) != 2 or one[0] not in _TYPES for one in properties):
        raise ValueError(f'the vertices of {path} have {properties}, expected numbers with names')
    return int(words[2]), np.dtype([(name, _TYPES[kind]) for kind, name in properties])
