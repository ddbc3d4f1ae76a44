# SPDX-License-Identifier: Apache-2.0
"""Image files: RGB as the published weights were trained with, and 16-bit depth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

_File = Path | BinaryIO
_Size = tuple[int, int]  # H, W
# Pillow's plugins raise SyntaxError for broken headers; a bomb is an image above its limit
_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(file: _File) -> npt.NDArray[np.uint8]:
    """
    Read an image file.

    Transparent pixels of an RGBA file are blended with white; the EXIF orientation is ignored.

    :param file: a path, or a file that is open for reading.
    :returns: (H, W, 3), RGB.
    :raises ValueError: if the file cannot be read as an image.
    """
    try:
        with Image.open(file) as image:
            if image.mode == 'RGBA':
                white = Image.new('RGBA', image.size, (255, 255, 255, 255))
                return np.asarray(Image.alpha_composite(white, image).convert('RGB'))
            return np.asarray(image.convert('RGB'))
    except _ERRORS as error:
        raise ValueError(f'{_name(file)} cannot be read as an image: {_reason(error)}') from error


def read_uint16_image(file: _File, size: _Size | None = None) -> npt.NDArray[np.uint16]:
    """
    Read an image with one channel of 16 bits, such as depth.

    :param file: a path, or a file that is open for reading.
    :param size: that the image must have; it is checked before decoding.
    :returns: (H, W).
    :raises ValueError: if the file is anything else.
    """
    try:
        data = file.read_bytes() if isinstance(file, Path) else file.read()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
        if size is not None and (height, width) != size:
            raise ValueError(f'it has {width}x{height} pixels; expected {size[1]}x{size[0]}')
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (*_ERRORS, cv2.error) as error:
        raise ValueError(f'{_name(file)} cannot be read as an image: {_reason(error)}') from error
    if stored is None:
        raise ValueError(f'{_name(file)} cannot be read as an image')
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise ValueError(
            f'{_name(file)} has {stored.dtype} pixels of shape {stored.shape}; expected one '
            'channel of 16 bits'
        )
    return stored  # type: ignore[return-value]


def _reason(error: Exception) -> str:
    # whose own message repeats the path, or the address of a buffer
    return 'unknown format' if isinstance(error, UnidentifiedImageError) else str(error)


def _name(file: _File) -> str:
    return str(file if isinstance(file, Path) else file.name)
