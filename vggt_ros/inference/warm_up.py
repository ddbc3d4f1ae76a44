# SPDX-License-Identifier: Apache-2.0
"""
Windows of noise, with the cost of real ones: to compile the network, or to measure its speed.

A network is compiled for the shapes of its first inputs. These windows have the shapes of the
steady state: a first window of new frames only, then windows that share frames with the map.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vggt_ros.frames.batch import Batch, PreprocessedImage
from vggt_ros.frames.frame import Frame
from vggt_ros.frames.preprocessor import fit_image
from vggt_ros.settings import PATCH_SIZE, RegistrationSettings, Settings


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes of the windows that the network has to process."""

    frames: int  # of a window
    stride: int  # new ones among them
    height: int  # pixels
    width: int
    registration: RegistrationSettings = field(default_factory=RegistrationSettings)

    @property
    def depth_frames(self) -> tuple[int, ...]:
        """Indices of the frames whose depth is predicted once the map has started."""
        shared = range(self.frames - self.stride)
        new = range(self.frames - self.stride, self.frames)
        return (*self.registration.choose_shared(shared), *new)


def expect_load(settings: Settings, image_width: int) -> Load:
    """
    Predict the windows of one camera with these settings.

    The size of its images is not known yet: 4:3 is assumed, or squares with another `fit`.

    :param image_width: of the network, used unless the settings have another one.
    """
    width = settings.model.resolution or image_width
    height = width
    if settings.model.fit == 'crop':
        height = max(round(0.75 * width / PATCH_SIZE), 1) * PATCH_SIZE
    window = settings.window
    return Load(window.window_size, window.window_stride, height, width, settings.registration)


def make_noise_windows(load: Load, count: int) -> list[Batch]:
    """Slide a window over images of noise."""
    random = np.random.default_rng(0)
    images: dict[int, PreprocessedImage] = {}
    windows = []
    for window in range(count):
        ids = tuple(range(window * load.stride, window * load.stride + load.frames))
        for frame_id in ids:
            if frame_id not in images:
                noise = random.integers(0, 256, (load.height, load.width, 3), np.uint8)
                images[frame_id] = fit_image(noise, load.width, 'crop')
        own = tuple(images[frame_id] for frame_id in ids)
        windows.append(
            Batch(
                images=own,
                frames=tuple(Frame(image.pixels, 0, 'camera') for image in own),
                ids=ids,
                window_id=window,
                depth_frames=load.depth_frames if window else None,
            )
        )
    return windows
