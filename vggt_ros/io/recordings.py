# SPDX-License-Identifier: Apache-2.0
"""Opens a recording, whatever its format: `open_frames` images, `open_recording` ground truth."""

from __future__ import annotations

from pathlib import Path

from vggt_ros.io.euroc import EurocRecording
from vggt_ros.io.folder_frames import FolderFrames
from vggt_ros.io.frame_source import IMAGE_RATE, FrameSource
from vggt_ros.io.names import ODOM_FRAME
from vggt_ros.io.rgbd import RgbdRecording
from vggt_ros.io.seven_scenes import SevenScenesRecording
from vggt_ros.io.tum_rgbd import TumRecording
from vggt_ros.io.video_frames import VideoFrames

_BAG_SUFFIXES = ('.mcap', '.db3')
_VIDEO_SUFFIXES = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')


def open_frames(
    where: str, image_topic: str = '', rate: float = IMAGE_RATE, odom_frame: str = ODOM_FRAME
) -> FrameSource:
    """
    Open a bag, a video, a folder of images or a pattern such as `shots/*.png`.

    :param image_topic: of a bag with several image topics.
    :param rate: images per second of a folder, whose files have no stamps.
    :param odom_frame: fixed frame in which /tf of a bag gives the camera motion (REP-105).
    :raises ValueError: if it is none of them, or contains nothing that can be read.
    """
    path = Path(where)
    if is_bag(path):
        from vggt_ros.io.bag_frames import BagFrames  # only bags need rosbags

        return BagFrames(path, image_topic, odom_frame)
    if path.suffix.lower() in _VIDEO_SUFFIXES:
        return VideoFrames(path)
    return FolderFrames(where, rate)


def open_recording(path: Path) -> RgbdRecording:
    """
    Open a sequence of TUM RGB-D, 7-Scenes or EuRoC, or a bag with ground truth.

    :raises ValueError: if it is none of them, or incomplete.
    """
    if is_bag(path):
        from vggt_ros.io.bag_recording import BagRecording  # only bags need rosbags

        return BagRecording(path)
    if (path / 'rgb.txt').exists():
        return TumRecording(path)
    if any(path.glob('frame-*.pose.txt')):
        return SevenScenesRecording(path)
    if (path / 'mav0').is_dir():
        return EurocRecording(path)
    raise ValueError(
        f'{path} is no recording with ground truth; expected a folder with rgb.txt (TUM RGB-D), '
        'frame-*.pose.txt (7-Scenes) or mav0 (EuRoC), or a bag'
    )


def is_bag(path: Path) -> bool:
    """Recognise a bag by its name or its metadata."""
    return path.suffix.lower() in _BAG_SUFFIXES or (path / 'metadata.yaml').exists()
