# SPDX-License-Identifier: Apache-2.0
"""The pinhole camera: VGGT's pose encoding, unprojection of depth, projection of points.

Optical axes as in OpenCV and REP-103: x right, y down, z forward. The network predicts
world-to-camera transforms, `camera_from_world`; poses that the package publishes are
camera-to-world. As in VGGT, pixel centres are at integer coordinates and the principal point of an
encoded camera is at (W / 2, H / 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vggt_ros.geometry.rotation import matrix_from_quaternion, quaternion_from_matrix

POSE_ENCODING_SIZE = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view


def decode_pose(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """
    Convert pose encodings to extrinsics and intrinsics.

    :param encoding: (..., 9): translation of `camera_from_world`, quaternion xyzw of any norm,
        vertical then horizontal field of view in radians.
    :param height: rows of the image that the intrinsics are for, pixels.
    :param width: columns, pixels.
    :returns: `camera_from_world` (..., 3, 4) and intrinsics (..., 3, 3) in pixels. A field of
        view of 0 gives an infinite focal length.
    """
    rotation = matrix_from_quaternion(encoding[..., 3:7])
    camera_from_world = torch.cat((rotation, encoding[..., :3].unsqueeze(-1)), -1)
    intrinsics = encoding.new_zeros(*encoding.shape[:-1], 3, 3)
    intrinsics[..., 0, 0] = (width / 2) / torch.tan(encoding[..., 8] / 2)
    intrinsics[..., 1, 1] = (height / 2) / torch.tan(encoding[..., 7] / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return camera_from_world, intrinsics


def encode_pose(camera_from_world: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """
    Convert extrinsics and intrinsics to pose encodings; the inverse of `decode_pose`.

    :param camera_from_world: (..., 3, 4) or (..., 4, 4).
    :param intrinsics: (..., 3, 3), pixels; the principal point is not encoded.
    :returns: (..., 9), float32, with w >= 0 in the quaternion.
    """
    fov_h = 2 * torch.atan((height / 2) / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan((width / 2) / intrinsics[..., 0, 0])
    parts = (
        camera_from_world[..., :3, 3],
        quaternion_from_matrix(camera_from_world[..., :3, :3]),
        torch.stack((fov_h, fov_w), -1),
    )
    return torch.cat(parts, -1).float()


def invert_rigid(transform: Tensor) -> Tensor:
    """
    Invert rigid transforms in closed form.

    :param transform: (..., 3, 4) or (..., 4, 4), rotation and translation.
    :returns: (..., 4, 4).
    """
    rotation = transform[..., :3, :3].transpose(-1, -2)
    inverse = transform.new_zeros(*transform.shape[:-2], 4, 4)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -rotation @ transform[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """
    Convert depth along the optical axis to points in the camera frame.

    :param depth: (..., H, W), any unit; NaN stays NaN.
    :param intrinsics: (..., 3, 3), pixels, without skew.
    :returns: (..., H, W, 3), in the unit and dtype of the depth.
    """
    height, width = depth.shape[-2:]
    u = torch.arange(width, dtype=depth.dtype, device=depth.device)
    v = torch.arange(height, dtype=depth.dtype, device=depth.device).unsqueeze(-1)
    fx, fy, cx, cy = (
        intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))
    )
    return torch.stack(((u - cx) * depth / fx, (v - cy) * depth / fy, depth), -1).to(depth.dtype)


def transform_points(to_from: Tensor, points: Tensor) -> Tensor:
    """
    Apply rigid transforms to points.

    :param to_from: (..., 3, 4) or (..., 4, 4).
    :param points: (..., N, 3).
    :returns: (..., N, 3).
    """
    rotation, translation = to_from[..., :3, :3], to_from[..., :3, 3]
    return points @ rotation.transpose(-1, -2) + translation.unsqueeze(-2)


def project(
    points: Tensor, camera_from_world: Tensor, intrinsics: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Project world points into cameras.

    :param points: (..., N, 3).
    :param camera_from_world: (..., 3, 4).
    :param intrinsics: (..., 3, 3).
    :returns: pixels (..., N, 2), order x, y, and the points in the camera frame (..., N, 3).
        Pixels of points at depth 0 are infinite, and 0 at the camera centre.
    """
    in_camera = transform_points(camera_from_world, points)
    homogeneous = in_camera @ intrinsics.transpose(-1, -2)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    return torch.nan_to_num(pixels, nan=0.0, posinf=torch.inf, neginf=-torch.inf), in_camera
