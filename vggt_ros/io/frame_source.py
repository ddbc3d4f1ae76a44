# SPDX-License-Identifier: Apache-2.0
"""What all recorded inputs have in common: images of a folder, a video or a bag, in time order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from vggt_ros.frames.frame import Frame
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

IMAGE_RATE = 10.0  # images per second where files have no stamps
CAMERA_FRAME = 'camera'  # frame id of the camera where files name none


class FrameSource(Protocol):
    """Images of one camera in time order; they can be read more than once."""

    name: str
    count: int | None  # images, unreadable ones included; None: unknown until the end
    unreadable: list[str]  # images that were skipped, with the reason

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """
        Read the images from an index on.

        :param start: index of the first image; earlier ones are skipped without decoding.
        :returns: indices, which increase, and frames; unreadable images are missing.
        """
        ...

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """
        Make the metric scale source, which knows what has been read so far.

        :raises ValueError: if the settings require messages that the recording does not have.
        """
        ...


def reject_scale_source(kind: str, settings: ScaleSettings) -> None:
    """
    Check that the metric scale needs no messages.

    :param kind: of the recording, for the error.
    :raises ValueError: if it does.
    """
    if settings.scale_source not in ('none', 'fixed'):
        raise ValueError(
            f'scale_source is {settings.scale_source!r}, but {kind} has no such messages; '
            "expected 'none' or 'fixed'"
        )
