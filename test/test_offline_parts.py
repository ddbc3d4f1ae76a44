# SPDX-License-Identifier: Apache-2.0
"""Parts of the offline tools by themselves: voxel grid, depth images, records, growing scene."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_network import FakeNetwork

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.loop_closure import LoopClosure
from vggt_ros.offline.assembled_map import assemble_map
from vggt_ros.offline.frame_images import read_frame_depth, write_frame_depth
from vggt_ros.offline.state_file import read_state, write_state
from vggt_ros.offline.voxel_grid import VoxelGrid
from vggt_ros.offline.window_record import list_records, make_record, read_records, write_record
from vggt_ros.settings import Settings

STEP_NS = 100_000_000


def add_points(grid: VoxelGrid, xyz: np.ndarray, confidence: float = 1.0, frame: int = 0):
    count = len(xyz)
    grid.add(
        xyz.astype(np.float32),
        np.full((count, 3), 100, np.uint8),
        np.full(count, confidence, np.float32),
        np.full(count, frame),
    )


def test_a_voxel_has_one_point_weighted_by_confidence() -> None:
    grid = VoxelGrid(1.0, 100)
    add_points(grid, np.array([[0.2, 0.5, 0.5], [3.5, 0.5, 0.5]]), 1.0, frame=4)
    add_points(grid, np.array([[0.6, 0.5, 0.5]]), 3.0, frame=7)
    cloud = grid.cloud()
    assert np.allclose(sorted(cloud.xyz[:, 0]), [0.5, 3.5])
    first = cloud.xyz[:, 0] < 1
    assert cloud.confidence[first] == 3 and cloud.frame[first] == 4


def test_a_cloud_has_no_more_points_than_allowed() -> None:
    generator = np.random.default_rng(0)
    grid = VoxelGrid(0.01, 500)
    for i in range(20):
        add_points(grid, generator.uniform(-5, 5, (1000, 3)), frame=i)
    cloud = grid.cloud()
    assert 50 < len(cloud.xyz) <= 500
    assert cloud.voxel > 0.01 and np.log2(cloud.voxel / 0.01) % 1 == pytest.approx(0)
    assert len(np.unique(np.floor(cloud.xyz / cloud.voxel), axis=0)) == len(cloud.xyz)


def test_points_outside_the_grid_are_dropped() -> None:
    grid = VoxelGrid(1e-3, 100)
    add_points(grid, np.array([[0.0, 0, 0], [1e6, 0, 0]]))
    assert len(grid.cloud().xyz) == 1


def test_depth_images_are_exact_to_half_a_step(tmp_path) -> None:
    depth = np.random.default_rng(0).uniform(0.1, 30, (20, 30)).astype(np.float32)
    depth[3, 4] = np.nan
    step = write_frame_depth(tmp_path, 1, depth)
    found = read_frame_depth(tmp_path, 1, step, (20, 30))
    assert np.array_equal(np.isnan(found), np.isnan(depth))
    assert np.nanmax(np.abs(found - depth)) <= step * 0.51
    step = write_frame_depth(tmp_path, 2, np.full((4, 4), np.nan, np.float32))
    assert np.isnan(read_frame_depth(tmp_path, 2, step, (4, 4))).all()


def test_damaged_depth_images_are_rejected(tmp_path) -> None:
    write_frame_depth(tmp_path, 1, np.ones((20, 30), np.float32))
    with pytest.raises(ValueError, match='it has 30x20 pixels; expected 40x20'):
        read_frame_depth(tmp_path, 1, 1.0, (20, 40))
    (tmp_path / 'depth' / '000001.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'000001\.png cannot be read as an image'):
        read_frame_depth(tmp_path, 1, 1.0, (20, 30))


def engine_of(network: FakeNetwork, **flat: object) -> StreamingEngine:
    small = {'window_size': 4, 'window_stride': 2, 'min_parallax': 0.0}
    return StreamingEngine(Settings.from_flat({**small, **flat}), network)


def updates_of(engine: StreamingEngine, stamps: range) -> list:
    images = ((i, np.full((48, 64, 3), 10 + i, np.uint8)) for i in stamps)
    frames = (Frame(image, i * STEP_NS, 'camera') for i, image in images)
    return [update for frame in frames if (update := engine.add(frame)) is not None]


@pytest.mark.parametrize('flat', [{}, {'anchor_windows': 3}, {'loop_closure': True}])
def test_an_engine_continues_from_a_state_file_as_if_uninterrupted(flat, tmp_path) -> None:
    if 'loop_closure' in flat:
        pytest.importorskip('gtsam', reason='loops need GTSAM')
    network = FakeNetwork()
    one, other = engine_of(network, **flat), engine_of(network, **flat)
    updates_of(one, range(9))
    write_state(tmp_path, 'state', one.state_dict())
    other.load_state_dict(read_state(tmp_path, 'state'))
    expected, found = updates_of(one, range(9, 20)), updates_of(other, range(9, 20))
    assert len(found) == len(expected) > 3
    for mine, its in zip(found, expected, strict=True):
        assert mine.batch.ids == its.batch.ids and mine.map_id == its.map_id
        assert np.allclose(mine.world_from_camera, its.world_from_camera, atol=1e-6)
    assert one.counts == other.counts


def test_a_record_is_read_as_it_was_written(tmp_path) -> None:
    update = updates_of(engine_of(FakeNetwork(), min_confidence=0.0), range(8))[-1]
    update = replace(update, loop_closure=LoopClosure(0, {0: Sim3(2.0)}))
    record = make_record(update, np.arange(len(update.batch.ids)))
    write_record(tmp_path, record)
    (found,) = read_records(tmp_path)
    assert len(found.point_pixels) > 100
    for name in record.__slots__:
        mine, its = getattr(record, name), getattr(found, name)
        if isinstance(mine, np.ndarray):
            assert np.array_equal(mine, its) and mine.dtype == its.dtype, name
        elif name not in ('map_from_window', 'corrections'):
            assert mine == its, name
    assert np.array_equal(found.map_from_window.matrix(), record.map_from_window.matrix())
    assert np.array_equal(found.corrections[0].matrix(), Sim3(2.0).matrix())


def test_a_loop_closure_moves_windows_that_are_already_written(tmp_path) -> None:
    updates = updates_of(engine_of(FakeNetwork()), range(8))
    correction = Sim3(2.0, np.eye(3), np.array([1.0, 2.0, 3.0]))
    updates[-1] = replace(updates[-1], loop_closure=LoopClosure(0, {0: correction}))
    for update in updates:
        write_record(tmp_path, make_record(update, np.zeros(len(update.batch.ids))))
    assembled = assemble_map(tmp_path, updates[0].map_id)
    expected = correction.transform_poses(updates[0].world_from_camera)
    assert np.allclose(assembled.frames[0].world_from_camera, expected[0])
    newest = updates[-1].world_from_camera[-1]
    assert np.allclose(assembled.frames[-1].world_from_camera, newest)
    assert [window.loop_closed for window in assembled.windows][-1]
    (tmp_path / list_records(tmp_path)[1]).write_bytes(b'broken')
    with pytest.raises(ValueError, match=r'000001\.safetensors cannot be read'):
        assemble_map(tmp_path, updates[0].map_id)


def test_an_unfinished_reconstruction_can_be_viewed(tmp_path) -> None:
    pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')
    from vggt_ros.viewer.partial_scene import read_while_growing

    read = read_while_growing(tmp_path / 'map')
    assert read() is None
    partial = tmp_path / 'map.partial'
    partial.mkdir()
    updates = updates_of(engine_of(FakeNetwork(), min_confidence=0.0), range(12))
    sizes = []
    for update in updates:
        write_record(partial, make_record(update, np.zeros(len(update.batch.ids))))
        description = {'source': 'test', 'model_trained': True}
        (partial / 'run.json').write_text(json.dumps(description))
        scene = read()
        assert scene is not None and read() is None  # nothing new
        sizes.append((len(scene.cameras), len(scene.xyz)))
    assert [cameras for cameras, _ in sizes] == [4, 6, 8, 10, 12]
    assert sizes == sorted(sizes) and sizes[0][1] > 100
    assert np.allclose(
        scene.cameras[-1].world_from_camera, updates[-1].world_from_camera[-1], atol=1e-9
    )
