# SPDX-License-Identifier: Apache-2.0
"""Video files, as OpenCV reads them; a rotation that a phone noted in the file is applied."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from vggt_ros.frames.frame import Frame
from vggt_ros.io.frame_source import RATE, refuse_scale
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

logger = logging.getLogger(__name__)


class VideoFrames:
    """A video as frames of one camera; see `FrameSource`."""

    def __init__(self, path: Path) -> None:
        """
        Look into the file.

        :raises ValueError: if it is not there or is no video that OpenCV can read.
        """
        if not path.is_file():
            raise ValueError(f'{path}: there is no such file; expected a video')
        video = self._open(path)
        told = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.release()
        self.name = path.name
        self.count: int | None = told if told > 0 else None
        self.unreadable: list[str] = []
        self._path = path

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Decode the pictures; see `FrameSource`. Stamps are those of the file."""
        video = self._open(self._path)
        rate = video.get(cv2.CAP_PROP_FPS)
        step_ns = round(1e9 / (rate if rate > 0 else RATE))
        last_ns = -1
        place = 0
        try:
            while video.grab():
                if place >= start:
                    told = round(video.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
                    # some containers tell no time, or the same again
                    stamp_ns = told if told > last_ns else last_ns + step_ns
                    last_ns = stamp_ns
                    there, image = video.retrieve()
                    if there:
                        pixels = np.ascontiguousarray(image[..., ::-1], np.uint8)
                        yield place, Frame(pixels, stamp_ns, 'camera')
                    else:
                        self._leave_out(f'picture {place} cannot be decoded')
                place += 1
        finally:
            video.release()
        if self.count is not None and place < self.count:
            self._leave_out(f'the file promises {self.count} pictures, {place} could be read')

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Give nothing; see `FrameSource`."""
        refuse_scale('a video', settings)
        return None

    def _leave_out(self, sentence: str) -> None:
        self.unreadable.append(f'{self.name}: {sentence}')
        logger.warning('%s: %s', self.name, sentence)

    @staticmethod
    def _open(path: Path) -> cv2.VideoCapture:
        video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not video.isOpened():
            raise ValueError(f'{path} cannot be read as a video')
        return video
