# SPDX-License-Identifier: Apache-2.0
"""Recordings become maps: the same from every kind of input, whole or not at all, resumable."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recordings_made import (
    compressed_message,
    image_message,
    info_message,
    odometry_message,
    write_bag,
    write_pictures,
    write_video,
)
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin

from vggt_ros.cli import reconstruct as command
from vggt_ros.inference.network import load_network
from vggt_ros.io.recordings import open_frames
from vggt_ros.lab.evaluation.sequences import render_sequence
from vggt_ros.lab.synthetic.sequences import SEQUENCES
from vggt_ros.offline.jobs import run_jobs
from vggt_ros.offline.joined_map import join_map
from vggt_ros.offline.reconstruct import Reconstructed, ReconstructOptions, reconstruct_recording
from vggt_ros.offline.run import RunOptions
from vggt_ros.settings import ModelSettings, Settings

FRAMES = 22  # windows of 8 with a stride of 4: three whole ones, and one for the rest
EVERYTHING = Settings.from_flat({'min_parallax': 0.0})
pytest.importorskip('pycolmap', reason='reconstruct needs vggt_ros[offline]')
trimesh = pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')


@pytest.fixture(scope='module')
def images() -> np.ndarray:
    return render_sequence(SEQUENCES['handheld'](FRAMES), 0, 96, 128)[0]


@pytest.fixture(scope='module')
def network():
    return load_network(ModelSettings(checkpoint='embedded', device='cpu'))


@pytest.fixture(scope='module')
def pictures(images, tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp('recordings') / 'room', images)


@pytest.fixture
def make(network, tmp_path) -> Callable[..., Reconstructed]:
    def run(
        where: Path, name: str = 'out', settings: Settings = EVERYTHING, **options: object
    ) -> Reconstructed:
        return reconstruct_recording(
            open_frames(str(where)),
            network,
            settings,
            ReconstructOptions(**options),
            tmp_path / name,
            lambda _: None,
            lambda: False,
        )

    return run


def trajectory(folder: Path) -> np.ndarray:
    return np.loadtxt(folder / 'trajectory.tum')


def run_command(monkeypatch, *arguments: object) -> int:
    """Run the command line in this process."""
    flags = ['--checkpoint', 'embedded', '--min-parallax', '0', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['reconstruct', *map(str, arguments), *flags])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        return command.main()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def start_command(*arguments: object) -> subprocess.Popen:
    flags = ['--checkpoint', 'embedded', '--min-parallax', '0', '--device', 'cpu']
    return subprocess.Popen(
        [sys.executable, '-m', 'vggt_ros.cli.reconstruct', *map(str, arguments), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_bag_folder_and_video_of_one_way_give_the_same_trajectory(
    images, pictures, make, tmp_path
) -> None:
    raw = [image_message(i, image) for i, image in enumerate(images)]
    packed = [compressed_message(i, image) for i, image in enumerate(images)]
    infos = [info_message(i, image, 400.0) for i, image in enumerate(images)]
    inputs = {
        # with a calibration that is far from what the network says: counted, and no more
        'mcap': write_bag(
            tmp_path / 'mcap_bag', {'/camera/camera_info': infos, '/camera/image_raw': raw}
        ),
        'sqlite': write_bag(
            tmp_path / 'sqlite_bag', {'/camera/image_raw': raw}, StoragePlugin.SQLITE3
        ),
        'compressed': write_bag(tmp_path / 'packed', {'/camera/image_raw/compressed': packed}),
        'video': write_video(tmp_path / 'way.mp4', images),
    }
    expected = trajectory(make(pictures, 'folder').folder)
    assert len(expected) == FRAMES
    length = np.linalg.norm(np.diff(expected[:, 1:4], axis=0), axis=1).sum()
    for kind, where in inputs.items():
        done = make(where, kind)
        found = trajectory(done.folder)
        assert len(found) == FRAMES
        described = json.loads((done.folder / 'reconstruction.json').read_text())
        disagreed = described['counts'].get('focal_length_disagreements', 0)
        assert disagreed > 0 if kind == 'mcap' else disagreed == 0
        difference = np.linalg.norm(found[:, 1:4] - expected[:, 1:4], axis=1).max()
        if kind == 'video':
            assert difference < 0.05 * length
        else:
            assert np.abs(found[:, 1:] - expected[:, 1:]).max() < 1e-5


def test_the_files_open_in_other_tools(pictures, make, tmp_path) -> None:
    import pycolmap
    from evo.tools import file_interface

    bag = tmp_path / 'replay.mcap'
    done = make(pictures, bag=bag)
    description = json.loads((done.folder / 'reconstruction.json').read_text())

    model = pycolmap.Reconstruction(done.folder / 'sparse' / '0')
    assert model.num_reg_images() == FRAMES
    assert model.compute_mean_track_length() >= 2
    assert model.compute_mean_reprojection_error() < 0.01 * 128
    written = model.find_image_with_name('000005.jpg').cam_from_world().inverse().matrix()
    line = trajectory(done.folder)[5]
    assert np.allclose(written[:, 3], line[1:4])
    # the error that is written is that of the model as it is
    told = [point.error for point in model.points3D.values()]
    model.update_point_3d_errors()
    assert np.allclose(told, [point.error for point in model.points3D.values()], atol=1e-3)

    cloud = trimesh.load(done.folder / 'cloud.ply')
    assert len(cloud.vertices) == description['points'] > 1000
    assert np.isfinite(cloud.vertices).all() and len(np.unique(cloud.colors, axis=0)) > 100
    scene = trimesh.load(done.folder / 'scene.glb')
    assert len(scene.geometry) == 2

    path = file_interface.read_tum_trajectory_file(str(done.folder / 'trajectory.tum'))
    assert path.num_poses == FRAMES and path.check()[0]

    with AnyReader([bag]) as reader:
        counts = {each.topic: each.msgcount for each in reader.connections}
        connection = next(c for c in reader.connections if c.topic == '/vggt/odometry')
        places = [
            reader.deserialize(raw, connection.msgtype).pose.pose.position
            for _, _, raw in reader.messages([connection])
        ]
    assert counts['/vggt/points'] == counts['/vggt/depth/image_rect'] == FRAMES
    assert np.allclose([[p.x, p.y, p.z] for p in places], trajectory(done.folder)[:, 1:4])

    page = (done.folder / 'report.html').read_text()
    assert 'not metres' in page and 'http' not in page.replace('http-equiv', '')


def test_points_lie_where_the_depth_pictures_and_cameras_put_them(pictures, make) -> None:
    from vggt_ros.offline.depth_images import read_depth_png

    folder = make(pictures).folder
    joined = join_map(folder, 0)
    points = next(joined.points())
    frame = joined.frames[int(points.frame[0])]
    depth = read_depth_png(folder / 'depth' / f'{frame.number:06d}.png', frame.depth_step)
    own = points.frame == points.frame[0]
    camera_from_world = np.linalg.inv(frame.world_from_camera)
    in_camera = points.xyz[own] @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    shown = in_camera @ frame.depth_intrinsics.T
    columns, rows = (shown[:, :2] / shown[:, 2:]).round().astype(int).T
    assert np.allclose(depth[rows, columns], in_camera[:, 2], rtol=1e-3)
    assert np.isfinite(depth).sum() == own.sum()


def test_all_at_once_is_one_window(pictures, make) -> None:
    done = make(pictures, run=RunOptions(all_at_once=True, every=2))
    assert done.made is not None and len(done.made.joined.windows) == 1
    assert len(done.made.joined.frames) == FRAMES // 2


def test_odometry_in_the_bag_makes_the_map_metric(images, make, tmp_path) -> None:
    truth = SEQUENCES['handheld'](FRAMES).world_from_camera.numpy()
    bag = write_bag(
        tmp_path / 'bag',
        {
            '/odom': [odometry_message(i, pose[:3, 3]) for i, pose in enumerate(truth)],
            '/image': [image_message(i, image) for i, image in enumerate(images)],
        },
    )
    flat = {'min_parallax': 0.0, 'scale_source': 'odometry', 'scale_min_travel': 0.0}
    joined = make(bag, settings=Settings.from_flat(flat)).made.joined
    assert joined.unit == 'm'
    lengths = [
        np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()
        for poses in (truth, np.stack([frame.world_from_camera for frame in joined.frames]))
    ]
    assert 0.5 < lengths[1] / lengths[0] < 2  # as well as the small network knows the way


@pytest.mark.parametrize('ended_by', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    ended_by, pictures, make, tmp_path, monkeypatch
) -> None:
    expected = trajectory(make(pictures, 'whole').folder)
    output = tmp_path / 'map'
    # the same picture by many names: long enough to be met in the middle
    many = tmp_path / 'many'
    many.mkdir()
    for i in range(160):
        turn = i % (2 * FRAMES - 2)
        os.symlink(
            pictures / f'picture{min(turn, 2 * FRAMES - 2 - turn)}.png', many / f'{i:03d}.png'
        )
    child = start_command(many, '--output', output)
    partial_windows = tmp_path / 'map.partial' / 'windows'
    while not (partial_windows / '000002.npz').exists() and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(ended_by)
    _, said = child.communicate()
    assert not output.exists()
    done = sorted(partial_windows.glob('*.npz'))
    assert len(done) >= 3
    if ended_by == signal.SIGINT:
        assert child.returncode == 130 and 'map.partial' in said
        assert (tmp_path / 'map.partial' / 'cloud.ply').exists()  # what is done can be looked at
    written = {path.name: path.stat().st_mtime_ns for path in done}
    assert run_command(monkeypatch, many, '--output', output) == 0
    again = [
        name
        for name, when in written.items()
        if (output / 'windows' / name).stat().st_mtime_ns != when
    ]
    assert len(again) <= 1
    found = trajectory(output)
    assert len(found) == 160 and not (tmp_path / 'map.partial').exists()
    assert np.abs(found[: FRAMES - 2, 1:] - expected[: FRAMES - 2, 1:]).max() < 1e-5


def test_a_run_with_other_settings_does_not_go_on(pictures, network, tmp_path) -> None:
    def run(settings: Settings) -> Reconstructed:
        source = open_frames(str(pictures))
        stop = iter([False] * 12 + [True] * 100)
        return reconstruct_recording(
            source,
            network,
            settings,
            ReconstructOptions(),
            tmp_path / 'map',
            lambda _: None,
            lambda: next(stop),
        )

    assert not run(EVERYTHING).complete
    with pytest.raises(ValueError, match='begun with another settings; expected the same'):
        run(Settings.from_flat({'min_parallax': 0.0, 'window_stride': 2}))


def truncated(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def bag_without_images(folder: Path, _: np.ndarray) -> Path:
    return write_bag(folder / 'bag', {'/odom': [odometry_message(0, np.zeros(3))]})


def bag_with_two_topics(folder: Path, images: np.ndarray) -> Path:
    messages = [image_message(0, images[0])]
    return write_bag(folder / 'bag', {'/left/image': messages, '/right/image': messages})


def truncated_bag(plugin: StoragePlugin, folder: Path, images: np.ndarray) -> Path:
    messages = [image_message(i, image) for i, image in enumerate(images)]
    bag = write_bag(folder / 'bag', {'/image': messages}, plugin)
    truncated(next(path for path in bag.iterdir() if path.name != 'metadata.yaml'))
    return bag


def empty_folder(folder: Path, _: np.ndarray) -> Path:
    (folder / 'empty').mkdir()
    return folder / 'empty'


def mixed_sizes(folder: Path, images: np.ndarray) -> Path:
    return write_pictures(folder / 'mixed', [images[0], images[1][:48]])


def unreadable_pictures(folder: Path, images: np.ndarray) -> Path:
    where = write_pictures(folder / 'broken', images[:3])
    for path in where.iterdir():
        path.write_bytes(b'no picture')
    return where


def one_picture(folder: Path, images: np.ndarray) -> Path:
    return write_pictures(folder / 'one', images[:1])


def no_video(folder: Path, _: np.ndarray) -> Path:
    (folder / 'way.mp4').write_bytes(b'no video' * 100)
    return folder / 'way.mp4'


@pytest.mark.parametrize(
    ('prepare', 'sentence'),
    [
        (empty_folder, 'found no pictures; expected'),
        (lambda folder, _: folder / 'nowhere', 'found no pictures; expected'),
        (mixed_sizes, 'picture1.png has 128x48 pixels and picture0.png 128x96; expected'),
        (unreadable_pictures, 'none of 3 files can be read as a picture'),
        (one_picture, '1 pictures made no window; expected at least two'),
        (no_video, 'cannot be read as a video'),
        (bag_without_images, 'found image topics: none; expected'),
        (bag_with_two_topics, 'found image topics: /left/image, /right/image; expected one'),
        (partial(truncated_bag, StoragePlugin.MCAP), 'cannot be read as a bag'),
        (partial(truncated_bag, StoragePlugin.SQLITE3), 'cannot be read as a bag'),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_that_looks_whole(
    prepare, sentence, images, tmp_path, monkeypatch, capsys
) -> None:
    where = prepare(tmp_path, images)
    assert run_command(monkeypatch, where, '--output', tmp_path / 'map') == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith('reconstruct: ') and sentence in said
    assert 'Traceback' not in said
    assert not (tmp_path / 'map').exists()


def test_unreadable_pictures_among_good_ones_are_left_out_and_named(
    images, tmp_path, monkeypatch, capsys
) -> None:
    where = write_pictures(tmp_path / 'some', images[:12])
    truncated(where / 'picture3.png', 0.3)
    (where / 'picture7.png').write_bytes(b'')
    assert run_command(monkeypatch, where, '--output', tmp_path / 'map') == 0
    assert '2 pictures could not be read' in capsys.readouterr().out
    page = (tmp_path / 'map' / 'report.html').read_text()
    assert 'picture3.png' in page and 'picture7.png' in page
    assert len(trajectory(tmp_path / 'map')) == 10


def test_a_full_disk_and_a_forbidden_folder_are_said(
    pictures, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / 'file').write_text('')
    assert run_command(monkeypatch, pictures, '--output', tmp_path / 'file' / 'map') == 1
    assert 'Not a directory' in capsys.readouterr().err
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = run_command(monkeypatch, pictures, '--output', tmp_path / 'map')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1
    assert 'File too large' in capsys.readouterr().err
    assert not (tmp_path / 'map').exists()
    # what has its name is whole
    for path in (tmp_path / 'map.partial').rglob('*.npz'):
        np.load(path)
    assert run_command(monkeypatch, pictures, '--output', tmp_path / 'map') == 0


def test_a_finished_folder_is_not_touched(pictures, make, tmp_path) -> None:
    make(pictures)
    before = (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns
    with pytest.raises(ValueError, match='is there already; expected a new folder'):
        make(pictures)
    assert (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns == before
    make(pictures, overwrite=True)
    assert (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns > before


@pytest.mark.parametrize('at_once', [1, 2])
def test_many_recordings_pass_over_what_is_done_and_name_what_failed(at_once, tmp_path) -> None:
    def write_name(where: str, folder: Path) -> str:
        """Stand for a recording; local, so that Ray takes it along."""
        if 'bad' in where:
            return 'it is bad'
        if 'deadly' in where:
            os.kill(os.getpid(), signal.SIGKILL)
        folder.mkdir(parents=True)
        (folder / 'name').write_text(where)
        return ''

    inputs = ['one', 'bad', 'two', 'done']
    if at_once > 1:
        pytest.importorskip('ray', reason='several jobs at once need Ray')
        inputs.append('deadly')
    (tmp_path / 'done').mkdir()
    said: list[str] = []
    failures = run_jobs(inputs, tmp_path, write_name, at_once, said.append)
    assert failures.pop('bad') == 'it is bad'
    assert set(failures) == ({'deadly'} if at_once > 1 else set())
    assert (tmp_path / 'two' / 'name').read_text() == 'two'
    assert not (tmp_path / 'done' / 'name').exists()
    assert len(said) == len(inputs)
    with pytest.raises(ValueError, match='several recordings would be map'):
        run_jobs(['a/map', 'b/map'], tmp_path, write_name, 1, said.append)
