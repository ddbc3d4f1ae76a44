# SPDX-License-Identifier: Apache-2.0
"""The output folder of a reconstruction is read as a scene, or a one-sentence error is raised."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from vggt_ros.cli.view import View
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.lab.synthetic.trajectories import smooth_trajectory
from vggt_ros.viewer.read_scene import read_scene, read_when_changed

FRAMES, POINTS = 4, 12
SIZE = (240, 320)
INTRINSICS = [300.0, 0, 160, 0, 310, 120, 0, 0, 1]
VERTEX = np.dtype(
    [(name, '<f4') for name in 'xyz']
    + [(name, 'u1') for name in ('red', 'green', 'blue')]
    + [('confidence', '<f4'), ('frame', '<i4')]
)
KINDS = {'<f4': 'float', '|u1': 'uchar', '<i4': 'int'}
POSES = smooth_trajectory(FRAMES, seed=1).double().numpy()


def write_cloud(path, points):
    header = ['ply', 'format binary_little_endian 1.0', 'comment made by a test']
    header += [f'element vertex {len(points)}']
    header += [f'property {KINDS[kind]} {name}' for name, kind in points.dtype.descr]
    path.write_bytes('\n'.join([*header, 'end_header\n']).encode() + points.tobytes())


def points_of(frames=FRAMES):
    points = np.zeros(POINTS, VERTEX)
    for i, name in enumerate(VERTEX.names):
        points[name] = np.arange(POINTS) + i
    points['frame'] = np.arange(POINTS) % frames
    return points


@pytest.fixture
def folder(tmp_path):
    """The smallest complete output."""
    (tmp_path / 'images').mkdir()
    frames = []
    for i in range(FRAMES):
        name = f'images/{i:06d}.jpg'
        Image.new('RGB', SIZE[::-1], (50 * i, 100, 200)).save(tmp_path / name)
        entry = {'image': name, 'stamp_ns': 10**18 + i, 'map_id': 1, 'intrinsics': INTRINSICS}
        frames.append({**entry, 'width': SIZE[1], 'height': SIZE[0]})
    report = {'title': 'a bag', 'warning': 'untrained', 'unit': 'm', 'frames': frames}
    (tmp_path / 'reconstruction.json').write_text(json.dumps(report))
    write_trajectory(tmp_path / 'trajectory.tum', [1e9] * FRAMES, POSES)
    write_cloud(tmp_path / 'cloud.ply', points_of())
    return tmp_path


def change_report(folder, change):
    path = folder / 'reconstruction.json'
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def test_a_folder_is_read_as_it_was_written(folder):
    scene = read_scene(folder)
    assert (scene.title, scene.warning, scene.unit) == ('a bag', 'untrained', 'm')
    points = points_of()
    assert np.array_equal(scene.xyz, np.stack([points[name] for name in 'xyz'], axis=-1))
    assert np.array_equal(scene.rgb[:, 2], points['blue'])
    assert np.array_equal(scene.confidence, points['confidence'])
    assert np.array_equal(scene.frame, points['frame'])
    assert [camera.stamp_ns for camera in scene.cameras] == [10**18 + i for i in range(FRAMES)]
    for i, camera in enumerate(scene.cameras):
        assert np.allclose(camera.world_from_camera, POSES[i], atol=1e-6)
        assert camera.image.shape == (120, 160, 3)
        assert camera.image[5, 5].tolist() == pytest.approx([50 * i, 100, 200], abs=4)
        assert np.allclose(camera.intrinsics, [[150, 0, 80], [0, 155, 60], [0, 0, 1]])


def test_of_several_maps_the_largest_is_read_with_a_warning(folder):
    change_report(folder, lambda report: report['frames'][0].update(map_id=0))
    scene = read_scene(folder)
    assert len(scene.cameras) == FRAMES - 1
    assert len(scene.xyz) == POINTS - POINTS // FRAMES
    assert np.array_equal(np.unique(scene.frame), np.arange(FRAMES - 1))
    assert 'untrained; 2 maps' in scene.warning and '3 of 4 frames' in scene.warning


def test_of_too_many_frames_every_nth_is_read(folder):
    scene = read_scene(folder, max_cameras=2)
    assert [camera.stamp_ns - 10**18 for camera in scene.cameras] == [0, 2]
    assert np.array_equal(scene.frame, points_of()['frame'] // 2)
    assert '1 in 2 of 4 frames' in scene.title


def test_a_folder_is_read_again_only_when_it_has_changed(folder):
    read = read_when_changed(folder)
    assert read() is not None
    assert read() is None
    change_report(folder, lambda report: report.update(title='grown'))
    path = folder / 'reconstruction.json'
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert read().title == 'grown'
    assert read_when_changed(folder / 'not_yet')() is None


def truncate_cloud(folder):
    path = folder / 'cloud.ply'
    path.write_bytes(path.read_bytes()[:-1])


def drop_confidence(folder):
    names = [name for name in VERTEX.names if name != 'confidence']
    write_cloud(folder / 'cloud.ply', points_of()[names].astype([(n, VERTEX[n]) for n in names]))


def ascii_cloud(folder):
    path = folder / 'cloud.ply'
    path.write_bytes(path.read_bytes().replace(b'binary_little_endian', b'ascii'))


FAULTS = {
    'is not the output folder': lambda folder: (folder / 'reconstruction.json').unlink(),
    'is not JSON': lambda folder: (folder / 'reconstruction.json').write_text('{'),
    'lacks one of': lambda folder: change_report(folder, lambda report: report.pop('unit')),
    'has no frames': lambda folder: change_report(folder, lambda report: report['frames'].clear()),
    'expected 3, one per frame': lambda folder: change_report(
        folder, lambda report: report['frames'].pop()
    ),
    r"'wide' as width, expected int": lambda folder: change_report(
        folder, lambda report: report['frames'][0].update(width='wide')
    ),
    'is 320x240 pixels, expected 999x240': lambda folder: change_report(
        folder, lambda report: report['frames'][0].update(width=999)
    ),
    'expected 9 numbers': lambda folder: change_report(
        folder, lambda report: report['frames'][0].update(intrinsics=[0] * 9)
    ),
    'cannot be read as lines': lambda folder: (folder / 'trajectory.tum').write_text('1 2 3\n'),
    'quaternion of norm 0': lambda folder: (folder / 'trajectory.tum').write_text(
        '1 0 0 0 0 0 0 0\n' * FRAMES
    ),
    'cannot be read as an image': lambda folder: (folder / 'images/000000.jpg').write_bytes(b'x'),
    'cloud.ply cannot be read': lambda folder: (folder / 'cloud.ply').unlink(),
    'it is truncated': truncate_cloud,
    'not a binary little-endian PLY': ascii_cloud,
    r"expected also .*'confidence'": drop_confidence,
    'has frame indices 0 to 8, expected 0 to 3': lambda folder: write_cloud(
        folder / 'cloud.ply', points_of(9)
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_an_invalid_folder_is_rejected(folder, fault):
    FAULTS[fault](folder)
    with pytest.raises(ValueError, match=fault):
        read_scene(folder)


def test_the_command_exits_with_2_and_one_sentence(tmp_path, capsys):
    assert View.main([str(tmp_path / 'nothing')]) == 2
    error = capsys.readouterr().err
    assert error.startswith('view: ') and error.count('\n') == 1
    assert 'is not the output folder of a reconstruction' in error


def test_the_command_needs_a_folder_or_a_node(capsys):
    for arguments, error in (
        ([], 'expected a FOLDER or --node'),
        (['folder', '--node', '/vggt'], 'expected a FOLDER or --node'),
        (['--node', '/vggt', '--follow'], '--follow is for a FOLDER'),
        (['folder', '--image-topic', '/image'], '--image-topic is for --node'),
    ):
        assert View.main(arguments) == 2
        assert error in capsys.readouterr().err
