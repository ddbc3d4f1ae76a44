# SPDX-License-Identifier: Apache-2.0
"""Laws of geometry, near the identity and far from it, in float32 and float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vggt_ros.geometry.camera import (
    decode_pose,
    encode_pose,
    invert_rigid,
    project,
    transform_points,
    unproject,
)
from vggt_ros.geometry.rotation import (
    matrix_from_quaternion,
    nearest_rotation,
    quaternion_from_matrix,
    rotation_angle,
)
from vggt_ros.geometry.sim3 import Sim3

FLOATS = [(torch.float32, 2e-6), (torch.float64, 1e-14)]
GOLDEN = Path(__file__).parents[2] / 'shared' / 'vggt' / 'golden_public' / 'geometry'


def random_quaternions(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Unit quaternions with w >= 0: random, near the identity, near 180 degrees."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, count, 4, generator=generator, dtype=torch.float64)
    q[1, :, :3] *= 1e-5
    q[2, :, 3] *= 1e-5
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., 3:] < 0, -q, q).to(dtype).reshape(-1, 4)


@pytest.mark.parametrize(('dtype', 'limit'), FLOATS)
def test_quaternions_round_trip_through_matrices(dtype: torch.dtype, limit: float) -> None:
    q = random_quaternions(200, dtype)
    back = quaternion_from_matrix(matrix_from_quaternion(q))
    # a rotation by 180 degrees has two quaternions of opposite sign
    error = torch.minimum((back - q).abs().amax(-1), (back + q).abs().amax(-1))
    assert error.max() < limit
    assert (back[:, 3] >= 0).all()


@pytest.mark.parametrize(('dtype', 'limit'), FLOATS)
def test_the_norm_of_a_quaternion_does_not_matter(dtype: torch.dtype, limit: float) -> None:
    q = random_quaternions(50, dtype)
    matrix = matrix_from_quaternion(7 * q)
    assert (matrix - matrix_from_quaternion(q)).abs().max() < limit
    unit = matrix @ matrix.transpose(-1, -2)
    assert (unit - torch.eye(3, dtype=dtype)).abs().max() < limit
    assert torch.linalg.det(matrix).sub(1).abs().max() < limit


def test_matrix_of_a_rotation_by_90_degrees_about_z() -> None:
    half = 0.5**0.5
    matrix = matrix_from_quaternion(torch.tensor([0.0, 0, half, half]))
    expected = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=0)


def test_angle_is_accurate_near_0_and_near_180_degrees() -> None:
    angles = torch.tensor([0.0, 1e-9, 1e-4, 1.0, 3.1415, torch.pi], dtype=torch.float64)
    q = torch.stack([torch.sin(angles / 2), 0 * angles, 0 * angles, torch.cos(angles / 2)], -1)
    torch.testing.assert_close(rotation_angle(matrix_from_quaternion(q)), angles)


def test_nearest_rotation_keeps_rotations_and_corrects_reflections() -> None:
    rotation = matrix_from_quaternion(random_quaternions(20, torch.float64))
    torch.testing.assert_close(nearest_rotation(rotation), rotation, atol=1e-12, rtol=0)
    corrected = nearest_rotation(rotation @ torch.diag(torch.tensor([1.0, 1, -0.1]).double()))
    torch.testing.assert_close(torch.linalg.det(corrected), torch.ones(60).double())


@pytest.mark.parametrize(('dtype', 'limit'), FLOATS)
def test_rigid_transform_and_inverse_give_the_identity(dtype: torch.dtype, limit: float) -> None:
    pose = torch.eye(4, dtype=dtype).repeat(60, 1, 1)
    pose[:, :3, :3] = matrix_from_quaternion(random_quaternions(20, dtype))
    pose[:, :3, 3] = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    for transform in (pose, pose[:, :3]):
        product = invert_rigid(transform) @ pose
        assert (product - torch.eye(4, dtype=dtype)).abs().max() < 10 * limit


def test_cameras_round_trip_through_pose_encodings() -> None:
    rotation = matrix_from_quaternion(random_quaternions(10, torch.float64))
    camera = torch.cat([rotation, torch.ones(30, 3, 1).double()], -1)
    intrinsics = torch.tensor([[300.0, 0, 112], [0, 280, 84], [0, 0, 1]]).double().repeat(30, 1, 1)
    decoded, k = decode_pose(encode_pose(camera, intrinsics, 168, 224).double(), 168, 224)
    torch.testing.assert_close(decoded, camera, atol=1e-6, rtol=0)
    torch.testing.assert_close(k, intrinsics, atol=1e-4, rtol=0)


def test_unprojected_pixels_project_to_themselves() -> None:
    depth = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(2)).double() + 1
    intrinsics = torch.tensor([[20.0, 0, 8], [0, 21, 6], [0, 0, 1]]).double()
    camera_from_world = invert_rigid(_some_pose())[:3]
    in_camera = unproject(depth, intrinsics).reshape(2, -1, 3)
    world = transform_points(invert_rigid(camera_from_world), in_camera)
    pixels, back = project(world, camera_from_world, intrinsics)
    v, u = torch.meshgrid(torch.arange(12), torch.arange(16), indexing='ij')
    expected = torch.stack([u, v], -1).reshape(1, -1, 2).double().expand(2, -1, -1)
    torch.testing.assert_close(pixels, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(back, in_camera)


def _some_pose() -> torch.Tensor:
    pose = torch.eye(4).double()
    pose[:3, :3] = matrix_from_quaternion(torch.tensor([0.1, -0.2, 0.3, 0.9]).double())
    pose[:3, 3] = torch.tensor([0.5, -1.0, 2.0])
    return pose


def random_sim3(seed: int) -> Sim3:
    random = np.random.default_rng(seed)
    q = torch.from_numpy(random.normal(size=4))
    return Sim3(
        float(np.exp(random.normal())), matrix_from_quaternion(q).numpy(), random.normal(size=3)
    )


def test_similarities_form_a_group_that_acts_on_points() -> None:
    a, b, c = (random_sim3(seed) for seed in range(3))
    points = np.random.default_rng(3).normal(size=(5, 3))
    np.testing.assert_allclose((a @ b).apply(points), a.apply(b.apply(points)))
    np.testing.assert_allclose(((a @ b) @ c).matrix(), (a @ (b @ c)).matrix())
    np.testing.assert_allclose((a @ a.inverse()).matrix(), np.eye(4), atol=1e-12)
    np.testing.assert_allclose((a.inverse() @ a).matrix(), np.eye(4), atol=1e-12)
    np.testing.assert_allclose((Sim3() @ a).matrix(), a.matrix())
    np.testing.assert_allclose(a.matrix()[:3, :3] @ points[0] + a.translation, a.apply(points[0]))


def test_a_transformed_pose_stays_orthonormal_and_moves_its_points() -> None:
    map_from_window = random_sim3(5)
    pose = _some_pose().numpy()
    transformed = map_from_window.transform_poses(pose[None])[0]
    np.testing.assert_allclose(transformed[:3, :3] @ transformed[:3, :3].T, np.eye(3), atol=1e-12)
    point = np.array([0.3, -0.2, 1.5])
    through_window = map_from_window.apply(pose[:3, :3] @ point + pose[:3, 3])
    through_camera = transformed[:3, :3] @ (map_from_window.scale * point) + transformed[:3, 3]
    np.testing.assert_allclose(through_camera, through_window)


def test_similarity_transform_without_positive_scale_is_rejected() -> None:
    for scale in (0.0, -1.0, float('nan')):
        with pytest.raises(ValueError, match='expected more than 0'):
            Sim3(scale)


@pytest.mark.skipif(not GOLDEN.exists(), reason='the golden geometry is not beside the repository')
def test_geometry_equals_the_reference() -> None:
    golden = load_file(GOLDEN / 'geometry.safetensors')
    height, width = 42, 56
    camera, intrinsics = decode_pose(golden['enc'], height, width)
    _close(camera, golden['enc.extrinsic'])
    _close(intrinsics, golden['enc.intrinsic'])
    _close(encode_pose(camera, intrinsics, height, width), golden['enc.roundtrip'])
    infinite = decode_pose(golden['enc_fov0'], height, width)[1]
    _close(infinite, golden['enc_fov0.intrinsic'])
    _close(matrix_from_quaternion(golden['rot.quat_xyzw']), golden['rot.mat'])
    _close(quaternion_from_matrix(golden['rot.mat']), golden['rot.quat_back'])
    extrinsic, intrinsic = golden['unproject.extrinsic'], golden['unproject.intrinsic']
    _close(invert_rigid(extrinsic), golden['inverse_se3'])
    in_camera = unproject(golden['unproject.depth'].squeeze(-1), intrinsic).flatten(1, 2)
    world = transform_points(invert_rigid(extrinsic.double()), in_camera.double())
    _close(world, golden['unproject.points_f64'])
    pixels, seen = project(golden['project.points'], extrinsic, intrinsic)
    _close(seen.transpose(1, 2), golden['project.cam'])
    # the error of a pixel grows as its depth approaches 0: compare before the division
    depth, golden_depth = seen[..., 2:], golden['project.cam'].transpose(1, 2)[..., 2:]
    _close(pixels * depth / 100, golden['project.uv'] * golden_depth / 100)


def _close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    torch.testing.assert_close(ours, golden.reshape(ours.shape), atol=1e-6, rtol=1e-6)
