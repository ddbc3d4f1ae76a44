# SPDX-License-Identifier: Apache-2.0
"""Image files of a folder or a pattern, in natural order: img2 comes before img10."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vggt_ros.frames.frame import Frame
from vggt_ros.io.frame_source import CAMERA_FRAME, reject_scale_source
from vggt_ros.io.images import read_image
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm')

logger = logging.getLogger(__name__)


class FolderFrames:
    """Image files as frames of one camera; see `FrameSource`."""

    def __init__(self, where: str, rate: float) -> None:
        """
        List the files.

        :param where: a folder, or a pattern.
        :param rate: images per second; stamps are counted from 0.
        :raises ValueError: if there are no images, or they differ in size.
        """
        path = Path(where)
        if path.is_dir():
            found = [each for each in path.iterdir() if each.suffix.lower() in _SUFFIXES]
        else:
            found = [Path(each) for each in glob.glob(where) if Path(each).is_file()]
        if not found:
            expected = (
                ', '.join(_SUFFIXES) if path.is_dir() else 'a bag, a video, a folder or files'
            )
            raise ValueError(f'{where}: found no images; expected {expected}')
        self.name = path.resolve().name if path.is_dir() else path.resolve().parent.name
        self.unreadable: list[str] = []
        self._files = sorted(found, key=_natural_order)
        self.count: int | None = len(self._files)
        self._step_ns = round(1e9 / rate)
        self._check_sizes()

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Read the files; see `FrameSource`."""
        for i, path in enumerate(self._files[start:], start):
            try:
                image = read_image(path)
            except ValueError as error:
                logger.warning('skipped: %s', error)
                self.unreadable.append(str(error))
                continue
            yield i, Frame(image, i * self._step_ns, CAMERA_FRAME)

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Return None; see `FrameSource`."""
        reject_scale_source('a folder of images', settings)
        return None

    def _check_sizes(self) -> None:
        """Compare all headers, at 0.1 ms each; a file without one is reported when it is read."""
        first: tuple[Path, tuple[int, int]] | None = None
        for path in self._files:
            try:
                with Image.open(path) as image:
                    size = image.size
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                continue
            first = first or (path, size)
            if size != first[1]:
                raise ValueError(
                    f'{path.name} has {size[0]}x{size[1]} pixels and {first[0].name} '
                    f'{first[1][0]}x{first[1][1]}; expected images of one size'
                )
        if first is None:
            raise ValueError(
                f'{self.name}: none of {len(self._files)} files can be read as an image'
            )


def _natural_order(path: Path) -> list[tuple[int, int | str]]:
    parts = re.split(r'(\d+)', path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]
