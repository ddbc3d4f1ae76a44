# SPDX-License-Identifier: Apache-2.0
"""Rotations as matrices and quaternions (x, y, z, w), batched and differentiable in torch.

Sign and choice of the candidate quaternion follow the VGGT pose encoding, so that encodings are
interchangeable.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Components below this are not used as divisors: another one is larger.
_MIN_DIVISOR = 0.1


def matrix_from_quaternion(quaternion: Tensor) -> Tensor:
    """
    Convert quaternions of any non-zero norm to rotation matrices.

    :param quaternion: (..., 4), order x, y, z, w.
    :returns: (..., 3, 3); NaN for a zero quaternion.
    """
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion * quaternion).sum(-1)
    rows = (
        (1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        (s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        (s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion_from_matrix(matrix: Tensor) -> Tensor:
    """
    Convert rotation matrices to unit quaternions with w >= 0.

    Any component can be the divisor; the largest is the best conditioned (Shepperd,
    "Quaternion from rotation matrix", 1978).

    :param matrix: (..., 3, 3).
    :returns: (..., 4), order x, y, z, w.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in matrix.unbind(-2))
    squares = torch.stack(
        (1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz), -1
    )
    doubled = squares.clamp(min=0).sqrt()  # twice the magnitude of x, y, z, w
    products = torch.stack(
        (
            torch.stack((squares[..., 0], xy + yx, xz + zx, zy - yz), -1),
            torch.stack((xy + yx, squares[..., 1], yz + zy, xz - zx), -1),
            torch.stack((xz + zx, yz + zy, squares[..., 2], yx - xy), -1),
            torch.stack((zy - yz, xz - zx, yx - xy, squares[..., 3]), -1),
        ),
        -2,
    )
    candidates = products / (2 * doubled.clamp(min=_MIN_DIVISOR)).unsqueeze(-1)
    best = doubled.argmax(-1, keepdim=True).unsqueeze(-1)
    quaternion = candidates.gather(-2, best.expand(*best.shape[:-1], 4)).squeeze(-2)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def nearest_rotation(matrix: Tensor) -> Tensor:
    """
    Project a matrix to the closest rotation in the Frobenius norm (Arun et al., 1987).

    :param matrix: (..., 3, 3), for example a sum of rotations.
    :returns: (..., 3, 3), determinant +1.
    """
    u, _, vh = torch.linalg.svd(matrix)
    flip = torch.ones_like(matrix[..., 0])
    flip[..., 2] = torch.linalg.det(u @ vh)
    rotation: Tensor = (u * flip.unsqueeze(-2)) @ vh
    return rotation


def rotation_angle(matrix: Tensor) -> Tensor:
    """
    Compute the angle of a rotation in radians, accurately near 0 and near pi.

    :param matrix: (..., 3, 3).
    :returns: (...), from 0 to pi.
    """
    quaternion = quaternion_from_matrix(matrix)
    return 2 * torch.atan2(quaternion[..., :3].norm(dim=-1), quaternion[..., 3])
