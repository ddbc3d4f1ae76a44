# SPDX-License-Identifier: Apache-2.0
"""Recordings become maps: the same from every input, complete or not at all, resumable."""

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
    write_images,
    write_video,
)
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin

from vggt_ros.cli.reconstruct import Reconstruct
from vggt_ros.inference.load import load_network
from vggt_ros.io.recordings import open_frames
from vggt_ros.lab.evaluation.sequences import render_sequence
from vggt_ros.lab.synthetic.trajectories import SEQUENCES
from vggt_ros.offline.assembled_map import assemble_map
from vggt_ros.offline.frame_images import read_frame_depth
from vggt_ros.offline.jobs import run_jobs
from vggt_ros.offline.reconstruct import Reconstructed, ReconstructOptions, reconstruct_recording
from vggt_ros.offline.run import RunOptions
from vggt_ros.offline.window_record import list_records, read_records
from vggt_ros.settings import ModelSettings, Settings

FRAMES = 22  # windows of 8 with a stride of 4: four complete ones, and one for the rest
ALL_IMAGES = Settings.from_flat({'min_parallax': 0.0})
pytest.importorskip('pycolmap', reason='reconstruct needs vggt_ros[offline]')
trimesh = pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')


@pytest.fixture(scope='module')
def images() -> np.ndarray:
    return render_sequence(SEQUENCES['handheld'](FRAMES), 0, 96, 128)[0]


@pytest.fixture(scope='module')
def network():
    return load_network(ModelSettings(checkpoint='embedded', device='cpu'))


@pytest.fixture(scope='module')
def recording(images, tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('recordings') / 'room', images)


@pytest.fixture
def make(network, tmp_path) -> Callable[..., Reconstructed]:
    def run(
        where: Path, name: str = 'out', settings: Settings = ALL_IMAGES, **options: object
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


def run_command(*arguments: object) -> int:
    """Run the command line in this process."""
    flags = ['--checkpoint', 'embedded', '--min-parallax', '0', '--device', 'cpu']
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        return Reconstruct.main([*map(str, arguments), *flags])
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


def test_bag_folder_and_video_of_one_sequence_give_the_same_trajectory(
    images, recording, make, tmp_path
) -> None:
    raw = [image_message(i, image) for i, image in enumerate(images)]
    encoded = [compressed_message(i, image) for i, image in enumerate(images)]
    infos = [info_message(i, image, 400.0) for i, image in enumerate(images)]
    inputs = {
        # with a calibration far from the prediction, which is counted
        'mcap': write_bag(
            tmp_path / 'mcap_bag', {'/camera/camera_info': infos, '/camera/image_raw': raw}
        ),
        'sqlite': write_bag(
            tmp_path / 'sqlite_bag', {'/camera/image_raw': raw}, StoragePlugin.SQLITE3
        ),
        'compressed': write_bag(
            tmp_path / 'compressed_bag', {'/camera/image_raw/compressed': encoded}
        ),
        'video': write_video(tmp_path / 'sequence.mp4', images),
    }
    expected = trajectory(make(recording, 'folder').folder)
    assert len(expected) == FRAMES
    length = np.linalg.norm(np.diff(expected[:, 1:4], axis=0), axis=1).sum()
    for kind, where in inputs.items():
        result = make(where, kind)
        found = trajectory(result.folder)
        assert len(found) == FRAMES
        description = json.loads((result.folder / 'reconstruction.json').read_text())
        disagreed = description['counts'].get('focal_length_disagreements', 0)
        assert disagreed > 0 if kind == 'mcap' else disagreed == 0
        difference = np.linalg.norm(found[:, 1:4] - expected[:, 1:4], axis=1).max()
        if kind == 'video':
            assert difference < 0.05 * length
        else:
            assert np.abs(found[:, 1:] - expected[:, 1:]).max() < 1e-5


def test_the_files_open_in_other_tools(recording, make, tmp_path) -> None:
    import pycolmap
    from evo.tools import file_interface

    bag = tmp_path / 'replay.mcap'
    result = make(recording, bag=bag)
    description = json.loads((result.folder / 'reconstruction.json').read_text())

    model = pycolmap.Reconstruction(result.folder / 'sparse' / '0')
    assert model.num_reg_images() == FRAMES
    assert model.compute_mean_track_length() >= 2
    assert model.compute_mean_reprojection_error() < 0.01 * 128
    written = model.find_image_with_name('000005.jpg').cam_from_world().inverse().matrix()
    line = trajectory(result.folder)[5]
    assert np.allclose(written[:, 3], line[1:4])
    # the errors that are written are those of the model
    errors = [point.error for point in model.points3D.values()]
    model.update_point_3d_errors()
    assert np.allclose(errors, [point.error for point in model.points3D.values()], atol=1e-3)

    cloud = trimesh.load(result.folder / 'cloud.ply')
    assert len(cloud.vertices) == description['points'] > 1000
    assert np.isfinite(cloud.vertices).all() and len(np.unique(cloud.colors, axis=0)) > 100
    scene = trimesh.load(result.folder / 'scene.glb')
    assert len(scene.geometry) == 2

    read = file_interface.read_tum_trajectory_file(str(result.folder / 'trajectory.tum'))
    assert read.num_poses == FRAMES and read.check()[0]

    with AnyReader([bag]) as reader:
        counts = {each.topic: each.msgcount for each in reader.connections}
        connection = next(c for c in reader.connections if c.topic == '/vggt/odometry')
        positions = [
            reader.deserialize(raw, connection.msgtype).pose.pose.position
            for _, _, raw in reader.messages([connection])
        ]
    assert counts['/vggt/points'] == counts['/vggt/depth/image_rect'] == FRAMES
    assert np.allclose([[p.x, p.y, p.z] for p in positions], trajectory(result.folder)[:, 1:4])

    page = (result.folder / 'report.html').read_text()
    assert 'not metres' in page and 'http' not in page.replace('http-equiv', '')


def test_points_agree_with_depth_images_and_cameras(recording, make) -> None:
    folder = make(recording).folder
    assembled = assemble_map(folder, 0)
    points = next(assembled.points())
    frame = assembled.frames[int(points.frame[0])]
    depth = read_frame_depth(folder, frame.frame_id, frame.depth_step, frame.depth_size)
    own = points.frame == points.frame[0]
    camera_from_world = np.linalg.inv(frame.world_from_camera)
    in_camera = points.xyz[own] @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    projected = in_camera @ frame.depth_intrinsics.T
    columns, rows = (projected[:, :2] / projected[:, 2:]).round().astype(int).T
    assert np.allclose(depth[rows, columns], in_camera[:, 2], rtol=1e-3)
    assert np.isfinite(depth).sum() == own.sum()


def test_all_at_once_is_one_window(recording, make) -> None:
    result = make(recording, run=RunOptions(all_at_once=True, every=2))
    assert result.export is not None and len(result.export.map.windows) == 1
    assert len(result.export.map.frames) == FRAMES // 2


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
    assembled = make(bag, settings=Settings.from_flat(flat)).export.map
    assert assembled.unit == 'm'
    lengths = [
        np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()
        for poses in (truth, np.stack([frame.world_from_camera for frame in assembled.frames]))
    ]
    assert 0.5 < lengths[1] / lengths[0] < 2  # as accurate as the small network is


@pytest.mark.parametrize('ended_by', [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_resumed_with_the_same_result(
    ended_by, recording, make, tmp_path
) -> None:
    expected = trajectory(make(recording, 'whole').folder)
    output = tmp_path / 'map'
    # the same images by many names: long enough to be interrupted
    many = tmp_path / 'many'
    many.mkdir()
    for i in range(160):
        phase = i % (2 * FRAMES - 2)
        os.symlink(
            recording / f'image{min(phase, 2 * FRAMES - 2 - phase)}.png', many / f'{i:03d}.png'
        )
    child = start_command(many, '--output', output)
    partial_map = tmp_path / 'map.partial'
    while not (partial_map / 'windows' / '000002.safetensors').exists() and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(ended_by)
    _, errors = child.communicate()
    assert not output.exists()
    done = [partial_map / name for name in list_records(partial_map)]
    assert len(done) >= 3
    if ended_by == signal.SIGINT:
        assert child.returncode == 130 and 'map.partial' in errors
        assert (partial_map / 'cloud.ply').exists()  # the results so far
    written = {path.name: path.stat().st_mtime_ns for path in done}
    assert run_command(many, '--output', output) == 0
    repeated = [
        name
        for name, mtime in written.items()
        if (output / 'windows' / name).stat().st_mtime_ns != mtime
    ]
    assert len(repeated) <= 1
    found = trajectory(output)
    assert len(found) == 160 and not partial_map.exists()
    assert np.abs(found[: FRAMES - 2, 1:] - expected[: FRAMES - 2, 1:]).max() < 1e-5


def test_a_run_is_not_resumed_with_other_settings(recording, network, tmp_path) -> None:
    def run(settings: Settings) -> Reconstructed:
        source = open_frames(str(recording))
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

    assert not run(ALL_IMAGES).complete
    with pytest.raises(ValueError, match='is of a run with other settings; expected the same'):
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
    return write_images(folder / 'mixed', [images[0], images[1][:48]])


def unreadable_images(folder: Path, images: np.ndarray) -> Path:
    where = write_images(folder / 'broken', images[:3])
    for path in where.iterdir():
        path.write_bytes(b'no image')
    return where


def one_image(folder: Path, images: np.ndarray) -> Path:
    return write_images(folder / 'one', images[:1])


def invalid_video(folder: Path, _: np.ndarray) -> Path:
    (folder / 'sequence.mp4').write_bytes(b'no video' * 100)
    return folder / 'sequence.mp4'


@pytest.mark.parametrize(
    ('prepare', 'expected'),
    [
        (empty_folder, 'found no images; expected'),
        (lambda folder, _: folder / 'nowhere', 'found no images; expected'),
        (mixed_sizes, 'image1.png has 128x48 pixels and image0.png 128x96; expected'),
        (unreadable_images, 'none of 3 files can be read as an image'),
        (one_image, 'no window from 1 images; expected at least two'),
        (invalid_video, 'cannot be read as a video'),
        (bag_without_images, 'found image topics: none; expected'),
        (bag_with_two_topics, 'found image topics: /left/image, /right/image; expected one'),
        (partial(truncated_bag, StoragePlugin.MCAP), 'cannot be read as a bag'),
        (partial(truncated_bag, StoragePlugin.SQLITE3), 'cannot be read as a bag'),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_finished_folder(
    prepare, expected, images, tmp_path, capsys
) -> None:
    where = prepare(tmp_path, images)
    assert run_command(where, '--output', tmp_path / 'map') == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith('reconstruct: ') and expected in errors
    assert 'Traceback' not in errors
    assert not (tmp_path / 'map').exists()


def test_unreadable_images_are_skipped_and_named(images, tmp_path, capsys) -> None:
    where = write_images(tmp_path / 'some', images[:12])
    truncated(where / 'image3.png', 0.3)
    (where / 'image7.png').write_bytes(b'')
    assert run_command(where, '--output', tmp_path / 'map') == 0
    assert '2 images could not be read' in capsys.readouterr().out
    page = (tmp_path / 'map' / 'report.html').read_text()
    assert 'image3.png' in page and 'image7.png' in page
    assert len(trajectory(tmp_path / 'map')) == 10


def test_a_full_disk_and_a_forbidden_folder_are_reported(recording, tmp_path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    assert run_command(recording, '--output', tmp_path / 'file' / 'map') == 1
    assert 'Not a directory' in capsys.readouterr().err
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = run_command(recording, '--output', tmp_path / 'map')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1
    assert 'File too large' in capsys.readouterr().err
    assert not (tmp_path / 'map').exists()
    list(read_records(tmp_path / 'map.partial'))  # those that are there are complete
    assert run_command(recording, '--output', tmp_path / 'map') == 0


def test_a_finished_folder_is_not_touched(recording, make, tmp_path) -> None:
    make(recording)
    before = (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns
    with pytest.raises(ValueError, match='exists; expected a new folder'):
        make(recording)
    assert (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns == before
    make(recording, overwrite=True)
    assert (tmp_path / 'out' / 'cloud.ply').stat().st_mtime_ns > before


@pytest.mark.parametrize('parallel', [1, 2])
def test_finished_recordings_are_skipped_and_failures_named(parallel, tmp_path) -> None:
    def write_name(where: str, folder: Path) -> str:
        """Replace a reconstruction; local, so that Ray serialises it."""
        if 'bad' in where:
            return 'it is bad'
        if 'deadly' in where:
            os.kill(os.getpid(), signal.SIGKILL)
        folder.mkdir(parents=True)
        (folder / 'name').write_text(where)
        return ''

    inputs = ['one', 'bad', 'two', 'done']
    if parallel > 1:
        pytest.importorskip('ray', reason='parallel jobs need Ray')
        inputs.append('deadly')
    (tmp_path / 'done').mkdir()
    reports: list[str] = []
    failures = run_jobs(inputs, tmp_path, write_name, parallel, reports.append)
    assert failures.pop('bad') == 'it is bad'
    assert set(failures) == ({'deadly'} if parallel > 1 else set())
    assert (tmp_path / 'two' / 'name').read_text() == 'two'
    assert not (tmp_path / 'done' / 'name').exists()
    assert len(reports) == len(inputs)
    with pytest.raises(ValueError, match='more than one recording is called map'):
        run_jobs(['a/map', 'b/map'], tmp_path, write_name, 1, reports.append)
