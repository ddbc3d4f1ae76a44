# SPDX-License-Identifier: Apache-2.0
"""
ROS images become RGB arrays or depth in metres; camera_info a calibration; clouds arrays.

Messages only have to look like those of ROS: those of rclpy and of a bag's reader do.

Every encoding of `sensor_msgs/image_encodings` that carries colour, grey or Bayer data in 8 or 16
bits, or YUV 4:2:2; rows of any `step`; either byte order; JPEG and PNG. Of 16-bit data the high
byte is kept: the network sees 8 bits. Unnamed channels (8UC3, 16UC3, ...) are read as OpenCV's
order, blue first. As a picture, depth and 4:2:0 video are refused.

cv_bridge does not decode here, although ROS provides it: built for numpy 1 it crashes a process
that has numpy 2, it misreads rows whose step is no multiple of the pixel, and it fails on
big-endian data under numpy 2. One decoder with one behaviour everywhere is less to go wrong;
`test_message_reading.py` compares it with cv_bridge where a working one is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vggt_ros.frames.frame import Calibration
from vggt_ros.io.rgbd import DEPTH_ENCODINGS

Pixels = npt.NDArray[np.uint8]


class ImageError(ValueError):
    """An image that cannot be used; `cause` is one word for the statistics."""

    def __init__(self, cause: str, sentence: str) -> None:
        super().__init__(sentence)
        self.cause = cause


@dataclass(frozen=True)
class Encoding:
    """How the pixels of one encoding lie in memory and become RGB."""

    channels: int
    depth: int  # bytes of one channel
    to_rgb: int | None  # OpenCV's conversion of 8-bit data; None: is RGB already


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
_UNNAMED = {'C1': 'mono', 'C3': 'bgr', 'C4': 'bgra'}

ENCODINGS: dict[str, Encoding] = {
    **{
        f'{name}{8 * depth}': Encoding(channels, depth, to_rgb)
        for name, (channels, to_rgb) in _COLOURS.items()
        for depth in (1, 2)
    },
    **{
        f'{8 * depth}U{suffix}': Encoding(_COLOURS[name][0], depth, _COLOURS[name][1])
        for suffix, name in _UNNAMED.items()
        for depth in (1, 2)
    },
    'uyvy': Encoding(2, 1, cv2.COLOR_YUV2RGB_UYVY),
    'yuv422': Encoding(2, 1, cv2.COLOR_YUV2RGB_UYVY),
    'yuyv': Encoding(2, 1, cv2.COLOR_YUV2RGB_YUYV),
    'yuv422_yuy2': Encoding(2, 1, cv2.COLOR_YUV2RGB_YUYV),
}
_POINT = {'x': '<f4', 'y': '<f4', 'z': '<f4', 'rgb': '<u4', 'confidence': '<f4'}
_SMALLEST_BAYER = 2  # pixels; a side of less has no whole 2x2 pattern


def ns_from_time(stamp: Any) -> int:
    """Join a builtin_interfaces/Time."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def check_image(message: Any) -> Encoding:
    """
    Check what can be checked without touching the pixels.

    :param message: sensor_msgs/Image.
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
    if 'bayer' in message.encoding and min(width, height) < _SMALLEST_BAYER:
        raise ImageError(
            'odd_size', f'a Bayer image is {width}x{height} pixels, expected at least 2x2'
        )
    return encoding


def _check_layout(message: Any, pixel: int) -> None:
    """Check that pixels of so many bytes are all there."""
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


def decode_image(message: Any) -> Pixels:
    """
    Turn an image message into RGB.

    :param message: sensor_msgs/Image.
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


def decode_depth(message: Any) -> npt.NDArray[np.float32]:
    """
    Turn a depth image into metres (REP-118: 16UC1 in mm, 32FC1 in m).

    :param message: sensor_msgs/Image.
    :returns: (H, W), NaN where nothing was measured (0, negative or not finite).
    :raises ImageError: if the image is no such depth.
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


def decode_compressed(message: Any) -> Pixels:
    """
    Turn a JPEG or PNG message into RGB. A rotation noted in the file is not applied.

    :param message: sensor_msgs/CompressedImage.
    :returns: (H, W, 3).
    :raises ImageError: if the data are not an image.
    """
    check_compressed(message)
    data = np.frombuffer(message.data, np.uint8)
    try:
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError('undecodable', f'OpenCV cannot read the image: {error}') from error
    if decoded is None:
        raise ImageError(
            'undecodable',
            f"{len(data)} bytes of format '{message.format}' cannot be read, expected JPEG or PNG",
        )
    return _to_rgb(decoded, cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]


def check_compressed(message: Any) -> None:
    """
    Check what can be checked without decoding.

    :param message: sensor_msgs/CompressedImage.
    :raises ImageError: if there are no data.
    """
    if len(message.data) == 0:
        raise ImageError('empty', 'the compressed image has no data')


def read_cloud(
    message: Any,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """
    Read the finite points of a cloud that the node has published.

    :param message: sensor_msgs/PointCloud2 with the fields x, y, z, rgb and confidence.
    :returns: positions (N, 3), RGB colours (N, 3) and confidence (N,).
    :raises ValueError: if a field is missing.
    """
    offsets = {entry.name: entry.offset for entry in message.fields}
    if not set(_POINT) <= set(offsets):
        raise ValueError(
            f'the cloud has the fields {", ".join(offsets)}, expected {", ".join(_POINT)}'
        )
    kind = np.dtype(
        {
            'names': list(_POINT),
            'formats': list(_POINT.values()),
            'offsets': [offsets[name] for name in _POINT],
            'itemsize': message.point_step,
        }
    )
    points = np.frombuffer(message.data, kind)
    xyz = np.stack([points['x'], points['y'], points['z']], axis=-1)
    rgb = np.stack([points['rgb'] >> shift & 255 for shift in (16, 8, 0)], axis=-1)
    finite = np.isfinite(xyz).all(axis=1)
    return xyz[finite], rgb[finite].astype(np.uint8), points['confidence'][finite]


def read_calibration(message: Any) -> Calibration | None:
    """
    Turn a camera_info message into a calibration.

    :param message: sensor_msgs/CameraInfo.
    :returns: None if the camera is not calibrated (K[0] is 0).
    :raises ValueError: for a distortion model that is not known, or coefficients that are not
        those of the model.
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
