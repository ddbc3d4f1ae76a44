# SPDX-License-Identifier: Apache-2.0
"""
Coloured clouds as binary PLY, for MeshLab, CloudCompare, Open3D, trimesh and others.

The reader supports what this package writes: little-endian, vertices first, no list properties. Of
the readers on PyPI, trimesh is eight times slower and has no public access to properties other
than position and colour, and plyfile is under the GPL.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_VERTEX = np.dtype(
    [
        *((axis, '<f4') for axis in 'xyz'),
        *((colour, 'u1') for colour in ('red', 'green', 'blue')),
        ('confidence', '<f4'),
        ('frame', '<i4'),
    ]
)
_NAMES = {'<f4': 'float', '|u1': 'uchar', '<i4': 'int'}
_TYPES = {
    'char': 'i1', 'int8': 'i1', 'uchar': 'u1', 'uint8': 'u1',
    'short': '<i2', 'int16': '<i2', 'ushort': '<u2', 'uint16': '<u2',
    'int': '<i4', 'int32': '<i4', 'uint': '<u4', 'uint32': '<u4',
    'float': '<f4', 'float32': '<f4', 'double': '<f8', 'float64': '<f8',
}  # fmt: skip
_MAX_HEADER = 1 << 16  # bytes


def write_cloud(
    file: BinaryIO,
    xyz: npt.NDArray[np.float32],
    rgb: npt.NDArray[np.uint8],
    confidence: npt.NDArray[np.float32],
    frame: npt.NDArray[np.int32],
    comments: tuple[str, ...] = (),
) -> None:
    """
    Write a cloud of N points.

    :param xyz: (N, 3).
    :param rgb: (N, 3).
    :param confidence: (N,).
    :param frame: (N,), index of the first frame that saw the point.
    :param comments: lines of the header.
    """
    points = np.empty(len(xyz), _VERTEX)
    points['x'], points['y'], points['z'] = xyz.T
    points['red'], points['green'], points['blue'] = rgb.T
    points['confidence'], points['frame'] = confidence, frame
    properties = [f'property {_NAMES[_VERTEX[n].str]} {n}' for n in _VERTEX.names or ()]
    header = [
        'ply',
        'format binary_little_endian 1.0',
        *(f'comment {line}' for line in comments),
        f'element vertex {len(points)}',
        *properties,
        'end_header\n',
    ]
    file.write('\n'.join(header).encode('ascii', 'replace'))
    file.write(points.tobytes())


def read_ply_vertices(path: Path, required: Sequence[str]) -> npt.NDArray[Any]:
    """
    Read the vertices of a PLY file.

    :param required: properties that must be present.
    :returns: (N,), a field for each property.
    :raises ValueError: if the file cannot be read, is of another kind of PLY, or is truncated.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror})') from error
    end = data.find(b'end_header\n', 0, _MAX_HEADER)
    lines = data[:end].decode('ascii', 'replace').splitlines() if end >= 0 else []
    if lines[:2] != ['ply', 'format binary_little_endian 1.0']:
        raise ValueError(f'{path} is not a binary little-endian PLY file')
    count, dtype = _parse_header(path, lines)
    start = end + len(b'end_header\n')
    if not set(required) <= set(dtype.names or ()):
        raise ValueError(
            f'the vertices of {path} have {dtype.names}, expected also {tuple(required)}'
        )
    if len(data) - start < count * dtype.itemsize:
        raise ValueError(
            f'{path} has {len(data) - start} bytes of points, expected '
            f'{count * dtype.itemsize}: it is truncated'
        )
    return np.frombuffer(data, dtype, count, start)


def _parse_header(path: Path, lines: list[str]) -> tuple[int, np.dtype[Any]]:
    """Return the number and the dtype of the vertices."""
    starts = [i for i, line in enumerate(lines) if line.startswith('element')] + [len(lines)]
    element = lines[starts[0]].split() if len(starts) > 1 else []
    if len(element) != 3 or element[1] != 'vertex' or not element[2].isdigit():
        raise ValueError(f'the first element of {path} is not a vertex')
    properties = [
        line.split()[1:] for line in lines[starts[0] : starts[1]] if line.startswith('property')
    ]
    if any(len(words) != 2 or words[0] not in _TYPES for words in properties):
        raise ValueError(f'the vertices of {path} have {properties}, expected named numbers')
    return int(element[2]), np.dtype([(name, _TYPES[kind]) for kind, name in properties])
