# SPDX-License-Identifier: Apache-2.0
"""Coloured clouds as binary PLY, for MeshLab, CloudCompare, Open3D, trimesh and others."""

from __future__ import annotations

from typing import BinaryIO

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
