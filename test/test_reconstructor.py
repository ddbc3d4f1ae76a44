# SPDX-License-Identifier: Apache-2.0
"""The Python API: the same results as the command, lifetimes of the files, errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from recordings_made import START_NS, STEP_NS, image_message, write_bag, write_images

import vggt_ros
from vggt_ros import Calibration, Frame, MapUpdate, Reconstructor, Scene
from vggt_ros.cli.reconstruct import Reconstruct
from vggt_ros.lab.evaluation.sequences import render_sequence
from vggt_ros.lab.synthetic.trajectories import SEQUENCES

pytest.importorskip('trimesh', reason='reconstruction needs vggt_ros[offline]')

FRAMES = 10  # windows of 8 with a stride of 4: a complete one, and one for the rest
SETTINGS = {'min_parallax': 0.0, 'device': 'cpu', 'resolution': 56}

# As in the README, but for the checkpoint.
SCRIPT = """
from vggt_ros import Reconstructor

scene = Reconstructor('embedded').run('drive_bag')
print(scene.warning)
print(scene.trajectory, scene.point_cloud, scene.frames[0].depth)
scene.save('drive_map')

frames = [frame.image for frame in scene.frames]
for update in Reconstructor().stream(frames):
    print(update.map_id, update.world_from_camera)
"""


@pytest.fixture(scope='module')
def images() -> list[np.ndarray]:
    return list(render_sequence(SEQUENCES['handheld'](FRAMES), 0, 96, 128)[0])


@pytest.fixture(scope='module')
def folder(images, tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('recordings') / 'room', images)


@pytest.fixture(scope='module')
def reconstructor() -> Reconstructor:
    return Reconstructor(**SETTINGS)


@pytest.fixture(scope='module')
def scene(reconstructor, folder) -> Scene:
    return reconstructor.run(folder)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Return the folder that temporary ones are made in."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    return tmp_path


def test_the_script_of_the_readme_runs_on_a_bag(images, tmp_path, monkeypatch, capsys) -> None:
    messages = [image_message(i, image) for i, image in enumerate(images)]
    write_bag(tmp_path / 'drive_bag', {'/camera/image_raw': messages})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(SCRIPT, names)
    scene, update = names['scene'], names['update']
    assert isinstance(scene, Scene) and isinstance(update, MapUpdate)
    assert (scene.trajectory.stamps_ns[:2] == [START_NS, START_NS + STEP_NS]).all()
    assert (tmp_path / 'drive_map' / 'reconstruction.json').exists()
    assert 'trained on synthetic rooms only' in capsys.readouterr().out


def test_the_scene_is_that_of_the_command(scene, folder, tmp_path) -> None:
    options = ['--min-parallax', '0', '--device', 'cpu', '--resolution', '56']
    assert Reconstruct.main([str(folder), '--output', str(tmp_path / 'command'), *options]) == 0
    saved = scene.save(tmp_path / 'saved')
    scene.trajectory.save(tmp_path / 'saved' / 'again.tum')
    written = (tmp_path / 'command' / 'trajectory.tum').read_bytes()
    assert written == (saved / 'trajectory.tum').read_bytes() == (saved / 'again.tum').read_bytes()
    files = {str(path.relative_to(saved)) for path in saved.rglob('*') if path.is_file()}
    other = tmp_path / 'command'
    expected = {str(path.relative_to(other)) for path in other.rglob('*') if path.is_file()}
    assert files - {'again.tum'} == expected
    for name in ('cloud.ply', 'depth/000003.png', 'images/000009.jpg', 'scene.glb'):
        assert (saved / name).read_bytes() == (other / name).read_bytes(), name


def test_what_a_scene_holds_fits_together(scene, images) -> None:
    assert len(scene.trajectory) == len(scene.frames) == FRAMES
    assert not scene.scale_valid and scene.unit == 'units of the network'
    cloud = scene.point_cloud
    assert cloud.xyz.shape == cloud.rgb.shape == (len(cloud.confidence), 3)
    for i in (0, FRAMES - 1):
        frame = scene.frames[i]
        assert np.array_equal(frame.world_from_camera, scene.trajectory.world_from_camera[i])
        assert frame.stamp_ns == scene.trajectory.stamps_ns[i]
        assert np.abs(frame.image.astype(float) - images[i]).mean() < 5  # JPEG
        depth = frame.depth
        assert depth.dtype == np.float32 and (depth[np.isfinite(depth)] > 0).all()
        assert 0 < np.isnan(depth).mean() < 0.9  # neither all nor none is confident
        # a point of the frame, from its depth, is near one of the cloud
        row, column = np.argwhere(np.isfinite(depth))[200]
        ray = np.linalg.inv(frame.depth_intrinsics) @ [column, row, 1]
        point = frame.world_from_camera @ [*(depth[row, column] * ray), 1]
        assert np.linalg.norm(cloud.xyz - point[:3], axis=1).min() < 2 * cloud.voxel
        # the same field of view for both sizes of the image
        for size, matrix in ((depth.shape, frame.depth_intrinsics), (96, frame.intrinsics)):
            assert matrix[1, 1] / np.ravel(size)[0] == pytest.approx(frame.intrinsics[1, 1] / 96)


def test_images_in_memory_are_reconstructed_as_those_of_a_folder(
    reconstructor, scene, images
) -> None:
    for recording in (np.stack(images), (image for image in images)):
        with reconstructor.run(recording) as found:
            expected = scene.trajectory.world_from_camera
            assert np.array_equal(found.trajectory.world_from_camera, expected)
            assert np.array_equal(found.trajectory.stamps_ns, scene.trajectory.stamps_ns)


def test_stamps_and_calibration_of_images_are_used(reconstructor, images) -> None:
    matrix = np.array([[100.0, 0, 64], [0, 100, 48], [0, 0, 1]])
    calibration = Calibration(128, 96, 'plumb_bob', matrix, np.array([-0.2, 0, 0, 0, 0]))
    stamps = [5_000_000_000 + 40_000_000 * i for i in range(8)]
    with reconstructor.run(images[:8], stamps_ns=stamps, calibration=calibration) as found:
        assert found.trajectory.stamps_ns.tolist() == stamps
        # rectified
        assert np.abs(found.frames[0].image.astype(float) - images[0]).mean() > 5


def test_every_other_image_and_one_window(reconstructor, images) -> None:
    with reconstructor.run(images, every=2, all_at_once=True) as found:
        assert found.trajectory.stamps_ns.tolist() == [200_000_000 * i for i in range(5)]


def test_a_fixed_scale_makes_the_scene_metric(scene, images) -> None:
    metric = Reconstructor(**SETTINGS, scale_source='fixed', scale_factor=3.0).run(images)
    assert metric.scale_valid and metric.unit == 'm'
    expected = 3 * scene.trajectory.world_from_camera[:, :3, 3]
    assert np.allclose(metric.trajectory.world_from_camera[:, :3, 3], expected, atol=1e-6)


def test_a_stream_gives_every_window_and_the_rest(reconstructor, scene, images) -> None:
    stream = reconstructor.stream(iter(images))
    first = next(stream)  # as soon as it is complete
    updates = [first, *stream]
    assert [sum(update.is_new) for update in updates] == [8, 2]
    found = np.concatenate(
        [update.world_from_camera[np.array(update.is_new)] for update in updates]
    )
    assert np.allclose(found, scene.trajectory.world_from_camera, atol=1e-9)
    again = list(reconstructor.stream(images))
    assert [update.map_id for update in again] == [0, 0]


def test_frames_of_a_stream_keep_their_stamps(reconstructor, images) -> None:
    frames = [Frame(image, 7 + i, 'front') for i, image in enumerate(images[:8])]
    (update,) = reconstructor.stream(frames)
    assert [frame.stamp_ns for frame in update.batch.frames] == list(range(7, 15))


def test_warnings_name_what_is_wrong(images, tmp_path) -> None:
    untrained = Reconstructor('untrained', **SETTINGS)
    broken = write_images(tmp_path / 'broken', images[:6])
    (broken / 'image3.png').write_bytes(b'no image')
    with untrained.run(broken) as found:
        assert 'UNTRAINED' in found.warning and '1 images could not be read' in found.warning
        assert 'UNTRAINED' in repr(found)


def test_files_live_as_long_as_the_scene_or_a_frame(reconstructor, images, temporary) -> None:
    frame = reconstructor.run(images[:8]).frames[0]
    gc.collect()
    assert np.isfinite(frame.depth).any() and len(list(temporary.iterdir())) == 1
    del frame
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_closed_scene_says_so_and_what_was_saved_stays(reconstructor, images, temporary) -> None:
    with reconstructor.run(images[:8]) as scene:
        saved = scene.save(temporary / 'map')
        with pytest.raises(ValueError, match='map exists; expected a new folder'):
            scene.save(saved)
        scene.save(saved, overwrite=True)
    assert os.listdir(temporary) == ['map']
    for use in (
        lambda: scene.frames[0].depth,
        lambda: scene.frames[0].image,
        lambda: scene.save(temporary / 'other'),
    ):
        with pytest.raises(ValueError, match='the scene is closed'):
            use()
    assert os.listdir(temporary) == ['map'] and (saved / 'cloud.ply').exists()


@pytest.mark.parametrize(
    ('recording', 'options', 'error'),
    [
        ('nowhere', {}, 'nowhere: found no images'),
        ([], {}, 'found no images'),
        (['a.png', 'b.png'], {}, 'image 0 is a str, expected an array'),
        (np.zeros((3, 32, 48, 3)), {}, r'float64, expected \(H, W, 3\) and uint8'),
        (np.zeros((32, 48, 3), np.uint8), {}, r'shape \(48, 3\)'),
        ([np.zeros((32, 48, 3), np.uint8)], {}, 'at least two different images'),
        (
            [np.zeros((32, 48, 3), np.uint8), np.zeros((32, 40, 3), np.uint8)],
            {},
            'expected images of one size',
        ),
        (np.zeros((2, 32, 48, 3), np.uint8), {'stamps_ns': [1]}, 'found 1 stamps'),
        (np.zeros((2, 32, 48, 3), np.uint8), {'stamps_ns': [1, 2, 3]}, 'found 3 stamps'),
        (np.zeros((2, 32, 48, 3), np.uint8), {'stamps_ns': [2, 2]}, 'expected increasing stamps'),
        (
            np.zeros((2, 32, 48, 3), np.uint8),
            {'rate': 0.0},
            r'rate is 0.0, expected 0.001 to 1e\+06',
        ),
        (np.zeros((2, 32, 48, 3), np.uint8), {'rate': 'fast'}, "rate is 'fast', expected"),
        (
            np.zeros((2, 32, 48, 3), np.uint8),
            {'stamps_ns': [0.1, 0.2]},
            'a stamp is 0.1, expected nanoseconds',
        ),
        (
            np.zeros((2, 32, 48, 3), np.uint8),
            {'stamps_ns': [-2, -1]},
            'a stamp is -2, expected nanoseconds',
        ),
        (
            np.zeros((2, 32, 48, 3), np.uint8),
            {'stamps_ns': [0, 2**63]},
            'a stamp is 9223372036854775808, expected',
        ),
        (None, {}, 'found a NoneType, expected images'),
        (np.zeros((2, 32, 48, 3), np.uint8), {'every': 0}, 'every is 0, expected at least 1'),
        ('nowhere', {'stamps_ns': [1]}, 'are for images in memory'),
        ('nowhere', {'rate': 0.0}, 'rate is 0.0, expected more than 0'),
    ],
)
def test_bad_recordings_are_one_error_and_leave_nothing(
    recording, options, error, reconstructor, temporary
) -> None:
    with pytest.raises(ValueError, match=error):
        reconstructor.run(recording, **options)
    assert not list(temporary.iterdir())


def test_bad_settings_and_streams_are_one_error(reconstructor, images) -> None:
    with pytest.raises(ValueError, match='window_size is 1, expected at least 2'):
        Reconstructor(window_size=1)
    with pytest.raises(ValueError, match='unknown settings: windowsize'):
        Reconstructor(windowsize=8)
    with pytest.raises(vggt_ros.CheckpointError):
        Reconstructor('no/such.pt')
    with pytest.raises(ValueError, match='expected images; run'):
        reconstructor.stream('drive.mcap')
    with pytest.raises(ValueError, match='image 1 is a NoneType'):
        list(reconstructor.stream([images[0], None]))
    with pytest.raises(ValueError, match='scale_source'):
        Reconstructor(device='cpu', scale_source='tf').stream(images)
    with pytest.raises(ValueError, match='scale_source'):
        Reconstructor(device='cpu', scale_source='tf').run(images)


def test_importing_the_package_loads_nothing() -> None:
    code = """
import sys
before = set(sys.modules)
import vggt_ros
loaded = {name.split('.')[0] for name in set(sys.modules) - before}
assert loaded - set(sys.stdlib_module_names) == {'vggt_ros'}, loaded
assert 'torch' not in sys.modules
assert [name for name in sys.modules if name.startswith('vggt_ros.')] == []
from vggt_ros import Frame
assert Frame.__module__ == 'vggt_ros.frames.frame'
"""
    subprocess.run([sys.executable, '-c', code], check=True)


def test_public_names_exist_and_others_do_not() -> None:
    for name in vggt_ros.__all__:
        assert getattr(vggt_ros, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Reconstruct'"):
        vggt_ros.Reconstruct  # noqa: B018
