# SPDX-License-Identifier: Apache-2.0
"""One window as the network reads it: 8-bit images of one size, and the exact map back.

Images stay 8-bit on the host; `stack_images` makes the float tensor on the device where it is
needed. Colours are only divided by 255: the network normalises them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.frames.frame import Frame
from vggt_ros.frames.resize import Pixels, upload
from vggt_ros.geometry.poses import Array

Mask = npt.NDArray[np.bool_]

_CPU = torch.device('cpu')


@dataclass(frozen=True, slots=True)
class PreprocessedImage:
    """One image at the network's size."""

    pixels: Pixels  # (H, W, 3), RGB; H and W are multiples of the patch size
    source_from_network: Array  # (3, 3): homogeneous pixel of `pixels` to pixel of the source
    source_intrinsics: Array | None = None  # (3, 3) calibrated camera matrix of the source
    seen: Mask | None = None  # (H, W): the lens saw this pixel; None: it saw all of them
    pixel_map: npt.NDArray[np.float32] | None = None  # see `PinholeImage`

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or not self.pixels.size:
            raise ValueError(f'image of shape {self.pixels.shape}, expected (H, W, 3)')
        if self.source_from_network.shape != (3, 3):
            raise ValueError(
                f'source_from_network of shape {self.source_from_network.shape}, expected (3, 3)'
            )

    def to_source(self, points: Array) -> Array:
        """Transform pixels (..., 2) of `pixels`, as (x, y), into pixels of the source."""
        back = self.source_from_network
        source: Array = points @ back[:2, :2].T + back[:2, 2]
        return source

    def from_source(self, points: Array) -> Array:
        """Transform pixels (..., 2) of the source, as (x, y), into pixels of `pixels`."""
        network_from_source = np.linalg.inv(self.source_from_network)
        own: Array = points @ network_from_source[:2, :2].T + network_from_source[:2, 2]
        return own

    def intrinsics(self) -> Array | None:
        """Return the calibrated camera matrix (3, 3) of `pixels`; None without calibration."""
        if self.source_intrinsics is None:
            return None
        matrix: Array = np.linalg.inv(self.source_from_network) @ self.source_intrinsics
        return matrix


@dataclass(frozen=True, slots=True)
class Queries:
    """Points to track through a window."""

    points: npt.NDArray[np.float32]  # (K, 2) as (x, y), pixels of the network's images
    frames: npt.NDArray[np.int64]  # (K,) index in the window of the frame that each point is in
    ids: npt.NDArray[np.int64]  # (K,) track ids, see `mapping.point_tracker`


@dataclass(frozen=True, slots=True)
class Batch:
    """One window, ready for the network."""

    images: tuple[PreprocessedImage, ...]  # S images of one size
    frames: tuple[Frame, ...]  # S frames
    ids: tuple[int, ...]  # S frame ids
    window_id: int
    depth_frames: tuple[int, ...] | None = None  # indices; depth of these only; None: all
    queries: Queries | None = None  # points to track; None: no tracks are wanted

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        height, width = self.images[0].pixels.shape[:2]
        return height, width

    @property
    def depth_indices(self) -> tuple[int, ...]:
        """Indices of the D frames whose depth is predicted."""
        return tuple(range(len(self.ids))) if self.depth_frames is None else self.depth_frames

    def stack(self, device: torch.device = _CPU) -> Tensor:
        """Return the images as one tensor (S, 3, H, W) in [0, 1], on a device."""
        return stack_images([image.pixels for image in self.images], device)

    def select(self, indices: Sequence[int]) -> Batch:
        """Keep the frames at these indices, in this order; depth of all of them, no tracks."""
        return Batch(
            images=tuple(self.images[i] for i in indices),
            frames=tuple(self.frames[i] for i in indices),
            ids=tuple(self.ids[i] for i in indices),
            window_id=self.window_id,
        )


def stack_images(images: Sequence[Pixels], device: torch.device = _CPU) -> Tensor:
    """Convert S images (H, W, 3) into one tensor (S, 3, H, W) in [0, 1], on a device."""
    # channels are reordered as bytes: as floats that takes three times as long
    stacked = upload(images, device).permute(0, 3, 1, 2).contiguous()
    return stacked.to(torch.float32).div_(255)


def sample_source(
    values: npt.NDArray[np.float32],
    source_size: tuple[int, ...],
    source_from_network: Array,
    rows: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
    pixel_map: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """
    Look up measurements at pixels of the network's image, nearest neighbour.

    Depth is never interpolated: between an edge and its background there is no surface.

    :param values: (h, w), of the same view as the source image, perhaps at another resolution.
    :param source_size: H, W of the source image.
    :param source_from_network: (3, 3), see `PreprocessedImage`.
    :param rows: of the network's image, any shape; `columns` likewise.
    :param pixel_map: see `PinholeImage`, where `values` belong to the unrectified image.
    :returns: of that shape; NaN outside of the source.
    """
    per_row, per_column = np.array(values.shape) / source_size[:2]
    y = source_from_network[1, 1] * rows + source_from_network[1, 2]
    x = source_from_network[0, 0] * columns + source_from_network[0, 2]
    if pixel_map is not None:
        last_row, last_column = pixel_map.shape[1] - 1, pixel_map.shape[2] - 1
        row = y.round().astype(np.intp).clip(0, last_row)
        column = x.round().astype(np.intp).clip(0, last_column)
        y, x = pixel_map[:, row, column]
    y, x = (y + 0.5) * per_row, (x + 0.5) * per_column
    inside = (y >= 0) & (y <= values.shape[0]) & (x >= 0) & (x <= values.shape[1])
    sampled = values[
        y.astype(np.intp).clip(0, values.shape[0] - 1),
        x.astype(np.intp).clip(0, values.shape[1] - 1),
    ]
    return np.where(inside, sampled, np.float32(np.nan))
