# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs that somebody tampered with: one sentence each, and nothing outside touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_network import FakeNetwork
from recordings_made import write_images

from vggt_ros.io.recordings import open_frames
from vggt_ros.offline.state_file import read_state, write_state
from vggt_ros.settings import Settings

pytest.importorskip('pycolmap', reason='reconstruct needs vggt_ros[offline]')
pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')
from vggt_ros.offline.reconstruct import Reconstructed, ReconstructOptions, reconstruct_recording

IMAGES = 12
SETTINGS = Settings.from_flat(
    {'window_size': 4, 'window_stride': 2, 'min_parallax': 0.0, 'min_confidence': 0.0}
)
STATE, RECORD = 'state.safetensors', 'windows/000001.safetensors'
PICKLE = b"\x80\x04cos\nsystem\n(S'echo harm > ../outside/file'\ntR."

Tamper = Callable[[Path], None]  # changes a folder, whose neighbour `outside` is not its business


def reconstruct(folder: Path, stop_after: int = 0, **options: Any) -> Reconstructed:
    """Reconstruct the recording beside the folder."""
    processed = iter(range(1, IMAGES + 1))
    return reconstruct_recording(
        open_frames(str(folder.parent / 'recording')),
        FakeNetwork(),  # type: ignore[arg-type]
        SETTINGS,
        ReconstructOptions(**options),
        folder.with_name('map'),
        lambda _: None,
        lambda: next(processed) == stop_after,
    )


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory) -> Path:
    """A recording, a run that was stopped after two thirds, and files that are none of its."""
    root = tmp_path_factory.mktemp('hostile')
    random = np.random.default_rng(0)
    write_images(root / 'recording', random.integers(0, 200, (IMAGES, 48, 64, 3), np.uint8))
    assert not reconstruct(root / 'map.partial', 8).complete
    (root / 'outside' / 'below').mkdir(parents=True)
    (root / 'outside' / 'file').write_bytes(b'precious')
    (root / 'outside' / 'below' / 'file').write_bytes(b'precious')
    return root


@pytest.fixture
def folder(interrupted: Path, tmp_path: Path):
    shutil.copytree(interrupted, tmp_path / 'run')
    before = everything(tmp_path / 'run' / 'outside')
    yield tmp_path / 'run' / 'map.partial'
    assert everything(tmp_path / 'run' / 'outside') == before


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_mtime_ns, b'' if path.is_dir() else path.read_bytes())
        for path in [folder, *folder.rglob('*')]
    }


def written(name: str, data: bytes) -> Tamper:
    def tamper(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return tamper


def linked(name: str, target: str) -> Tamper:
    """Replace a file or folder by a link to something outside."""

    def tamper(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(folder.parent / 'outside' / target)

    return tamper


def moved(name: str) -> Tamper:
    """Move something away and leave a link to it: what it points to is right, but not inside."""

    def tamper(folder: Path) -> None:
        os.rename(folder / name, folder.parent / 'moved')
        (folder / name).symlink_to(folder.parent / 'moved')

    return tamper


def changed(name: str, change: Callable[[dict[str, Any]], object]) -> Tamper:
    def tamper(folder: Path) -> None:
        state = read_state(folder, name)
        change(state)
        write_state(folder, name, state)

    return tamper


def field(key: str, value: Any) -> Tamper:
    """Replace a field of a record."""
    return changed(RECORD, lambda state: state.update({key: value(state[key])}))


def without(name: str, *keys: str) -> Tamper:
    def remove(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return changed(name, remove)


def in_engine(path: str, value: Any) -> Tamper:
    """Replace a value in the state of the engine."""

    def change(state: dict[str, Any]) -> None:
        *parents, last = path.split('.')
        part = state['engine']
        for key in parents:
            part = part[int(key)] if isinstance(part, list) else part[key]
        part[last] = value(part[last]) if callable(value) else value

    return changed(STATE, change)


def with_nan(values: np.ndarray) -> np.ndarray:
    values.ravel()[-1] = np.nan
    return values


def header(size: int, text: bytes) -> bytes:
    return size.to_bytes(8, 'little') + text


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b'')


def as_link(folder: Path) -> None:
    os.rename(folder, folder.with_name('moved'))
    folder.symlink_to(folder.with_name('moved'))


def as_fifo(folder: Path) -> None:
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)


def without_run_file(folder: Path) -> None:
    (folder / 'run.json').unlink()


def with_other_source(folder: Path) -> None:
    run = json.loads((folder / 'run.json').read_text())
    (folder / 'run.json').write_text(json.dumps({**run, 'source': 'other', 'more': '<script>'}))


HUGE_HEADER = json.dumps(
    {
        '__metadata__': {'state': '{"a": {"$tensor": "a"}}'},
        'a': {'dtype': 'F32', 'shape': [10**12], 'data_offsets': [0, 4 * 10**12]},
    }
).encode()
HUGE_ARRAY = header(len(HUGE_HEADER), HUGE_HEADER)
CASES: dict[str, tuple[Tamper, str]] = {
    'the folder is a link': (as_link, r'map\.partial is a symbolic link; expected a folder'),
    'the folder is a file': (as_file, r'map\.partial is a file; expected a folder'),
    'run.json is missing': (without_run_file, r'has results but no run\.json'),
    'run.json is of another run': (with_other_source, 'is of a run with other source, more'),
    'run.json is a list': (written('run.json', b'[1]'), 'does not describe a run'),
    'run.json is deep': (written('run.json', b'[' * 100_000), 'does not describe a run'),
    'run.json is huge': (written('run.json', b' ' * (2 << 20)), 'expected at most 1048576'),
    'run.json is a link': (linked('run.json', 'file'), r'run\.json is a symbolic link'),
    'the state is a pickle': (written(STATE, PICKLE), 'state.safetensors cannot be read'),
    'the state is a link': (linked(STATE, 'file'), 'state.safetensors is a symbolic link'),
    'the state is a FIFO': (as_fifo, 'state.safetensors is no regular file'),
    'the state has a huge array': (written(STATE, HUGE_ARRAY), 'cannot be read: it is no safet'),
    'the state has a huge header': (written(STATE, header(2**60, b'{}')), 'header has 1152921504'),
    'the state has no index': (without(STATE, 'index'), 'has the index None; expected one of'),
    'the index is huge': (
        changed(STATE, lambda state: state.update(index=10**12)),
        'has the index 1000000000000; expected one of the 12 images',
    ),
    'the index is a float': (
        changed(STATE, lambda state: state.update(index=1.0)),
        'has the index 1.0; expected one of the 12 images',
    ),
    'the index is negative': (
        changed(STATE, lambda state: state.update(index=-1)),
        'has the index -1; expected one of the 12 images',
    ),
    'the state has no engine': (without(STATE, 'engine'), 'cannot be resumed: it has no state'),
    'the engine is a list': (
        changed(STATE, lambda state: state.update(engine=[])),
        'cannot be resumed: it has no state',
    ),
    'the engine is empty': (
        changed(STATE, lambda state: state.update(engine={})),
        'cannot be resumed: not a state',
    ),
    'the engine lacks its map': (without(STATE, 'engine', 'map'), 'missing .*`map`'),
    'the engine has a huge window': (in_engine('sliding_window.size', 10**12), 'of 1000000000000'),
    'the engine has a window of text': (in_engine('sliding_window.size', '4'), 'Expected `int`'),
    'the engine has a NaN scale': (in_engine('map.frames.scale', np.nan), 'scale is nan'),
    'the engine has NaN depth': (
        in_engine('map.frames.frames.7.depth', with_nan),
        'depth has values that are not finite',
    ),
    'the engine has depth of another shape': (
        in_engine('map.frames.frames.7.depth', lambda depth: depth.ravel()),
        'depth',
    ),
    'the engine has no images': (
        in_engine('sliding_window.frame_sets', lambda sets: [[{**sets[0][0], 'frame': None}]]),
        'Expected `object`, got `null`',
    ),
    'windows is a link': (linked('windows', 'below'), 'windows is a symbolic link'),
    'windows is a link to itself': (moved('windows'), 'windows is a symbolic link'),
    'images is a link': (linked('images', 'below'), 'images is a symbolic link'),
    'depth is a link': (linked('depth', 'below'), 'depth is a symbolic link'),
    'sparse is a link': (linked('sparse', 'below'), 'sparse is a symbolic link'),
    'a record is a link': (linked(RECORD, 'file'), 'is a symbolic link'),
    'a record is a link to itself': (moved(RECORD), 'is a symbolic link'),
    'a record is a pickle': (written(RECORD, PICKLE), '000001.safetensors cannot be read'),
    'a record has a huge array': (written(RECORD, HUGE_ARRAY), '000001.safetensors cannot be'),
    'a record lacks depth': (without(RECORD, 'point_depth'), 'missing .*`point_depth`'),
    'a record has NaN poses': (
        field('window_from_camera', with_nan),
        'window_from_camera has values that are not finite',
    ),
    'a record has NaN depth': (field('point_depth', with_nan), 'point_depth has values that are'),
    'a record has a NaN scale': (field('map_scale', lambda _: np.nan), 'map_scale is nan'),
    'a record has poses that are not rigid': (
        field('window_from_camera', lambda value: 2 * value),
        'window_from_camera is out of range',
    ),
    'a record has poses of another type': (
        field('window_from_camera', lambda value: value.astype(np.float32)),
        'array of float32, expected float64',
    ),
    'a record has other shapes': (
        field('window_from_camera', lambda value: value[:, :3]),
        r'window_from_camera is \(4, 3, 4\); expected \(4, 4, 4\)',
    ),
    'a record has text for a number': (field('map_id', str), 'Expected `int`, got `str`'),
    'a record has a huge map': (
        field('map_id', lambda _: 2**80),
        'map_id is 120892581961462',
    ),
    'a record has a negative map': (field('map_id', lambda _: -1), 'map_id is out of range'),
    'a record is of another window': (
        field('window_id', lambda _: 10**12),
        'of window 1000000000000',
    ),
    'a record has huge images': (
        field('network_size', lambda value: value * 10**12),
        'size of an image is out of range',
    ),
    'a record has pixels beyond': (
        field('point_pixels', lambda value: value + 10**6),
        'point_pixels is out of range',
    ),
    'a record has frames of no window': (
        field('point_frame_ids', lambda value: value + 10**12),
        'point_frame_ids is out of range',
    ),
    'a record has frames in disorder': (
        field('frame_ids', lambda value: value[::-1]),
        'frame_ids is out of range',
    ),
    'a record has a singular camera': (
        field('intrinsics', lambda value: 0 * value),
        'intrinsics is out of range',
    ),
    'a record has a transform of another shape': (
        field('map_from_window', lambda value: {**value, 'rotation': np.eye(4)}),
        'map_from_window',
    ),
    'a depth image is a link': (
        linked('depth/000000.png', 'file'),
        r'000000\.png is a symbolic link',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_a_folder_that_was_tampered_with_is_rejected_in_one_sentence(
    case: str, folder: Path
) -> None:
    tamper, expected = CASES[case]
    tamper(folder)
    with pytest.raises(ValueError, match=expected) as error:
        reconstruct(folder)
    assert '\n' not in str(error.value)
    assert not folder.with_name('map').exists()


@pytest.mark.parametrize('restart', [False, True])
def test_links_in_the_folder_are_replaced_by_files(restart: bool, folder: Path) -> None:
    names = ['images/000009.jpg', 'depth/000009.png.partial', 'cloud.ply', 'scene.glb.partial']
    names += ['trajectory.tum', 'report.html', 'reconstruction.json', f'{STATE}.partial']
    for name in names:
        linked(name, 'file')(folder)
    for name in ('other_maps', 'other'):
        linked(name, 'below')(folder)
    result = reconstruct(folder, restart=restart)
    assert result.complete and (result.resumed_at == 0) == restart
    for name in names:
        path = result.folder / name
        assert not path.is_symlink() and path.exists() == (not name.endswith('.partial'))


def test_links_in_a_folder_that_is_overwritten_are_not_followed(folder: Path) -> None:
    output = folder.with_name('map')
    shutil.copytree(folder, output)
    linked('cloud.ply', 'file')(output)
    linked('images', 'below')(output)
    assert reconstruct(folder, overwrite=True).complete
    assert (output / 'images').is_dir() and not (output / 'images').is_symlink()
    shutil.rmtree(output)
    output.symlink_to(folder.with_name('outside'))
    with pytest.raises(ValueError, match='map is a symbolic link; expected a folder'):
        reconstruct(folder, overwrite=True)
    shutil.copytree(folder.with_name('outside'), folder)
    folder.rename(folder.with_name('moved'))
    folder.symlink_to(folder.with_name('outside'))
    output.unlink()
    with pytest.raises(ValueError, match=r'map\.partial is a symbolic link; expected a folder'):
        reconstruct(folder, restart=True)


def test_the_command_reports_it_in_one_line_and_exits_with_2(folder: Path) -> None:
    command = [sys.executable, '-m', 'vggt_ros.cli.reconstruct', str(folder.parent / 'recording')]
    command += ['--output', str(folder.with_name('map')), '--device', 'cpu']
    command += ['--checkpoint', 'embedded', '--min-parallax', '0']
    shutil.rmtree(folder)
    folder.mkdir()
    linked('images', 'below')(folder)
    for expected in ('images is a symbolic link', 'state.safetensors cannot be read'):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and 'Traceback' not in ended.stderr
        last = ended.stderr.splitlines()[-1]
        assert last.startswith('reconstruct: ') and expected in last
        (folder / 'images').unlink(missing_ok=True)
        (folder / STATE).write_bytes(PICKLE)
