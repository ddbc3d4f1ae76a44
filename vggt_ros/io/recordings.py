# SPDX-License-Identifier: Apache-2.0
"""Opens a recording with truth, whatever its format."""

from __future__ import annotations

from pathlib import Path

from vggt_ros.io.euroc import EurocRecording
from vggt_ros.io.frame_source import BAG_FILES
from vggt_ros.io.rgbd import RgbdRecording
from vggt_ros.io.seven_scenes import SevenScenesRecording
from vggt_ros.io.tum_rgbd import TumRecording


def open_recording(path: Path) -> RgbdRecording:
    """
    Recognise a TUM RGB-D sequence, one of 7-Scenes or EuRoC, or a bag.

    :raises ValueError: if it is none of them, or not a whole one.
    """
    if path.suffix in BAG_FILES or (path / 'metadata.yaml').exists():
        from vggt_ros.io.rgbd_bag import BagRecording  # only this format needs rosbags

        return BagRecording(path)
    if (path / 'rgb.txt').exists():
        return TumRecording(path)
    if any(path.glob('frame-*.pose.txt')):
        return SevenScenesRecording(path)
    if (path / 'mav0').is_dir():
        return EurocRecording(path)
    raise ValueError(
        f'{path} is no recording with truth; expected a folder with rgb.txt (TUM RGB-D), with '
        'frame-*.pose.txt (7-Scenes), with mav0 (EuRoC), or a bag'
    )
