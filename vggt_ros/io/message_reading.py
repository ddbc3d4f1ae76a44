# SPDX-License-Identifier: Apache-2.0
"""
ROS messages become arrays: images RGB or depth in metres, camera_info a calibration.

The messages may be those of rclpy or of rosbags, see `message_types`.

All encodings of `sensor_msgs/image_encodings` that carry colour, grey or Bayer data in 8 or 16
bits, or YUV 4:2:2, are decoded, with rows of any `step` and either byte order; so are JPEG and
PNG. Of 16-bit data the high byte is kept: the network sees 8 bits. Generic encodings (8UC3,
16UC3, ...) are read in OpenCV's channel order, blue first. Depth and 4:2:0 video are rejected as
colour images.

cv_bridge does not decode here, although ROS provides it: built for numpy 1 it crashes a process
that has numpy 2, it misreads rows whose step is no multiple of the pixel, and it fails on
big-endian data under numpy 2. `test_message_reading.py` compares the results with those of
cv_bridge where a working one is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Calibration
from vggt_ros.io.message_types import (
    POINT_LAYOUT,
    CameraInfoMessage,
    CompressedImageMessage,
    ImageMessage,
    PointCloudMessage,
    TimeMessage,
)
from vggt_ros.io.rgbd import DEPTH_ENCODINGS

Pixels = npt.NDArray[np.uint8]


class ImageError(ValueError):
    """An image that cannot be decoded; `cause` is one word for the diagnostics."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


@dataclass(frozen=True)
class Encoding:
    """The memory layout of one encoding, and its conversion to RGB."""

    channels: int
    depth: int  # bytes of one channel
    to_rgb: int | None  # OpenCV's conversion of 8-bit data; None: already RGB


_COLOURS: dict[str, tuple[int, int | None]] = {
    'rgb': (3, None),
    'rgba': (4, cv2.COLOR_RGBA2RGB),
    'bgr': (3, cv2.COLOR_BGR2RGB),
    'bgra': (4, cv2.COLOR_BGRA2RGB),
    'mono': (1, cv2.COLOR_GRAY2RGB),
    # OpenCV names a pattern by the second row's second and third pixel, ROS by the first four
    'bayer_rggb': (1, cv2.COLOR_BayerBG2RGB),
    'bayer_bggr': (1, cv2.COLOR_BayerRG2RGB),
    'bayer_gbrg': (1, cv2.COLOR_BayerGR2RGB),
    'bayer_grbg': (1, cv2.COLOR_BayerGB2RGB),
}
_GENERIC = {'C1': 'mono', 'C3': 'bgr', 'C4': 'bgra'}

ENCODINGS: dict[str, Encoding] = {
    **{
        f'{name}{8 * depth}': Encoding(channels, depth, to_rgb)
        for name, (channels, to_rgb) in _COLOURS.items()
        for depth in (1, 2)
    },
    **{
        f'{8 * depth}U{suffix}': Encoding(_COLOURS[name][0], depth, _COLOURS[name][1])
        for suffix, name in _GENERIC.items()
        for depth in (1, 2)
    },
    'uyvy': Encoding(2, 1, cv2.COLOR_YUV2RGB_UYVY),
    'yuv422': Encoding(2, 1, cv2.COLOR_YUV2RGB_UYVY),
    'yuyv': Encoding(2, 1, cv2.COLOR_YUV2RGB_YUYV),
    'yuv422_yuy2': Encoding(2, 1, cv2.COLOR_YUV2RGB_YUYV),
}
_MIN_BAYER_SIDE = 2  # pixels; the pattern is 2x2


def ns_from_time(stamp: TimeMessage) -> int:
    """Convert a builtin_interfaces/Time to nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def check_image(message: ImageMessage) -> Encoding:
    """
    Check an image without reading its pixels.

    :raises ImageError: if the image cannot be decoded.
    """
    width, height = message.width, message.height
    encoding = ENCODINGS.get(message.encoding)
    if encoding is None:
        raise ImageError(
            'unknown_encoding',
            f"the image's encoding is '{message.encoding}', expected one of "
            f'{", ".join(ENCODINGS)}',
        )
    _check_layout(message, encoding.channels * encoding.depth)
    if encoding.channels == 2 and width % 2:
        raise ImageError(
            'odd_size',
            f'a {message.encoding} image is {width} pixels wide, expected an even width',
        )
    if 'bayer' in message.encoding and min(width, height) < _MIN_BAYER_SIDE:
        raise ImageError(
            'odd_size', f'a Bayer image is {width}x{height} pixels, expected at least 2x2'
        )
    return encoding


def _check_layout(message: ImageMessage, pixel: int) -> None:
    """
    Check that the data hold all pixels.

    :param pixel: bytes of one.
    """
    width, height, step = message.width, message.height, message.step
    if width == 0 or height == 0:
        raise ImageError('empty', f'the image is {width}x{height} pixels, expected at least 1x1')
    row = width * pixel
    if step < row:
        raise ImageError(
            'short_row',
            f'the step of the image is {step} bytes, expected at least {row} '
            f'({width} pixels of {message.encoding})',
        )
    if len(message.data) < step * height:
        raise ImageError(
            'short_data',
            f'the image has {len(message.data)} bytes, expected {step * height} '
            f'(step {step} times height {height})',
        )


def decode_image(message: ImageMessage) -> Pixels:
    """
    Convert an image to RGB.

    :returns: (H, W, 3); shares the message's memory where that is RGB without padding.
    :raises ImageError: see `check_image`.
    """
    encoding = check_image(message)
    high_byte = 0 if message.is_bigendian else encoding.depth - 1
    pixel = encoding.channels * encoding.depth
    raw: Pixels = np.ndarray(
        (message.height, message.width, encoding.channels),
        np.uint8,
        memoryview(message.data),
        offset=high_byte,
        strides=(message.step, pixel, encoding.depth),
    )
    return np.ascontiguousarray(raw) if encoding.to_rgb is None else _to_rgb(raw, encoding.to_rgb)


def decode_depth(message: ImageMessage) -> npt.NDArray[np.float32]:
    """
    Convert a depth image to metres (REP-118: 16UC1 in mm, 32FC1 in m).

    :returns: (H, W), NaN where nothing was measured (0, negative or not finite).
    :raises ImageError: if the image is not such a depth image.
    """
    if message.encoding not in DEPTH_ENCODINGS:
        raise ImageError(
            'unknown_encoding',
            f"the depth image's encoding is '{message.encoding}', expected one of "
            f'{", ".join(DEPTH_ENCODINGS)}',
        )
    kind, unit = DEPTH_ENCODINGS[message.encoding]
    dtype = np.dtype(kind).newbyteorder('>' if message.is_bigendian else '<')
    _check_layout(message, dtype.itemsize)
    stored: npt.NDArray[Any] = np.ndarray(
        (message.height, message.width),
        dtype,
        memoryview(message.data),
        strides=(message.step, dtype.itemsize),
    )
    depth = stored.astype(np.float32) * np.float32(unit)
    depth[~((depth > 0) & np.isfinite(depth))] = np.nan
    return depth


def decode_compressed(message: CompressedImageMessage) -> Pixels:
    """
    Decode a JPEG or PNG to RGB. The orientation in its EXIF data is ignored.

    :returns: (H, W, 3).
    :raises ImageError: if the data are not an image.
    """
    check_compressed(message)
    data = np.frombuffer(message.data, np.uint8)
    try:
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError('undecodable', f'OpenCV cannot decode the image: {error}') from error
    if decoded is None:
        raise ImageError(
            'undecodable',
            f"{len(data)} bytes of format '{message.format}' cannot be decoded, expected JPEG or "
            'PNG',
        )
    return _to_rgb(decoded, cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]


def check_compressed(message: CompressedImageMessage) -> None:
    """
    Check a compressed image without decoding it.

    :raises ImageError: if it has no data.
    """
    if len(message.data) == 0:
        raise ImageError('empty', 'the compressed image has no data')


def read_cloud(
    message: PointCloudMessage,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """
    Read the finite points of a cloud that the node published.

    :returns: positions (N, 3), RGB colours (N, 3) and confidence (N,).
    :raises ValueError: if a field of `POINT_LAYOUT` is missing.
    """
    offsets = {entry.name: entry.offset for entry in message.fields}
    names = POINT_LAYOUT.names or ()
    if not set(names) <= set(offsets):
        raise ValueError(
            f'the cloud has the fields {", ".join(offsets)}, expected {", ".join(names)}'
        )
    layout = np.dtype(
        {
            'names': list(names),
            'formats': [POINT_LAYOUT[name] for name in names],
            'offsets': [offsets[name] for name in names],
            'itemsize': message.point_step,
        }
    )
    points = np.frombuffer(message.data, layout)
    xyz = np.stack([points['x'], points['y'], points['z']], axis=-1)
    rgb = np.stack([points['rgb'] >> shift & 255 for shift in (16, 8, 0)], axis=-1)
    finite = np.isfinite(xyz).all(axis=1)
    return xyz[finite], rgb[finite].astype(np.uint8), points['confidence'][finite]


def read_calibration(message: CameraInfoMessage) -> Calibration | None:
    """
    Read a calibration.

    :returns: None if the camera is not calibrated (K[0] is 0).
    :raises ValueError: if the distortion model is unknown, or the number of its coefficients is
        wrong.
    """
    if message.k[0] == 0:
        return None
    return Calibration(
        width=message.width,
        height=message.height,
        distortion_model=message.distortion_model,
        K=np.array(message.k, np.float64).reshape(3, 3),
        D=np.array(message.d, np.float64),
        P=np.array(message.p, np.float64).reshape(3, 4),
    )


def _to_rgb(raw: Pixels, conversion: int) -> Pixels:
    return cv2.cvtColor(raw, conversion)  # type: ignore[return-value]
