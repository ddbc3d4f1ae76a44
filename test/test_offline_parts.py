# SPDX-License-Identifier: Apache-2.0
"""Parts of the offline tools by themselves: voxels, records, states, depth pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_network import FakeNetwork

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.loop_closure import LoopClosure
from vggt_ros.offline.depth_images import read_depth_png, write_depth_png
from vggt_ros.offline.joined_map import join_map
from vggt_ros.offline.record import load_record, make_record
from vggt_ros.offline.snapshot import SnapshotError, load_snapshot, save_snapshot
from vggt_ros.offline.voxels import VoxelCloud
from vggt_ros.settings import Settings

STEP_NS = 100_000_000


def add_points(cloud: VoxelCloud, xyz: np.ndarray, confidence: float = 1.0, frame: int = 0):
    count = len(xyz)
    cloud.add(
        xyz.astype(np.float32),
        np.full((count, 3), 100, np.uint8),
        np.full(count, confidence, np.float32),
        np.full(count, frame),
    )


def test_a_voxel_has_one_point_weighed_by_confidence() -> None:
    cloud = VoxelCloud(1.0, 100)
    add_points(cloud, np.array([[0.2, 0.5, 0.5], [3.5, 0.5, 0.5]]), 1.0, frame=4)
    add_points(cloud, np.array([[0.6, 0.5, 0.5]]), 3.0, frame=7)
    made = cloud.cloud()
    assert np.allclose(sorted(made.xyz[:, 0]), [0.5, 3.5])
    first = made.xyz[:, 0] < 1
    assert made.confidence[first] == 3 and made.frame[first] == 4


def test_a_cloud_stays_as_small_as_was_asked() -> None:
    generator = np.random.default_rng(0)
    cloud = VoxelCloud(0.01, 500)
    for i in range(20):
        add_points(cloud, generator.uniform(-5, 5, (1000, 3)), frame=i)
    made = cloud.cloud()
    assert 50 < len(made.xyz) <= 500
    assert made.voxel > 0.01 and np.log2(made.voxel / 0.01) % 1 == pytest.approx(0)
    assert len(np.unique(np.floor(made.xyz / made.voxel), axis=0)) == len(made.xyz)


def test_points_beyond_the_grid_are_left_out() -> None:
    cloud = VoxelCloud(1e-3, 100)
    add_points(cloud, np.array([[0.0, 0, 0], [1e6, 0, 0]]))
    assert len(cloud.cloud().xyz) == 1


def test_depth_pictures_come_back_within_a_step(tmp_path) -> None:
    depth = np.random.default_rng(0).uniform(0.1, 30, (20, 30)).astype(np.float32)
    depth[3, 4] = np.nan
    step = write_depth_png(tmp_path / 'depth.png', depth)
    found = read_depth_png(tmp_path / 'depth.png', step)
    assert np.array_equal(np.isnan(found), np.isnan(depth))
    assert np.nanmax(np.abs(found - depth)) <= step * 0.51
    assert np.isnan(read_depth_of_nothing(tmp_path)).all()
    (tmp_path / 'other.png').write_bytes(b'')
    with pytest.raises(ValueError, match='cannot be read as 16-bit depth'):
        read_depth_png(tmp_path / 'other.png', 1.0)


def read_depth_of_nothing(folder: Path) -> np.ndarray:
    step = write_depth_png(folder / 'nothing.png', np.full((4, 4), np.nan, np.float32))
    return read_depth_png(folder / 'nothing.png', step)


def engine_of(network: FakeNetwork, **flat: object) -> StreamingEngine:
    small = {'window_size': 4, 'window_stride': 2, 'min_parallax': 0.0}
    return StreamingEngine(Settings.from_flat({**small, **flat}), network)


def updates_of(engine: StreamingEngine, stamps: range) -> list:
    pictures = ((i, np.full((48, 64, 3), 10 + i, np.uint8)) for i in stamps)
    frames = (Frame(picture, i * STEP_NS, 'camera') for i, picture in pictures)
    return [update for frame in frames if (update := engine.add(frame)) is not None]


@pytest.mark.parametrize('flat', [{}, {'anchor_windows': 3}, {'loop_closure': True}])
def test_an_engine_goes_on_from_its_state_as_if_nothing_had_been(flat, tmp_path) -> None:
    if 'loop_closure' in flat:
        pytest.importorskip('gtsam', reason='loops need GTSAM')
    network = FakeNetwork()
    one, other = engine_of(network, **flat), engine_of(network, **flat)
    updates_of(one, range(9))
    save_snapshot(tmp_path / 'state', one, 8, network, None)
    assert load_snapshot(tmp_path / 'state', other, network, None) == 8
    expected, found = updates_of(one, range(9, 20)), updates_of(other, range(9, 20))
    assert len(found) == len(expected) > 3
    for mine, its in zip(found, expected, strict=True):
        assert mine.batch.ids == its.batch.ids and mine.map_id == its.map_id
        assert np.allclose(mine.world_from_camera, its.world_from_camera, atol=1e-6)
    assert one.counts == other.counts


class Harm:
    """Something that would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_from_elsewhere_runs_nothing(tmp_path) -> None:
    network = FakeNetwork()
    for stored in (
        pickle.dumps({'place': 1, 'engine': Harm(tmp_path / 'harm')}),
        pickle.dumps({'place': 1, 'engine': np.load}),
        pickle.dumps({'place': 1, 'engine': {}}),
        pickle.dumps([1]),
        b'',
    ):
        (tmp_path / 'state').write_bytes(stored)
        with pytest.raises(SnapshotError, match='does not say where the reconstruction was'):
            load_snapshot(tmp_path / 'state', engine_of(network), network, None)
    assert not (tmp_path / 'harm').exists()


def test_a_loop_moves_windows_that_are_written_already(tmp_path) -> None:
    from dataclasses import replace

    updates = updates_of(engine_of(FakeNetwork()), range(8))
    moved = Sim3(2.0, np.eye(3), np.array([1.0, 2.0, 3.0]))
    last = len(updates) - 1
    for i, update in enumerate(updates):
        if i == last:
            update = replace(update, loop_closure=LoopClosure(0, {0: moved}))
        record = make_record(update, np.zeros(len(update.batch.ids)))
        again = load_record(record.save(tmp_path))
        assert np.array_equal(again.depth, record.depth) and again.note == record.note
    joined = join_map(tmp_path, updates[0].map_id)
    expected = moved.transform_poses(updates[0].world_from_camera)
    assert np.allclose(joined.frames[0].world_from_camera, expected[0])
    newest = updates[last].world_from_camera[-1]
    assert np.allclose(joined.frames[-1].world_from_camera, newest)
    (tmp_path / 'windows' / '000001.npz').write_bytes(b'broken')
    with pytest.raises(ValueError, match='is no window of a reconstruction'):
        join_map(tmp_path, updates[0].map_id)


def test_a_reconstruction_can_be_looked_at_while_it_is_made(tmp_path) -> None:
    pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')
    from vggt_ros.viewer.growing_scene import read_growing

    read = read_growing(tmp_path / 'map')
    assert read() is None
    partial = tmp_path / 'map.partial'
    updates = updates_of(engine_of(FakeNetwork(), min_confidence=0.0), range(12))
    sizes = []
    for update in updates:
        make_record(update, np.zeros(len(update.batch.ids))).save(partial)
        (partial / 'run.json').write_text('{"source": "test", "model_trained": true}')
        scene = read()
        assert scene is not None and read() is None  # nothing new
        sizes.append((len(scene.cameras), len(scene.xyz)))
    assert [cameras for cameras, _ in sizes] == [4, 6, 8, 10, 12]
    assert sizes == sorted(sizes) and sizes[0][1] > 100
    assert np.allclose(
        scene.cameras[-1].world_from_camera, updates[-1].world_from_camera[-1], atol=1e-9
    )
