# SPDX-License-Identifier: Apache-2.0
"""
A bank of procedural textures, and band-limited look-ups into it.

Every texture is a seamless square tile with two channels: a pattern, which mixes the two colours
of a surface, and a fine detail, which varies its brightness. All surfaces of all rooms share the
bank; a surface adds its own colours, size and offset. A look-up blends two levels of a mip pyramid
(Williams, Pyramidal Parametrics, 1983), so that distant walls do not flicker between frames.

Filtering is isotropic.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 512  # texels along an edge of the finest level
BANK_SEED = 1


@dataclasses.dataclass(frozen=True)
class TextureBank:
    """All levels of all textures as rows of one table: a look-up is a plain gather."""

    texels: Tensor  # (rows, 2) in [0, 1]: pattern, detail
    level_starts: Tensor  # (levels,) int64: first row of each level
    count: int

    def to(self, device: torch.device | str) -> TextureBank:
        """Copy the table to a device."""
        return TextureBank(self.texels.to(device), self.level_starts.to(device), self.count)

    def sample(self, index: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
        """
        Look up textures.

        :param index: (P,) int64, which texture.
        :param uv: (2, P) position in tiles; repeats with period 1.
        :param footprint: (P,) size of a pixel on the surface, in tiles.
        :returns: (2, P): pattern and detail, each in [0, 1].
        """
        finest_to_coarsest = self.level_starts.numel() - 1
        level = torch.log2((footprint * SIZE).clamp(min=1.0)).clamp(max=finest_to_coarsest - 1e-3)
        lower = level.floor()
        fine = self._bilinear(index, uv, lower.long())
        coarse = self._bilinear(index, uv, lower.long() + 1)
        return torch.lerp(fine, coarse, (level - lower)[:, None]).T

    def _bilinear(self, index: Tensor, uv: Tensor, level: Tensor) -> Tensor:
        size = torch.bitwise_right_shift(SIZE, level)
        first = self.level_starts[level] + index * size * size
        position = uv * size - 0.5
        corner = position.floor()
        x_weight, y_weight = (position - corner)[:, :, None].unbind(0)
        x0, y0 = corner.long().unbind(0)
        wrap = size - 1  # sizes are powers of two
        left, right = x0 & wrap, (x0 + 1) & wrap
        upper, lower = first + (y0 & wrap) * size, first + ((y0 + 1) & wrap) * size
        above = torch.lerp(self.texels[upper + left], self.texels[upper + right], x_weight)
        below = torch.lerp(self.texels[lower + left], self.texels[lower + right], x_weight)
        return torch.lerp(above, below, y_weight)


@functools.lru_cache
def texture_bank(device: torch.device | str = 'cpu') -> TextureBank:
    """Return the bank, the same in every process and on every device."""
    if torch.device(device).type != 'cpu':
        return texture_bank().to(device)
    random = torch.Generator().manual_seed(BANK_SEED)
    patterns = [
        _planks(random),
        _tiles(random, 8, 8, grout=0.06, stagger=False),
        _tiles(random, 16, 8, grout=0.1, stagger=True),
        _voronoi(random, 90),
        _voronoi(random, 300),
        _rectangles(random, 60),
        _rectangles(random, 220),
        _marble(random),
        _blobs(random, 8),
        _blobs(random, 32),
        _noise(random, (4, 4), 6),
        _noise(random, (16, 16), 4),
    ]
    details = [_noise(random, (64, 64), 3) for _ in patterns]
    level = torch.stack([torch.stack(patterns), torch.stack(details)], dim=1)
    levels, starts = [], [0]
    while True:
        rows = level.permute(0, 2, 3, 1).reshape(-1, 2)
        levels.append(rows)
        if level.shape[-1] == 1:
            break
        starts.append(starts[-1] + rows.shape[0])
        level = functional.avg_pool2d(level, 2)
    return TextureBank(torch.cat(levels).contiguous(), torch.tensor(starts), len(patterns))


def _rescale(image: Tensor) -> Tensor:
    """Map the values linearly to [0, 1]."""
    return (image - image.min()) / (image.max() - image.min())


def _noise(random: torch.Generator, cells: tuple[int, int], octaves: int) -> Tensor:
    """Sum smooth periodic noise, each octave twice as fine and 0.6 as strong."""
    total = torch.zeros(SIZE, SIZE)
    for octave in range(octaves):
        rows, columns = (min(count << octave, SIZE) for count in cells)
        lattice = torch.rand(1, 1, rows, columns, generator=random)
        padded = functional.pad(lattice, (2, 2, 2, 2), mode='circular')
        row, column = SIZE // rows, SIZE // columns
        smooth = functional.interpolate(padded, scale_factor=(row, column), mode='bicubic')
        total += 0.6**octave * smooth[0, 0, 2 * row : -2 * row, 2 * column : -2 * column]
    return _rescale(total)


def _tiles(
    random: torch.Generator, rows: int, columns: int, grout: float, stagger: bool
) -> Tensor:
    """Return tiles or bricks of random greys with dark grout, a fraction of the tile's height."""
    axis = torch.arange(SIZE) / SIZE
    y = axis[:, None] * rows
    row = y.long()
    x = axis[None, :] * columns + (row % 2) * (0.5 if stagger else 0.0)
    grey = torch.rand(rows, columns, generator=random) * 0.7 + 0.3
    tile = grey[row.expand(SIZE, SIZE), x.long() % columns]
    in_grout = ((y % 1) < grout) | ((x % 1) < grout * columns / rows)
    return torch.where(in_grout, torch.zeros(()), tile)


def _planks(random: torch.Generator) -> Tensor:
    grain = _noise(random, (64, 4), 3)
    return (0.6 * _tiles(random, 8, 2, grout=0.05, stagger=True) + 0.4 * grain).clamp(0, 1)


def _voronoi(random: torch.Generator, count: int) -> Tensor:
    """Return the periodic Voronoi diagram of random points, each cell of another grey."""
    points = torch.rand(2, count, generator=random)
    grey = torch.rand(count, generator=random)
    axis = (torch.arange(SIZE) / SIZE)[:, None]
    gap_y, gap_x = ((axis - along).abs() for along in points)
    gap_y, gap_x = torch.minimum(gap_y, 1 - gap_y) ** 2, torch.minimum(gap_x, 1 - gap_x) ** 2
    rows = [grey[(gap_y[row] + gap_x).argmin(dim=1)] for row in range(SIZE)]
    return torch.stack(rows)


def _rectangles(random: torch.Generator, count: int) -> Tensor:
    """Return overlapping rectangles of all sizes."""
    image = torch.full((SIZE, SIZE), 0.5)
    largest = SIZE / math.sqrt(count) * 3
    for _ in range(count):
        height, width = (torch.rand(2, generator=random) * largest + 4).long().tolist()
        top, left = torch.randint(SIZE, (2,), generator=random).tolist()
        image = image.roll((-top, -left), (0, 1))
        image[:height, :width] = torch.rand(1, generator=random)
        image = image.roll((top, left), (0, 1))
    return image


def _marble(random: torch.Generator) -> Tensor:
    along = torch.arange(SIZE) / SIZE
    phase = 3 * along[:, None] + 2 * along[None, :] + 2.5 * _noise(random, (4, 4), 5)
    return 1 - torch.sin(2 * math.pi * phase).abs().sqrt()


def _blobs(random: torch.Generator, cells: int) -> Tensor:
    return torch.sigmoid(30 * (_noise(random, (cells, cells), 3) - 0.5))
