# SPDX-License-Identifier: Apache-2.0
"""
Files below an output folder, read and written without leaving it.

The folder may come from elsewhere. Every component below it is opened relative to its parent and
without following symbolic links, only regular files are read, and never more than a limit. A file
is written beside its name and then renamed (atomic write): it is complete or absent, and what was
at its name is replaced, not written through.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = '.partial'  # suffix of what is incomplete
MAX_FILE = 1 << 30  # bytes
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO is opened, and then rejected, instead of waited for
_READ = os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def open_file(folder: Path, name: str, limit: int = MAX_FILE) -> Iterator[BinaryIO]:
    """
    Open a regular file for reading.

    :param name: relative to the folder, with `/`.
    :raises ValueError: if it is anything else, larger than the limit, or its path has a link.
    :raises FileNotFoundError: if there is none.
    """
    path = folder / name
    *parents, last = name.split('/')
    with _open_folder(folder, parents) as parent:

        def opener(_: str, flags: int) -> int:
            return os.open(last, flags | _READ, dir_fd=parent)

        _check_entry(path, parent, last)
        try:
            file = open(path, 'rb', opener=opener)  # noqa: SIM115 its errors alone are caught
        except IsADirectoryError as error:
            raise ValueError(f'{path} is a folder; expected a file') from error
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f'{path} is no regular file')
            if status.st_size > limit:
                raise ValueError(f'{path} has {status.st_size} bytes; expected at most {limit}')
            yield file


def read_file(folder: Path, name: str, limit: int = MAX_FILE) -> bytes:
    """Read a regular file; parameters and errors as of `open_file`."""
    with open_file(folder, name, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown since
        raise ValueError(f'{folder / name} has more than {limit} bytes')
    return data


def has_file(folder: Path, name: str) -> bool:
    """
    Check whether there is a file of this name.

    :raises ValueError: if it is anything but a regular file, or its path has a link.
    """
    *parents, last = name.split('/')
    try:
        with _open_folder(folder, parents) as parent:
            _check_entry(folder / name, parent, last)
            mode = os.lstat(last, dir_fd=parent).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise ValueError(f'{folder / name} is no regular file')
    return True


def list_files(folder: Path, subfolder: str, suffix: str) -> list[str]:
    """
    List names, relative to the folder and sorted, of what a subfolder contains.

    :raises ValueError: if the subfolder is a link or no folder.
    """
    try:
        with _open_folder(folder, [subfolder]) as parent:
            names = os.listdir(parent)
    except FileNotFoundError:
        return []
    return sorted(f'{subfolder}/{each}' for each in names if each.endswith(suffix))


@contextmanager
def file_writer(folder: Path, name: str) -> Iterator[BinaryIO]:
    """
    Open a new file that gets its name when all of it is written; missing parents are made.

    :param name: relative to the folder, with `/`.
    :raises ValueError: if the path has a link or a file in place of a folder, or ends at a folder.
    """
    path = folder / name
    *parents, last = name.split('/')
    incomplete = last + PARTIAL
    with _open_folder(folder, parents, make=True) as parent:
        with suppress(FileNotFoundError):
            os.unlink(incomplete, dir_fd=parent)
        descriptor = os.open(incomplete, _NEW_FILE, 0o666, dir_fd=parent)
        try:
            with open(descriptor, 'wb') as file:
                yield file
            os.replace(incomplete, last, src_dir_fd=parent, dst_dir_fd=parent)
        except IsADirectoryError as error:
            raise ValueError(f'{path} is a folder; expected a file') from error
        finally:
            with suppress(FileNotFoundError):
                os.unlink(incomplete, dir_fd=parent)


def write_file(folder: Path, name: str, data: bytes) -> None:
    """Write a file atomically; parameters and errors as of `file_writer`."""
    with file_writer(folder, name) as file:
        file.write(data)


def check_folder(folder: Path) -> None:
    """:raises ValueError: if something other than a folder, such as a link, has its name."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = 'a symbolic link' if folder.is_symlink() else 'a file'
        raise ValueError(f'{folder} is {kind}; expected a folder')


def remove_folder(folder: Path) -> None:
    """
    Remove a folder, if there is one; links in it are removed, not what they point to.

    :raises ValueError: if it is a link or a file.
    """
    check_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _open_folder(folder: Path, parents: list[str], make: bool = False) -> Iterator[int]:
    """Give a descriptor of a folder below another."""
    check_folder(folder)
    descriptor = os.open(folder, _FOLDER)
    try:
        path = folder
        for name in parents:
            path /= name
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
            _check_entry(path, descriptor, name)
            try:
                below = os.open(name, _FOLDER, dir_fd=descriptor)
            except NotADirectoryError as error:
                raise ValueError(f'{path} is a file; expected a folder') from error
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _check_entry(path: Path, parent: int, name: str) -> None:
    """Reject a link with a clear message; one that appears later is not followed either."""
    if name in ('', '.', '..'):
        raise ValueError(f'{path} is no name of a file below its folder')
    if stat.S_ISLNK(os.lstat(name, dir_fd=parent).st_mode):
        raise ValueError(f'{path} is a symbolic link; expected a file or folder of its own')
