# SPDX-License-Identifier: Apache-2.0
"""State files: everything a state may contain is kept, and no other file does any harm."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import pytest

from vggt_ros.offline.folder_files import (
    file_writer,
    has_file,
    list_files,
    open_file,
    read_file,
    remove_folder,
    write_file,
)
from vggt_ros.offline.state_file import decode_state, encode_state, read_state, write_state

STATE = {
    'numbers': [1, -(2**62), 0.1, True, None, 'text ☃'],
    'nested': {'a': {'b': [{}, [], {'c': np.arange(6, dtype=np.int32).reshape(2, 3)}]}},
    'images': [np.zeros((2, 3, 3), np.uint8), np.ones((0, 4), np.float32)],
    'flag': np.array([True, False]),
    'scalar': np.array(3.5),
    'strided': np.arange(12.0).reshape(3, 4).T[::2],
    'not finite': [math.inf, -math.inf, np.array([np.nan, np.inf])],
}


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected, equal_nan=expected.dtype.kind == 'f')
        assert found.flags.writeable and found.flags.c_contiguous
    else:
        assert found == expected


def test_a_state_is_read_as_it_was_written(tmp_path) -> None:
    write_state(tmp_path, 'below/state', STATE)
    assert_same(read_state(tmp_path, 'below/state'), STATE)
    assert math.isnan(decode_state(encode_state({'nan': math.nan}))['nan'])
    assert os.listdir(tmp_path / 'below') == ['state']


@pytest.mark.parametrize(
    'value',
    [
        np.array([object()]),
        np.array([1j]),
        np.array(['text']),
        (1, 2),
        {1: 2},
        {'$tensor': 'a'},
        {1, 2},
        np.float64(1),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_state_cannot_contain_anything_else(value: Any) -> None:
    with pytest.raises(TypeError, match=r'^key/0 '):
        encode_state({'key': [value]})


def with_header(header: Any, data: bytes = b'') -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data


def with_tree(tree: Any, tensors: dict[str, Any] | None = None, data: bytes = b'') -> bytes:
    return with_header({'__metadata__': {'state': json.dumps(tree)}, **(tensors or {})}, data)


FLOATS = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
REFERENCE = {'a': {'$tensor': 'a'}}
HUGE = {**FLOATS, 'shape': [10**12]}
MALFORMED = {
    'empty': b'',
    'text': b'no state',
    'pickle': b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    'zip, as an npz': b'PK\x03\x04' + bytes(100),
    'huge header': (2**63).to_bytes(8, 'little') + b'{}',
    'long header': (2**26).to_bytes(8, 'little') + b'{}',
    'no metadata': with_header({}),
    'other metadata': with_header({'__metadata__': {'format': 'np'}}),
    'metadata of another type': with_header({'__metadata__': ['state']}),
    'no JSON': with_header({'__metadata__': {'state': 'state'}}),
    'a list': with_tree([]),
    'a number': with_tree(1),
    'deep JSON': with_header({'__metadata__': {'state': '[' * 100_000}}),
    'deep tree': with_header({'__metadata__': {'state': '{"a":' * 900 + '1' + '}' * 900}}),
    'huge array': with_tree(REFERENCE, {'a': HUGE}, bytes(8)),
    'huge array with offsets': with_tree(
        REFERENCE, {'a': {**HUGE, 'data_offsets': [0, 4 * 10**12]}}, bytes(8)
    ),
    'overflow': with_tree(REFERENCE, {'a': {**FLOATS, 'shape': [2**62, 2**62]}}, bytes(8)),
    'negative shape': with_tree(REFERENCE, {'a': {**FLOATS, 'shape': [-2]}}, bytes(8)),
    'overlap': with_tree(
        {**REFERENCE, 'b': {'$tensor': 'b'}}, {'a': FLOATS, 'b': FLOATS}, bytes(8)
    ),
    'missing tensor': with_tree({'a': {'$tensor': 'b'}}, {'a': FLOATS}, bytes(8)),
    'unused tensor': with_tree({}, {'a': FLOATS}, bytes(8)),
    'tensor twice': with_tree({**REFERENCE, 'b': REFERENCE}, {'a': FLOATS}, bytes(8)),
    'reference with more': with_tree({'a': {'$tensor': 'a', 'b': 1}}, {'a': FLOATS}, bytes(8)),
    'reference of another type': with_tree({'a': {'$tensor': ['a']}}, {'a': FLOATS}, bytes(8)),
    'other dtype': with_tree(REFERENCE, {'a': {**FLOATS, 'dtype': 'C64', 'shape': [1]}}, bytes(8)),
    'unknown dtype': with_tree(
        REFERENCE, {'a': {**FLOATS, 'dtype': 'O8', 'shape': [1]}}, bytes(8)
    ),
    'bfloat16': with_tree(REFERENCE, {'a': {**FLOATS, 'dtype': 'BF16', 'shape': [4]}}, bytes(8)),
    'more data': with_tree(REFERENCE, {'a': FLOATS}, bytes(9)),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_file_is_rejected_in_one_line(name: str, tmp_path) -> None:
    (tmp_path / 'state').write_bytes(MALFORMED[name])
    with pytest.raises(ValueError, match='state cannot be read: ') as error:
        read_state(tmp_path, 'state')
    assert str(tmp_path / 'state') in str(error.value) and '\n' not in str(error.value)


def test_a_damaged_file_is_rejected_or_a_state() -> None:
    data = encode_state(STATE)
    random = np.random.default_rng(0)
    rejected = 0
    for i in range(2000):
        damaged = bytearray(data[: random.integers(len(data))] if i % 3 == 0 else data)
        for at in random.integers(0, max(len(damaged), 1), i % 4):
            if damaged:
                damaged[at] = random.integers(256)
        try:
            assert isinstance(decode_state(bytes(damaged)), dict)
        except ValueError:
            rejected += 1
    assert rejected > 1000


@pytest.fixture
def folder(tmp_path):
    """A folder beside one that must not be touched."""
    (tmp_path / 'outside').mkdir()
    (tmp_path / 'outside' / 'file').write_bytes(b'precious')
    (tmp_path / 'folder').mkdir()
    yield tmp_path / 'folder'
    assert os.listdir(tmp_path / 'outside') == ['file']
    assert (tmp_path / 'outside' / 'file').read_bytes() == b'precious'


def test_links_are_not_followed_for_reading(folder) -> None:
    (folder / 'file').symlink_to('../outside/file')
    (folder / 'below').symlink_to('../outside')
    for name in ('file', 'below/file'):
        with pytest.raises(ValueError, match='is a symbolic link'):
            read_file(folder, name)
        with pytest.raises(ValueError, match='is a symbolic link'):
            has_file(folder, name)
    with pytest.raises(ValueError, match='below is a symbolic link'):
        list_files(folder, 'below', '')
    (folder.parent / 'link').symlink_to(folder)
    with pytest.raises(ValueError, match='link is a symbolic link; expected a folder'):
        read_file(folder.parent / 'link', 'other')


def test_links_are_not_followed_for_writing(folder) -> None:
    for name in ('file', 'file.partial', 'dangling'):
        (folder / name).symlink_to('../outside/' + name)
    for name in ('file', 'dangling'):
        write_file(folder, name, b'new')
        assert (folder / name).read_bytes() == b'new' and not (folder / name).is_symlink()
    os.link(folder.parent / 'outside' / 'file', folder / 'hard')
    write_file(folder, 'hard', b'new')
    (folder / 'below').symlink_to('../outside')
    with pytest.raises(ValueError, match='below is a symbolic link'):
        write_file(folder, 'below/file', b'new')
    with pytest.raises(ValueError, match='is no name of a file below its folder'):
        write_file(folder, '../outside/file', b'new')


def test_only_regular_files_of_limited_size_are_read(folder) -> None:
    os.mkfifo(folder / 'fifo')  # would block
    (folder / 'below').mkdir()
    for name in ('fifo', 'below'):
        with pytest.raises(ValueError, match=r'is no regular file|is a folder'):
            read_file(folder, name)
        with pytest.raises(ValueError, match='is no regular file'):
            has_file(folder, name)
    with (folder / 'large').open('wb') as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(ValueError, match='has 1000000000000 bytes; expected at most 100'):
        read_file(folder, 'large', 100)
    with pytest.raises(FileNotFoundError):
        read_file(folder, 'missing')
    assert not has_file(folder, 'missing') and not has_file(folder, 'missing/file')
    write_file(folder, 'new/file', b'text')
    assert has_file(folder, 'new/file')
    with open_file(folder, 'new/file') as file:
        assert file.read() == b'text' and file.name == str(folder / 'new' / 'file')
    with pytest.raises(ValueError, match='file is a file; expected a folder'):
        read_file(folder, 'new/file/more')
    with pytest.raises(ValueError, match='new is a folder; expected a file'):
        write_file(folder, 'new', b'text')


def test_a_file_that_is_not_written_completely_is_not_there(folder) -> None:
    write_file(folder, 'file', b'old')

    def write_half() -> None:
        with file_writer(folder, 'file') as file:
            file.write(b'ne')
            raise OSError('the disk is full')

    with pytest.raises(OSError, match='the disk is full'):
        write_half()
    assert (folder / 'file').read_bytes() == b'old' and os.listdir(folder) == ['file']


def test_a_removed_folder_leaves_what_its_links_point_to(folder) -> None:
    (folder / 'below').symlink_to('../outside')
    (folder / 'file').symlink_to('../outside/file')
    (folder.parent / 'link').symlink_to(folder)
    with pytest.raises(ValueError, match='link is a symbolic link'):
        remove_folder(folder.parent / 'link')
    remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)
