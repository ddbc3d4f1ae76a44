# SPDX-License-Identifier: Apache-2.0
"""Synthetic windows: the ground truth is consistent, and determined by the seed alone."""

import math

import numpy as np
import pytest
import torch

from vggt_ros.geometry.camera import invert_rigid, project, transform_points, unproject
from vggt_ros.lab.evaluation.plots import draw_windows
from vggt_ros.lab.synthetic.random_motion import MOTIONS, random_motion
from vggt_ros.lab.synthetic.random_streams import RandomStreams
from vggt_ros.lab.synthetic.rooms import CLEARANCE, random_rooms, remove_obstacles
from vggt_ros.lab.synthetic.windows import SPLITS, render_windows, window_seeds

HEIGHT, WIDTH, FRAMES = 42, 56, 3


@pytest.fixture(scope='module')
def windows():
    return render_windows(window_seeds('train', 3, 0, 12), FRAMES, HEIGHT, WIDTH, queries=20)


def test_random_streams_are_uniform_and_independent():
    random = RandomStreams(torch.arange(400))
    uniform = random.uniform(50)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.01
    assert abs(float(uniform.var()) - 1 / 12) < 0.003
    table = np.corrcoef(torch.cat([uniform, random.uniform(50)], dim=1).T)
    assert np.abs(table - np.eye(100)).max() < 0.25  # between counters; 5 sigma of 400 rows
    neighbours = np.corrcoef(uniform[:60])
    assert np.abs(neighbours - np.eye(60)).max() < 0.65  # between seeds; 50 counters
    normal = random.normal(50)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02
    drawn = random.categorical([1, 0, 3], 50)
    assert set(drawn.unique().tolist()) == {0, 2}
    assert abs(float((drawn == 2).float().mean()) - 0.75) < 0.02
    assert (random.permutation(7).sort(dim=1).values == torch.arange(7)).all()
    assert set(random.integers(5, 50).unique().tolist()) == set(range(5))


def test_the_stream_of_a_seed_does_not_depend_on_the_batch():
    together, alone = (
        RandomStreams(torch.tensor([5, 6, 7 << 40])),
        RandomStreams(torch.tensor([7 << 40])),
    )
    for count in (1, 4, 2):
        assert torch.equal(together.bits(count)[2], alone.bits(count)[0])


def test_splits_seeds_and_indices_share_no_window():
    seeds = [
        window_seeds(split, seed, first, 50)
        for split in SPLITS
        for seed in (0, 1, 2**20 - 1)
        for first in (0, 50, 2**30)
    ]
    assert len(torch.cat(seeds).unique()) == 50 * len(seeds)


@pytest.mark.parametrize('wrong', [('exam', 0, 0), ('train', 2**20, 0), ('train', 0, -1)])
def test_window_seeds_out_of_range_are_rejected(wrong):
    with pytest.raises(ValueError, match='expected one of'):
        window_seeds(*wrong, 1)


def test_a_window_is_the_same_alone_and_in_a_batch(windows):
    alone = render_windows(window_seeds('train', 3, 7, 1), FRAMES, HEIGHT, WIDTH, queries=20)
    for name in ('images', 'world_from_camera', 'intrinsics', 'depth', 'tracks', 'visible'):
        torch.testing.assert_close(
            getattr(windows, name)[7], getattr(alone, name)[0], rtol=1e-4, atol=1e-4
        )


def test_images_are_in_range_and_have_contrast(windows):
    assert windows.images.shape == (12, FRAMES, 3, HEIGHT, WIDTH)
    assert windows.images.min() >= 0 and windows.images.max() <= 1
    assert (windows.images.flatten(1).std(1) > 0.02).all()
    assert windows.depth.min() > 0 and windows.depth.max() < 20
    view = 2 * torch.atan(WIDTH / 2 / windows.intrinsics[:, 0, 0, 0]).rad2deg()
    assert view.min() >= 40 and view.max() <= 100 and view.max() - view.min() > 20


def test_depth_of_two_frames_is_consistent(windows):
    """Depth transformed into another frame equals the depth there."""
    poses, depth, matrix = windows.world_from_camera, windows.depth, windows.intrinsics
    points = transform_points(poses[:, 0], unproject(depth[:, 0], matrix[:, 0]).flatten(1, 2))
    pixels, in_camera = project(points, invert_rigid(poses[:, 1])[:, :3], matrix[:, 1])
    x, y = pixels.round().long().unbind(-1)
    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT) & (in_camera[..., 2] > 0.05)
    found = depth[:, 1].flatten(1).gather(1, (y * WIDTH + x).clamp(0, HEIGHT * WIDTH - 1))
    relative = (in_camera[..., 2] / found - 1)[inside]
    assert inside.float().mean() > 0.4
    assert relative.abs().median() < 0.01  # the rest is occluded in one frame
    # Only at the edges of solids, within half a pixel, is a point in front of the depth.
    assert (relative < -0.05).float().mean() < 0.08


def test_tracks_lie_on_the_visible_surfaces(windows):
    assert windows.visible[:, 0].float().mean() > 0.99  # queries are visible in their own frame
    assert 0.3 < float(windows.visible[:, 1:].float().mean()) < 0.95
    poses, matrix = windows.world_from_camera, windows.intrinsics
    for frame in range(FRAMES):
        x, y = windows.tracks[:, frame].round().long().unbind(-1)
        visible = windows.visible[:, frame]
        index = (y * WIDTH + x).clamp(0, HEIGHT * WIDTH - 1)
        depth = windows.depth[:, frame].flatten(1).gather(1, index)
        rays = unproject(torch.ones(12, HEIGHT, WIDTH), matrix[:, frame]).flatten(1, 2)
        local = rays.gather(1, index[..., None].expand(-1, -1, 3)) * depth[..., None]
        world = transform_points(poses[:, frame], local)
        if frame == 0:
            first = world
        gap = (world - first).norm(dim=-1) / depth
        assert gap[visible & windows.visible[:, 0]].median() < 0.05  # a pixel is 0.02 of the depth


@pytest.mark.parametrize('kind', range(len(MOTIONS)), ids=MOTIONS)
def test_each_kind_of_motion_is_as_named(kind):
    name = list(MOTIONS)[kind]
    random = RandomStreams(torch.arange(200))
    room = random_rooms(random).half_size[:, 0]
    poses = random_motion(random, room, 6, kind)
    rotation, position = poses[..., :3, :3], poses[..., :3, 3]
    eye = torch.eye(3).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.mT, eye, atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0.99).all()
    assert (position[..., :2].abs() <= room[:, None, :2] - CLEARANCE + 1e-4).all()
    assert (position[..., 2] >= CLEARANCE - 1e-4).all()
    assert (position[..., 2] <= 2 * room[:, None, 2] - CLEARANCE + 1e-4).all()
    distance = (position[:, :, None] - position[:, None]).norm(dim=-1).flatten(1).amax(1)
    cosine = ((rotation[:, :, None] * rotation[:, None]).sum((-1, -2)) - 1) / 2
    angle = cosine.clamp(-1, 1).arccos().flatten(1).amax(1).rad2deg()
    if name in ('rotation', 'stationary'):
        assert distance.max() == 0
    else:
        assert 0.1 < float(distance.median()) < 1.5
    if name == 'stationary':
        assert angle.max() < 3
    if name == 'rotation':
        assert angle.median() > 15
    if name in ('forward', 'lateral'):
        motion = rotation.mT @ (position[:, :, None] - position[:, None]).flatten(1, 2)[
            :, 5, :, None
        ].unsqueeze(1)
        share = (
            motion[:, 0, 2, 0].abs() / motion[:, 0, :, 0].norm(dim=-1).clamp(min=1e-6)
        ).median()
        assert (share > 0.8) if name == 'forward' else (share < 0.5)


def test_obstacles_are_removed():
    random = RandomStreams(torch.arange(50))
    rooms = random_rooms(random)
    inside = rooms.centre[:, 1:2].clone()
    cleared = remove_obstacles(rooms, inside)
    assert (cleared.centre[:, 1, 2] < -10).all()
    assert torch.equal(cleared.centre[:, 0], rooms.centre[:, 0])
    unchanged = remove_obstacles(rooms, torch.full((50, 1, 3), 100.0))
    assert torch.equal(unchanged.centre, rooms.centre)


def test_the_contact_sheet_is_drawn(windows, tmp_path):
    draw_windows(windows, tmp_path / 'sheet.png')
    assert (tmp_path / 'sheet.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'sheet.png').stat().st_size > 50_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_windows_are_the_same_on_cuda(windows):
    on_cuda = render_windows(
        window_seeds('train', 3, 0, 12).cuda(), FRAMES, HEIGHT, WIDTH, queries=20
    )
    torch.testing.assert_close(
        on_cuda.world_from_camera.cpu(), windows.world_from_camera, atol=1e-4, rtol=1e-4
    )
    assert ((on_cuda.depth.cpu() / windows.depth - 1).abs() < 1e-3).float().mean() > 0.995
    assert math.isclose(float(on_cuda.images.mean()), float(windows.images.mean()), abs_tol=1e-3)
