# SPDX-License-Identifier: Apache-2.0
"""Pictures in a folder, or those that a pattern names, in the order in which people count."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vggt_ros.frames.frame import Frame
from vggt_ros.io.frame_source import refuse_scale
from vggt_ros.io.images import read_image
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

PICTURES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.ppm')

logger = logging.getLogger(__name__)


class FolderFrames:
    """Picture files as frames of one camera; see `FrameSource`."""

    def __init__(self, where: str, rate: float) -> None:
        """
        List the files.

        :param where: a folder, or a pattern.
        :param rate: pictures in a second: their stamps are counted from 0.
        :raises ValueError: if there are no pictures, or they have several sizes.
        """
        path = Path(where)
        if path.is_dir():
            found = [each for each in path.iterdir() if each.suffix.lower() in PICTURES]
        else:
            found = [Path(each) for each in glob.glob(where) if Path(each).is_file()]
        if not found:
            wanted = ', '.join(PICTURES) if path.is_dir() else 'a bag, a video, a folder, files'
            raise ValueError(f'{where}: found no pictures; expected {wanted}')
        self.name = path.resolve().name if path.is_dir() else path.resolve().parent.name
        self.unreadable: list[str] = []
        self._files = sorted(found, key=_counting_order)
        self.count: int | None = len(self._files)
        self._step_ns = round(1e9 / rate)
        self._check_sizes()

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Read the files; see `FrameSource`."""
        for i, path in enumerate(self._files[start:], start):
            try:
                image = read_image(path)
            except ValueError as error:
                logger.warning('left out: %s', error)
                self.unreadable.append(str(error))
                continue
            yield i, Frame(image, i * self._step_ns, 'camera')

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Give nothing; see `FrameSource`."""
        refuse_scale('a folder of pictures', settings)
        return None

    def _check_sizes(self) -> None:
        """Look at all headers, which takes 0.1 ms each; what has none is met again later."""
        first: tuple[Path, tuple[int, int]] | None = None
        for path in self._files:
            try:
                with Image.open(path) as image:
                    size = image.size
            except (OSError, UnidentifiedImageError):
                continue
            first = first or (path, size)
            if size != first[1]:
                raise ValueError(
                    f'{path.name} has {size[0]}x{size[1]} pixels and {first[0].name} '
                    f'{first[1][0]}x{first[1][1]}; expected pictures of one size'
                )
        if first is None:
            raise ValueError(
                f'{self.name}: none of {len(self._files)} files can be read as a picture'
            )


def _counting_order(path: Path) -> list[tuple[int, int | str]]:
    """Sort img2 before img10."""
    parts = re.split(r'(\d+)', path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]
