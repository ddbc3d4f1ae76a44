# SPDX-License-Identifier: Apache-2.0
"""Image files as RGB arrays, read in the way that the published weights were trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """
    Read an image file.

    Transparent pixels of an RGBA file are laid over white; the EXIF orientation is not applied.

    :returns: (H, W, 3), RGB.
    :raises ValueError: if the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode == 'RGBA':
                white = Image.new('RGBA', image.size, (255, 255, 255, 255))
                return np.asarray(Image.alpha_composite(white, image).convert('RGB'))
            return np.asarray(image.convert('RGB'))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f'{path} cannot be read as an image: {error}') from error
