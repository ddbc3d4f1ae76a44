# SPDX-License-Identifier: Apache-2.0
"""
What there is to look at: a coloured cloud and the cameras that saw it, finished or growing.

The world frame is the optical frame of the first camera of the map: x right, y down, z forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

THUMBNAIL_WIDTH = 160  # pixels
NO_PICTURE = 187  # grey level of a frame whose picture was not kept
MOST_CAMERAS = 2000  # of a scene; each brings a picture
MOST_POINTS = 500_000  # of a scene that grows, and of what a browser gets


@dataclass(frozen=True, slots=True)
class SceneCamera:
    """One frame."""

    stamp_ns: int
    world_from_camera: Array  # (4, 4), rigid
    intrinsics: Array  # (3, 3), pixels of `image`
    image: Pixels  # (h, w, 3), RGB, a thumbnail


@dataclass(frozen=True, slots=True)
class ViewerScene:
    """A cloud of N points and the cameras that saw it."""

    title: str
    warning: str  # '' or a reason not to believe it, such as an untrained network
    unit: str  # 'm' or 'units of the network'
    cameras: tuple[SceneCamera, ...]  # in order of time
    xyz: npt.NDArray[np.float32]  # (N, 3), world frame
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), >= 1
    frame: npt.NDArray[np.int32]  # (N,), index of the camera that saw the point first

    def __post_init__(self) -> None:
        shapes = [part.shape for part in (self.xyz, self.rgb, self.confidence, self.frame)]
        count = len(self.xyz)
        if shapes != [(count, 3), (count, 3), (count,), (count,)]:
            raise ValueError(
                f'the cloud has positions, colours, confidence and frames of shapes {shapes}, '
                'expected (N, 3), (N, 3), (N,), (N,)'
            )
        if not np.isfinite(self.xyz).all():
            raise ValueError('the cloud has points at no finite place')
        if count and not 0 <= self.frame.min() <= self.frame.max() < len(self.cameras):
            raise ValueError(
                f'points name frames {self.frame.min()} to {self.frame.max()}, '
                f'expected 0 to {len(self.cameras) - 1}'
            )


def trajectory_length(cameras: Sequence[SceneCamera]) -> float:
    """Add up the steps from camera to camera, in the unit of the scene."""
    places = np.array([camera.world_from_camera[:3, 3] for camera in cameras]).reshape(-1, 3)
    return float(np.linalg.norm(np.diff(places, axis=0), axis=1).sum())


def make_thumbnail(image: Pixels, intrinsics: Array) -> tuple[Pixels, Array]:
    """
    Shrink a picture, if it is larger than a thumbnail, and its camera with it.

    :param image: (H, W, 3), RGB.
    :param intrinsics: (3, 3), pixels of the picture.
    :returns: (h, w, 3) and (3, 3).
    """
    height, width = image.shape[:2]
    scale = THUMBNAIL_WIDTH / width
    if scale >= 1:
        return image, intrinsics
    size = (THUMBNAIL_WIDTH, max(round(height * scale), 1))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    shrink = np.diag([size[0] / width, size[1] / height, 1.0])
    return small.astype(np.uint8, copy=False), shrink @ intrinsics
