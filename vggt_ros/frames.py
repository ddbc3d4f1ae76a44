# SPDX-License-Identifier: Apache-2.0
"""What a camera delivers: one `Frame`, with the `Calibration` of its camera if that is known.

A frame is decoded (RGB, 8 bits) but otherwise untouched: not resized, not rectified. It has no
number of its own: `SlidingWindow` numbers the frames that it accepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Calibration:
    """A pinhole calibration in the terms of `sensor_msgs/CameraInfo` (REP-104)."""

    width: int  # pixels of the image that was calibrated
    height: int
    distortion_model: str  # 'plumb_bob', 'rational_polynomial', 'equidistant' or ''
    K: npt.NDArray[np.float64]  # (3, 3), pixels; pixel centres at integer coordinates
    D: npt.NDArray[np.float64]  # (n,), coefficients in the order of the model

    def __post_init__(self) -> None:
        if self.K.shape != (3, 3):
            raise ValueError(f'the camera matrix has shape {self.K.shape}, expected (3, 3)')


@dataclass(frozen=True, slots=True)
class Frame:
    """One image with its acquisition time."""

    image: npt.NDArray[np.uint8]  # (H, W, 3), RGB
    stamp_ns: int  # acquisition time, nanoseconds
    camera_frame: str  # optical frame of the camera, as in the image's header
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise ValueError(
                f'a frame needs an image of shape (H, W, 3) and type uint8, '
                f'found {self.image.shape} and {self.image.dtype}'
            )
        if self.image.size == 0:
            raise ValueError(f'a frame needs an image with pixels, found shape {self.image.shape}')
