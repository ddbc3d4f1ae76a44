# SPDX-License-Identifier: Apache-2.0
"""Ray-cast rooms: every depth lies on the nearest surface, textures are consistent over views."""

import math

import numpy as np
import pytest
import torch

from vggt_ros.geometry.camera import invert_rigid, project, transform_points, unproject
from vggt_ros.lab.synthetic.render import render
from vggt_ros.lab.synthetic.scene import KINDS, LANE, SyntheticScene
from vggt_ros.lab.synthetic.texture import texture_bank
from vggt_ros.lab.synthetic.trajectories import level_camera_poses, smooth_trajectory

HEIGHT, WIDTH = 60, 80
K = torch.tensor([[57.0, 0, WIDTH / 2], [0, 57.0, HEIGHT / 2], [0, 0, 1]])


def render_views(scene, poses):
    return render(scene, poses, K.expand(len(poses), 3, 3), HEIGHT, WIDTH)


def distance_to_surfaces(scene, points):
    """Signed distance bound of each solid at (N, 3) points, negative inside: (M, N), float64."""
    points = points.double().numpy()
    distances = []
    for index, kind in enumerate(KINDS):
        centre, half = (
            part[0, index].double().numpy() for part in (scene.centre, scene.half_size)
        )
        yaw = float(scene.yaw[0, index])
        local_from_world = np.array(
            [[math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]]
        )
        local = (points - centre) @ local_from_world.T
        outside = (np.abs(local) - half).max(axis=1)
        if kind == 'room':
            distances.append(-outside)
        elif kind == 'box':
            distances.append(outside)
        elif kind == 'sphere':
            distances.append(np.linalg.norm(local, axis=1) - half[0])
        else:
            radial = np.linalg.norm(local[:, :2], axis=1) - half[0]
            distances.append(np.maximum(radial, np.abs(local[:, 2]) - half[2]))
    return np.stack(distances)


@pytest.mark.parametrize('seed', range(4))
def test_every_ray_ends_on_the_nearest_surface(seed):
    scene = SyntheticScene.room(seed)
    poses = smooth_trajectory(3, seed, step=1.0)
    _, depth = render_views(scene, poses)
    ends = transform_points(poses, unproject(depth, K.expand(3, 3, 3)).reshape(3, -1, 3))
    for view in range(3):
        distance = distance_to_surfaces(scene, ends[view]).min(axis=0)
        assert np.abs(distance).max() < 1e-4
        origin = poses[view, :3, 3]
        for fraction in (0.1, 0.5, 0.8, 0.95, 0.99):
            before = origin + fraction * (ends[view] - origin)
            assert distance_to_surfaces(scene, before).min() > 0


def test_all_kinds_of_solids_are_visible():
    visible = set()
    for seed in range(3):
        scene = SyntheticScene.room(seed)
        poses = smooth_trajectory(6, seed, step=1.5)
        _, depth = render_views(scene, poses)
        points = transform_points(poses, unproject(depth, K.expand(6, 3, 3)).reshape(6, -1, 3))
        nearest = np.abs(distance_to_surfaces(scene, points.reshape(-1, 3))).argmin(axis=0)
        visible |= {KINDS[index] for index in np.unique(nearest)}
    assert visible == set(KINDS)


def test_depth_of_a_parallel_wall_is_constant_over_the_image():
    scene = SyntheticScene.room(0)
    top = 2 * float(scene.half_size[0, 0, 2])
    # just below the ceiling, looking up: nothing is between
    pose = level_camera_poses(
        torch.tensor([[0.2, 0.1, top - 0.25]]), torch.tensor([0.3]), torch.tensor([math.pi / 2])
    )
    _, depth = render_views(scene, pose)
    assert torch.allclose(depth, torch.full_like(depth, 0.25), atol=1e-5)


def test_a_point_has_the_same_position_and_colour_in_two_views():
    scene, poses = SyntheticScene.room(1), smooth_trajectory(2, 1, step=0.15)
    images, depth = render_views(scene, poses)
    points = transform_points(poses[:1], unproject(depth[:1], K[None]).reshape(1, -1, 3))
    pixels, in_camera = project(points, invert_rigid(poses[1:]), K[None])
    u, v = pixels[0].round().long().T
    inside = (u >= 0) & (u < WIDTH) & (v >= 0) & (v < HEIGHT) & (in_camera[0, :, 2] > 0)
    assert inside.float().mean() > 0.5
    observed = depth[1][v[inside], u[inside]]
    agree = (observed / in_camera[0, inside, 2] - 1).abs() < 0.03
    assert agree.float().mean() > 0.9
    colours = images[0].reshape(-1, 3)[inside][agree].float()
    difference = (images[1][v[inside], u[inside]][agree].float() - colours).abs().mean(-1)
    shuffled = (colours[torch.randperm(len(colours))] - colours).abs().mean(-1)
    assert difference.median() < 8
    assert difference.mean() < 0.3 * shuffled.mean()


def test_a_seed_determines_room_and_trajectory():
    poses = smooth_trajectory(2, 5)
    first, again, other = (render_views(SyntheticScene.room(seed), poses) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(poses, smooth_trajectory(2, 5))
    assert not torch.equal(poses, smooth_trajectory(2, 6))


def test_rooms_rendered_as_a_batch_equal_rooms_rendered_one_by_one():
    rooms = [SyntheticScene.room(seed) for seed in (7, 8, 9)]
    poses = torch.cat([smooth_trajectory(1, seed) for seed in (7, 8, 9)])
    images, depth = render_views(SyntheticScene.stack(rooms), poses)
    for index, room in enumerate(rooms):
        image_alone, depth_alone = render_views(room, poses[index : index + 1])
        assert torch.allclose(depth[index], depth_alone[0], rtol=1e-5)
        assert (images[index].int() - image_alone[0].int()).abs().float().mean() < 0.1


def test_several_views_of_one_room_equal_single_views():
    scene, poses = SyntheticScene.room(2), smooth_trajectory(3, 2, step=0.4)
    images, depth = render_views(scene, poses)
    for index in range(3):
        image_alone, depth_alone = render_views(scene, poses[index : index + 1])
        assert torch.allclose(depth[index], depth_alone[0], rtol=1e-5)
        assert (images[index].int() - image_alone[0].int()).abs().float().mean() < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_renders_what_the_cpu_renders():
    poses = smooth_trajectory(2, 3)
    images, depth = render_views(SyntheticScene.room(3), poses)
    scene = SyntheticScene.room(3, 'cuda')
    args = poses.cuda(), K.expand(2, 3, 3).cuda(), HEIGHT, WIDTH
    images_cuda, depth_cuda = render(scene, *args)
    assert torch.isclose(depth_cuda.cpu(), depth, rtol=1e-4).float().mean() > 0.999
    assert (images_cuda.cpu().int() - images.int()).abs().float().mean() < 0.5


def test_the_trajectory_is_smooth_level_and_free_of_collisions():
    for seed in range(20):
        poses = smooth_trajectory(200, seed, step=0.05)
        centre, rotation = poses[:, :3, 3], poses[:, :3, :3]
        steps = (centre[1:] - centre[:-1]).norm(dim=-1)
        assert steps.min() > 0.03 and steps.max() < 0.07
        assert (steps[1:] - steps[:-1]).abs().max() < 0.005
        eye = torch.eye(3).expand(200, 3, 3)
        assert torch.allclose(rotation @ rotation.transpose(1, 2), eye, atol=1e-6)
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(200), atol=1e-5)
        trace = (rotation[1:].transpose(1, 2) @ rotation[:-1]).diagonal(dim1=1, dim2=2).sum(-1)
        assert ((trace - 1) / 2).clamp(max=1).arccos().max() < math.radians(4)
        assert rotation[:, 2, 0].abs().max() < 1e-6  # the camera's x axis is level
        assert rotation[:, 2, 1].max() < -0.9  # and its y axis points down
        assert distance_to_surfaces(SyntheticScene.room(seed), centre).min() > 0.1


def test_furniture_leaves_the_lane_free():
    radius, height, angle = torch.meshgrid(
        torch.tensor([LANE[0] + 0.01, sum(LANE) / 2, LANE[1] - 0.01]),
        torch.tensor([0.05, 1.0, 2.0]),
        torch.linspace(0, 2 * math.pi, 720),
        indexing='ij',
    )
    rings = torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1).reshape(-1, 3)
    for seed in range(40):
        assert distance_to_surfaces(SyntheticScene.room(seed), rings).min() > 0


def test_a_texture_repeats_seamlessly_and_converges_to_its_mean_with_distance():
    bank = texture_bank()
    index = torch.arange(bank.count)
    left, right = (
        bank.sample(index, torch.full((2, bank.count), at), torch.full((bank.count,), 1 / 512))
        for at in (0.25, 3.25)
    )
    assert torch.allclose(left, right, atol=1e-5)
    near = bank.sample(
        index.repeat_interleave(4096), torch.rand(2, 4096 * bank.count), torch.full((1,), 1e-4)
    )
    far = bank.sample(index, torch.rand(2, bank.count), torch.full((bank.count,), 10.0))
    mean = near.reshape(2, bank.count, 4096).mean(-1)
    assert torch.allclose(far, mean, atol=0.03)
    assert near.reshape(2, bank.count, 4096).std(-1).min() > 0.1
