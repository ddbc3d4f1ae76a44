# SPDX-License-Identifier: Apache-2.0
"""
Rectification: images of a calibrated camera become those of an ideal pinhole camera.

VGGT assumes images without distortion whose principal point is the centre. Where the calibration
is known, each image is rectified to a pinhole camera with square pixels, centred principal point
and the requested field of view; this includes fisheye lenses. OpenCV makes the maps, once for
each calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.geometry.poses import Array

Pixels = npt.NDArray[np.uint8]

# default field of view of a fisheye: a wider pinhole image only stretches the borders
_FISHEYE_FIELD_OF_VIEW = math.radians(100)
_MAX_MAPS = 8  # calibrations whose maps are cached; a robot has fewer cameras


@dataclass(frozen=True, slots=True)
class PinholeImage:
    """An image of a camera without distortion."""

    pixels: Pixels  # (H, W, 3), as large as the source
    intrinsics: Array | None  # (3, 3), pixels; None: the camera is not calibrated
    seen: npt.NDArray[np.bool_] | None = None  # (H, W): the lens saw this pixel; None: all of them
    # (2, H, W): row and column in the source image of each pixel; None: the identity
    pixel_map: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Maps:
    x_and_y: tuple[npt.NDArray[np.int16], npt.NDArray[np.uint16]]  # OpenCV's fixed-point maps
    intrinsics: Array
    seen: npt.NDArray[np.bool_] | None
    pixel_map: npt.NDArray[np.float32]


class Rectifier:
    """Rectifies images; caches the maps of each calibration."""

    def __init__(self, field_of_view: float) -> None:
        """
        Choose the pinhole camera.

        :param field_of_view: horizontal, rad; 0: the widest without empty borders, for a fisheye
            100 degrees.
        """
        self._field_of_view = field_of_view
        self._maps: dict[bytes, _Maps] = {}

    def rectify(self, frame: Frame) -> PinholeImage:
        """Rectify an image, if its camera is calibrated and has any distortion."""
        calibration = frame.calibration
        if calibration is None:
            return PinholeImage(frame.image, None)
        if not self._field_of_view and not is_distorted(calibration):
            return PinholeImage(frame.image, calibration.K)
        maps = self._maps_of(calibration)
        # up to half a pixel outside of the border is replicated; farther out is not `seen`
        pixels = cv2.remap(
            frame.image, *maps.x_and_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        return PinholeImage(pixels, maps.intrinsics, maps.seen, maps.pixel_map)  # type: ignore[arg-type]

    def _maps_of(self, calibration: Calibration) -> _Maps:
        size = np.array([calibration.width, calibration.height])
        key = b''.join((size.tobytes(), calibration.K.tobytes(), calibration.D.tobytes()))
        key += calibration.distortion_model.encode()
        if key not in self._maps:
            if len(self._maps) == _MAX_MAPS:
                self._maps.pop(next(iter(self._maps)))
            self._maps[key] = _make_maps(calibration, self._field_of_view)
        return self._maps[key]


def use_as_rectified(frame: Frame) -> PinholeImage:
    """Use an image that is rectified already, to the camera matrix in P of its calibration."""
    calibration = frame.calibration
    if calibration is None:
        return PinholeImage(frame.image, None)
    projection = calibration.P[:, :3]
    return PinholeImage(frame.image, projection if projection[0, 0] > 0 else calibration.K)


def distort(pixels: Array, intrinsics: Array, calibration: Calibration) -> Array:
    """
    Apply the distortion model to pixels of a rectified image.

    :param pixels: (N, 2) as (x, y), of the rectified image; may lie outside of it.
    :param intrinsics: (3, 3) of the rectified image, see `PinholeImage`.
    :param calibration: of the camera.
    :returns: (N, 2), pixels of the unrectified image. Outside of the calibrated field of view
        they are meaningless: the polynomial is not monotonic there.
    """
    if not len(pixels):
        return pixels
    rays = np.ones((len(pixels), 1, 3))
    rays[:, 0, :2] = (pixels - intrinsics[:2, 2]) / np.diag(intrinsics)[:2]
    origin = np.zeros(3)
    if calibration.distortion_model == 'equidistant':
        distorted, _ = cv2.fisheye.projectPoints(
            rays, origin, origin, calibration.K, calibration.D
        )
    else:
        distorted, _ = cv2.projectPoints(rays, origin, origin, calibration.K, calibration.D)
    found: Array = np.asarray(distorted[:, 0], np.float64)
    return found


def is_distorted(calibration: Calibration) -> bool:
    """Check whether the camera differs from a pinhole camera: an equidistant one always does."""
    return calibration.distortion_model == 'equidistant' or bool(np.any(calibration.D))


def _largest_radius(calibration: Calibration, farthest: float) -> float:
    """
    Compute the radius up to which the distortion polynomial is monotonic.

    Outside of the calibrated field of view the polynomial may fold back, and show image content
    a second time.

    :param farthest: tangent of the angle to the axis up to which it matters.
    :returns: tangent of the angle; inf if it is monotonic up to `farthest`.
    """
    rays = np.zeros((500, 1, 3))
    rays[:, 0, 0] = np.linspace(0, farthest, len(rays))
    rays[..., 2] = 1
    origin, identity = np.zeros(3), np.eye(3)
    if calibration.distortion_model == 'equidistant':
        distorted, _ = cv2.fisheye.projectPoints(rays, origin, origin, identity, calibration.D)
    else:
        radial = calibration.D[:8].copy()
        radial[2:4] = 0  # the tangential part has no radius
        distorted, _ = cv2.projectPoints(rays, origin, origin, identity, radial)
    increasing = np.diff(distorted[:, 0, 0]) > 0
    return float('inf') if increasing.all() else float(rays[int(increasing.argmin()), 0, 0])


def _make_maps(calibration: Calibration, field_of_view: float) -> _Maps:
    width, height = size = calibration.width, calibration.height
    fisheye = calibration.distortion_model == 'equidistant'
    identity = np.eye(3)
    if fisheye or field_of_view:
        focal = width / 2 / math.tan((field_of_view or _FISHEYE_FIELD_OF_VIEW) / 2)
    else:
        # the smallest zoom without empty borders, with a centred principal point
        best, _ = cv2.getOptimalNewCameraMatrix(
            calibration.K, calibration.D, size, 0, size, centerPrincipalPoint=True
        )
        focal = max(best[0, 0], best[1, 1])
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    if fisheye:
        x, y = cv2.fisheye.initUndistortRectifyMap(
            calibration.K, calibration.D, identity, intrinsics, size, cv2.CV_32FC1
        )
    else:
        x, y = cv2.initUndistortRectifyMap(
            calibration.K, calibration.D, identity, intrinsics, size, cv2.CV_32FC1
        )
    seen = (x > -1) & (y > -1) & (x < width) & (y < height)
    rows, columns = np.indices((height, width))
    radius = np.hypot(columns - intrinsics[0, 2], rows - intrinsics[1, 2]) / focal
    seen &= radius <= _largest_radius(calibration, float(radius.max()))
    fixed = cv2.convertMaps(x, y, cv2.CV_16SC2)
    return _Maps(fixed, intrinsics, None if seen.all() else seen, np.stack([y, x]))  # type: ignore[arg-type]
