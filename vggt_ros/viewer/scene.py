# SPDX-License-Identifier: Apache-2.0
"""
What the viewer shows: a coloured cloud and the cameras that observed it; and views of it.

The world frame is the optical frame of the first camera of the map: x right, y down, z forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

THUMBNAIL_WIDTH = 160  # pixels
MISSING_IMAGE_GREY = 187  # grey level of a frame without an image
MAX_CAMERAS = 2000  # of a scene; each has a thumbnail
MAX_POINTS = 500_000  # of a live scene, and of what is sent to a browser

_UP = np.array([0.0, -1.0, 0.0])  # of the world frame, whose y axis points down
_SAMPLE = 20_000  # points are enough for a median
_MIN_DISTANCE = 2.3  # of the viewer from the centre, times the scene's radius


@dataclass(frozen=True, slots=True)
class SceneCamera:
    """One frame."""

    stamp_ns: int
    world_from_camera: Array  # (4, 4), rigid
    intrinsics: Array  # (3, 3), pixels of `image`
    image: Pixels  # (h, w, 3), RGB, a thumbnail

    @property
    def vertical_fov(self) -> float:
        """Vertical field of view, radians."""
        return 2 * math.atan(self.image.shape[0] / 2 / float(self.intrinsics[1, 1]))


@dataclass(frozen=True, slots=True)
class ViewerScene:
    """A cloud of N points and the cameras that observed it."""

    title: str
    warning: str  # '' or a reason not to trust the scene, such as an untrained network
    unit: str  # 'm' or 'units of the network'
    cameras: tuple[SceneCamera, ...]  # in order of time
    xyz: npt.NDArray[np.float32]  # (N, 3), world frame
    rgb: npt.NDArray[np.uint8]  # (N, 3)
    confidence: npt.NDArray[np.float32]  # (N,), >= 1
    frame: npt.NDArray[np.int32]  # (N,), index of the camera that observed the point first

    def __post_init__(self) -> None:
        shapes = [part.shape for part in (self.xyz, self.rgb, self.confidence, self.frame)]
        count = len(self.xyz)
        if shapes != [(count, 3), (count, 3), (count,), (count,)]:
            raise ValueError(
                f'the cloud has positions, colours, confidence and frames of shapes {shapes}, '
                'expected (N, 3), (N, 3), (N,), (N,)'
            )
        if not np.isfinite(self.xyz).all():
            raise ValueError('the cloud has points with coordinates that are not finite')
        if count and not 0 <= self.frame.min() <= self.frame.max() < len(self.cameras):
            raise ValueError(
                f'points have frame indices {self.frame.min()} to {self.frame.max()}, '
                f'expected 0 to {len(self.cameras) - 1}'
            )


def trajectory_length(cameras: Sequence[SceneCamera]) -> float:
    """Sum the distances between consecutive cameras, in the unit of the scene."""
    return float(np.linalg.norm(np.diff(camera_positions(cameras), axis=0), axis=1).sum())


def camera_positions(cameras: Sequence[SceneCamera]) -> Array:
    """Return the positions (S, 3) of cameras in the world frame."""
    return np.array([camera.world_from_camera[:3, 3] for camera in cameras]).reshape(-1, 3)


def make_thumbnail(image: Pixels, intrinsics: Array) -> tuple[Pixels, Array]:
    """
    Downscale an image, if it is larger than a thumbnail, and its intrinsics with it.

    :param image: (H, W, 3), RGB.
    :param intrinsics: (3, 3), pixels of the image.
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


def scene_extent(scene: ViewerScene) -> tuple[Array, float]:
    """
    Compute centre and radius of a scene, robust to outliers.

    :returns: (3,), the median of the more confident half of the points, or of the cameras if there
        are no points; and the radius around it that contains four fifths of them and the cameras'
        median.
    """
    positions = camera_positions(scene.cameras)
    step = max(len(scene.xyz) // _SAMPLE, 1)
    points = scene.xyz[::step].astype(np.float64)
    if len(points):
        confidence = scene.confidence[::step]
        points = points[confidence >= np.median(confidence)]
    else:
        points = positions
    if not len(points):
        return np.zeros(3), 1.0
    centre = np.median(points, axis=0)
    radius = float(np.quantile(np.linalg.norm(points - centre, axis=1), 0.8))
    if len(positions):
        radius = max(radius, float(np.median(np.linalg.norm(positions - centre, axis=1))))
    return centre, radius if radius > 0 else 1.0


def initial_view(scene: ViewerScene) -> tuple[Array, Array]:
    """
    Return a view from behind and above the first camera to the centre of the scene.

    :returns: position (3,) and the point to look at (3,), world frame.
    """
    centre, radius = scene_extent(scene)
    first = scene.cameras[0].world_from_camera if scene.cameras else np.eye(4)
    forward = first[:3, 2] - _UP * (_UP @ first[:3, 2])
    length = float(np.linalg.norm(forward))
    forward = forward / length if length > 0.1 else np.array([0.0, 0.0, 1.0])
    position = first[:3, 3] + radius * (1.4 * _UP - forward)
    offset = position - centre
    distance = max(float(np.linalg.norm(offset)), 1e-6)
    if distance < _MIN_DISTANCE * radius:
        position = centre + offset * (_MIN_DISTANCE * radius / distance)
    return position, centre


def camera_view(world_from_camera: Array, distance: float) -> tuple[Array, Array, Array]:
    """
    Return the view from a camera.

    :param distance: to the point to look at, about which the browser rotates the view.
    :returns: position (3,), the point to look at (3,), and the up direction (3,), which has no
        component along the camera's x axis, so that the view does not roll.
    """
    right, down, forward = world_from_camera[:3, :3].T
    position = world_from_camera[:3, 3]
    up = _UP - (_UP @ right) * right
    if up @ -down < 0.1:  # the camera looks straight up or down, or is upside down
        up = -down
    return position, position + distance * forward, up
