# SPDX-License-Identifier: Apache-2.0
"""One camera image, a `Frame`, with the `Calibration` of its camera if that is known.

A frame is decoded (RGB, 8 bits) but otherwise untouched: not resized, not rectified. It has no
id of its own: `SlidingWindow` numbers the frames that it accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Number of coefficients that each distortion model may have; none: no distortion.
COEFFICIENTS = {'plumb_bob': (4, 5), 'rational_polynomial': (8, 12, 14), 'equidistant': (4,)}

MAX_SIDE = 65536  # pixels, of an image


@dataclass(frozen=True, slots=True)
class Calibration:
    """A pinhole calibration in the terms of `sensor_msgs/CameraInfo` (REP-104)."""

    width: int  # pixels of the image that was calibrated
    height: int
    distortion_model: str  # 'plumb_bob', 'rational_polynomial', 'equidistant' or ''
    K: npt.NDArray[np.float64]  # (3, 3), pixels; pixel centres at integer coordinates
    D: npt.NDArray[np.float64]  # (n,), coefficients in the order of the model
    # (3, 4), the camera matrix of the rectified image in its first three columns; all 0: unknown
    P: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 4)))

    def __post_init__(self) -> None:
        if not (0 < self.width <= MAX_SIDE and 0 < self.height <= MAX_SIDE):
            raise ValueError(
                f'the calibration is of {self.width}x{self.height} pixels, expected sides of 1 to '
                f'{MAX_SIDE}'
            )
        if self.K.shape != (3, 3) or self.P.shape != (3, 4):
            raise ValueError(
                f'the camera matrices have shapes {self.K.shape} and {self.P.shape}, expected '
                '(3, 3) and (3, 4)'
            )
        if not (np.isfinite(self.K).all() and self.K[0, 0] > 0 and self.K[1, 1] > 0):
            raise ValueError(
                f'the focal lengths are {self.K[0, 0]:g} and {self.K[1, 1]:g}, expected pixels '
                'greater than 0'
            )
        if not np.isfinite(self.D).all():
            raise ValueError(f'the distortion coefficients are {self.D}, expected finite numbers')
        if not np.any(self.D) and self.distortion_model not in COEFFICIENTS:
            return
        if self.distortion_model not in COEFFICIENTS:
            raise ValueError(
                f'the distortion model is {self.distortion_model!r}, expected one of '
                f'{", ".join(COEFFICIENTS)}'
            )
        wanted = COEFFICIENTS[self.distortion_model]
        # without coefficients there is no distortion, but for an equidistant lens
        none = () if self.distortion_model == 'equidistant' else (0,)
        if len(self.D) not in (*wanted, *none):
            raise ValueError(
                f'{self.distortion_model} has {len(self.D)} distortion coefficients, expected '
                f'{" or ".join(map(str, wanted))}'
            )


@dataclass(frozen=True, slots=True)
class Frame:
    """One image with its acquisition time."""

    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    stamp_ns: int  # acquisition time, nanoseconds
    camera_frame: str  # optical frame of the camera, as in the image's header
    calibration: Calibration | None = None
    camera: int = 0  # index of the camera, where several are synchronized

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f'the image of a frame has shape {self.image.shape} and type {self.image.dtype}, '
                'expected (H, W, 3) and uint8'
            )
        if self.image.size == 0:
            raise ValueError(f'the image of a frame has shape {self.image.shape}, expected pixels')
