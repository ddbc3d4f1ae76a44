# SPDX-License-Identifier: Apache-2.0
"""Images in memory, with or without stamps, as frames of one camera."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.io.frame_source import CAMERA_FRAME, reject_scale_source
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

Image = npt.NDArray[np.uint8]  # (H, W, 3), RGB

_MIN_RATE, _MAX_RATE = 1e-3, 1e6  # images per second: their stamps stay apart and in 64 bits
_MAX_STAMP_NS = 2**62


class ArrayFrames:
    """A list of images of one size; see `FrameSource`."""

    def __init__(
        self,
        images: Iterable[Image | Frame],
        rate: float,
        stamps_ns: Sequence[int] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """
        Check all images.

        :param rate: see `frames_from_images`, as the others.
        :raises ValueError: if there are none, they differ in size, or the stamps do not increase.
        """
        self.name = 'images'
        self.unreadable: list[str] = []
        self._frames = list(frames_from_images(images, rate, stamps_ns, calibration))
        self.count: int | None = len(self._frames)
        if not self._frames:
            raise ValueError('found no images; expected at least two')
        for one, two in pairwise(self._frames):
            if one.image.shape != two.image.shape:
                raise ValueError(
                    f'images have shapes {one.image.shape} and {two.image.shape}; expected images '
                    'of one size'
                )
            if two.stamp_ns <= one.stamp_ns:
                raise ValueError(
                    f'the stamp {two.stamp_ns} follows {one.stamp_ns}; expected increasing stamps'
                )

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """Return the images; see `FrameSource`."""
        yield from enumerate(self._frames[start:], start)

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """Return None; see `FrameSource`."""
        reject_scale_source('a list of images', settings)
        return None


def _check_stamps(stamps_ns: Iterable[int]) -> list[int]:
    stamps = list(stamps_ns)
    for stamp in stamps:
        if not isinstance(stamp, (int, np.integer)) or not 0 <= stamp <= _MAX_STAMP_NS:
            raise ValueError(f'a stamp is {stamp!r}, expected nanoseconds as an integer from 0')
    return [int(stamp) for stamp in stamps]


def frames_from_images(
    images: Iterable[Image | Frame],
    rate: float,
    stamps_ns: Sequence[int] | None = None,
    calibration: Calibration | None = None,
) -> Iterator[Frame]:
    """
    Make frames of images; frames are passed on as they are.

    :param images: (H, W, 3), RGB, uint8.
    :param rate: images per second, if there are no stamps; they are then counted from 0.
    :param stamps_ns: acquisition times.
    :param calibration: of the camera.
    :raises ValueError: for anything else, or a number of stamps other than that of the images.
    """
    if not isinstance(images, Iterable):
        raise ValueError(f'found a {type(images).__name__}, expected images')
    if not (isinstance(rate, (int, float)) and _MIN_RATE <= rate <= _MAX_RATE):
        raise ValueError(f'rate is {rate!r}, expected {_MIN_RATE:g} to {_MAX_RATE:g} per second')
    if stamps_ns is not None:
        stamps_ns = _check_stamps(stamps_ns)
    step_ns = round(1e9 / rate)
    count = 0
    for i, image in enumerate(images):
        count += 1
        if isinstance(image, Frame):
            yield image
            continue
        if not isinstance(image, np.ndarray):
            raise ValueError(
                f'image {i} is a {type(image).__name__}, expected an array (H, W, 3) or a Frame'
            )
        if stamps_ns is None:
            stamp_ns = i * step_ns
        elif i < len(stamps_ns):
            stamp_ns = stamps_ns[i]
        else:
            break
        yield Frame(image, stamp_ns, CAMERA_FRAME, calibration)
    if stamps_ns is not None and count != len(stamps_ns):
        raise ValueError(f'found {len(stamps_ns)} stamps, expected one for each of the images')
