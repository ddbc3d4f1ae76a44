# SPDX-License-Identifier: Apache-2.0
"""
Where pictures come from that have been taken already: a folder, a video or a bag.

What the kinds have in common; each has a module of its own, and `open_frames` tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from vggt_ros.frames.frame import Frame
from vggt_ros.mapping.metric_scale import ScaleSource
from vggt_ros.settings import ScaleSettings

BAG_FILES = ('.mcap', '.db3')
VIDEO_FILES = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
RATE = 10.0  # pictures of a folder in a second: files do not say when they were taken


class FrameSource(Protocol):
    """Pictures in the order of time; they may be read several times."""

    name: str
    count: int | None  # pictures, unreadable ones too; None: unknown before the end
    unreadable: list[str]  # pictures that were left out, and why

    def frames(self, start: int = 0) -> Iterator[tuple[int, Frame]]:
        """
        Read from one picture on.

        :param start: place of the first one; those before are passed over without being decoded.
        :returns: pictures with their places, which rise; of unreadable ones there is none.
        """
        ...

    def scale_source(self, settings: ScaleSettings) -> ScaleSource | None:
        """
        Give what knows metres, as far as has been read.

        :raises ValueError: if the settings ask for something that this kind does not have.
        """
        ...


def refuse_scale(kind: str, settings: ScaleSettings) -> None:
    """
    Let pass what needs nothing from outside.

    :raises ValueError: if `scale_source` asks for messages.
    """
    if settings.scale_source not in ('none', 'fixed'):
        raise ValueError(
            f'scale_source is {settings.scale_source!r}, but {kind} has no such messages; '
            "expected 'none' or 'fixed'"
        )


def open_frames(where: str, image_topic: str = '', rate: float = RATE) -> FrameSource:
    """
    Recognise a bag, a video, or pictures in a folder or by a pattern such as `shots/*.png`.

    :param image_topic: of a bag with several image topics.
    :param rate: pictures of a folder in a second.
    :raises ValueError: if it is none of them, or there is nothing in it that can be read.
    """
    path = Path(where)
    if path.suffix.lower() in BAG_FILES or (path / 'metadata.yaml').exists():
        from vggt_ros.io.bag_frames import BagFrames  # only this format needs rosbags

        return BagFrames(path, image_topic)
    if path.suffix.lower() in VIDEO_FILES:
        from vggt_ros.io.video_frames import VideoFrames

        return VideoFrames(path)
    from vggt_ros.io.folder_frames import FolderFrames

    return FolderFrames(where, rate)
