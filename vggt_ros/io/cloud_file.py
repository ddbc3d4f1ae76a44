# SPDX-License-Identifier: Apache-2.0
"""Coloured clouds as binary PLY, which MeshLab, CloudCompare, Open3D and trimesh read."""

from __future__ import annotations

from pathlib import Path

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
    path: Path,
    xyz: npt.NDArray[np.float32],
    rgb: npt.NDArray[np.uint8],
    confidence: npt.NDArray[np.float32],
    frame: npt.NDArray[np.int32],
    comments: tuple[str, ...] = (),
) -> None:
    """
    Write a cloud.

    :param xyz: (N, 3); `rgb` (N, 3); `confidence` (N,); `frame` (N,), who saw it first.
    :param comments: lines for people.
    """
    points = np.empty(len(xyz), _VERTEX)
    points['x'], points['y'], points['z'] = xyz.T
    points['red'], points['green'], points['blue'] = rgb.T
    points['confidence'], points['frame'] = confidence, frame
    kinds = [f'property {_NAMES[_VERTEX[n].str]} {n}' for n in _VERTEX.names or ()]
    header = [
        'ply',
        'format binary_little_endian 1.0',
        *(f'comment {line}' for line in comments),
        f'element vertex {len(points)}',
        *kinds,
        'end_header\n',
    ]
    with path.open('wb') as file:
        file.write('\n'.join(header).encode('ascii', 'replace'))
        file.write(points.tobytes())
