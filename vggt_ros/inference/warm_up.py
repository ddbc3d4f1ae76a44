# SPDX-License-Identifier: Apache-2.0
"""
Windows of noise, which cost what any window costs: to compile the network, or to time it.

A compiled network is compiled for the shapes that it is shown. What is shown to it here is the
steady state: a window of new frames only, as each map begins with, and then windows that move on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import Batch, PreprocessedImage, fit_image, stack_images
from vggt_ros.settings import PATCH_SIZE, RegistrationSettings, Settings


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the network."""

    frames: int  # of a window
    stride: int  # new ones among them
    height: int  # pixels
    width: int
    # says of which shared frames depth is wanted
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)

    @property
    def dense(self) -> tuple[int, ...]:
        """Places of the frames whose depth is wanted once the map has begun."""
        shared = self.frames - self.stride
        wanted = self.registration.shared_depth_frames(shared)
        spread = np.linspace(0, shared - 1, wanted).round().astype(int).tolist() if shared else []
        return (*spread, *range(shared, self.frames))


def expect_load(settings: Settings, image_width: int) -> Load:
    """
    Say what these settings will ask, of one camera.

    Nobody knows the camera's images yet: they are taken to be 4:3, or square where `fit` makes
    them so.

    :param image_width: of the network; the settings may have another one.
    """
    width = settings.model.resolution or image_width
    height = width
    if settings.model.fit == 'crop':
        height = max(round(0.75 * width / PATCH_SIZE), 1) * PATCH_SIZE
    window = settings.window
    return Load(
        window.window_size,
        window.window_stride,
        height,
        width,
        settings.registration,
    )


def make_noise_windows(load: Load, count: int) -> list[Batch]:
    """Slide a window over pictures of noise."""
    random = np.random.default_rng(0)
    fitted: dict[int, PreprocessedImage] = {}
    windows = []
    for window in range(count):
        ids = tuple(range(window * load.stride, window * load.stride + load.frames))
        for number in ids:
            if number not in fitted:
                picture = random.integers(0, 256, (load.height, load.width, 3), np.uint8)
                fitted[number] = fit_image(picture, load.width, 'crop')
        images = tuple(fitted[number] for number in ids)
        windows.append(
            Batch(
                images=stack_images([image.pixels for image in images]),
                fitted=images,
                frames=tuple(Frame(image.pixels, 0, 'camera') for image in images),
                ids=ids,
                window_id=window,
                dense=load.dense if window else None,
            )
        )
    return windows
