# SPDX-License-Identifier: Apache-2.0
"""Video files, decoded by OpenCV, which applies a rotation stored in the file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from vggt_ros.frames.frame import Frame
from vggt_ros.io.frame_source import CAMERA_FRAME, IMAGE_RATE, reject_scale_source
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

logger = logging.getLogger(__name__)


class VideoFrames:
    """A video as frames of one camera; see `FrameSource`."""

    def __init__(self, path: Path) -> None:
        """
        Open the file once.

        :raises ValueError: if it does not exist or is no video that OpenCV can decode.
        """
        if not path.is_file():
            raise ValueError(f'{path}: there is no such file; expected a video')
        video = self._open(path)
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        video.release()
        self.name = path.name
        self.count: int | None = count if count > 0 else None
        self.unreadable: list[str] = []
        self._path = path

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Decode the images, with the stamps of the file; see `FrameSource`."""
        video = self._open(self._path)
        rate = video.get(cv2.CAP_PROP_FPS)
        step_ns = round(1e9 / (rate if rate > 0 else IMAGE_RATE))
        last_ns = -1
        index = 0
        try:
            while video.grab():
                if index >= start:
                    position_ns = round(video.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
                    # some containers have no stamps, or repeat them
                    stamp_ns = position_ns if position_ns > last_ns else last_ns + step_ns
                    last_ns = stamp_ns
                    decoded, image = video.retrieve()
                    if decoded:
                        pixels = np.ascontiguousarray(image[..., ::-1], np.uint8)
                        yield index, Frame(pixels, stamp_ns, CAMERA_FRAME)
                    else:
                        self._report_unreadable(f'image {index} cannot be decoded')
                index += 1
        finally:
            video.release()
        if self.count is not None and index < self.count:
            self._report_unreadable(f'{index} of {self.count} images could be read')

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Return None; see `FrameSource`."""
        reject_scale_source('a video', settings)
        return None

    def _report_unreadable(self, text: str) -> None:
        self.unreadable.append(f'{self.name}: {text}')
        logger.warning('%s: %s', self.name, text)

    @staticmethod
    def _open(path: Path) -> cv2.VideoCapture:
        video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not video.isOpened():
            raise ValueError(f'{path} cannot be read as a video')
        return video
