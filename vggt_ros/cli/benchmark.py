# SPDX-License-Identifier: Apache-2.0
"""`vggt bench`, `vggt bench-node` and `vggt ablate`: speed, and what it costs in accuracy."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from vggt_ros.cli.command import COMPLETE, Command, CommandError, Flag
from vggt_ros.settings import PATCH_SIZE


@dataclass(frozen=True)
class Bench(Command):
    """
    Time the network as the engine runs it against a plain forward pass of whole windows.

        vggt bench --size vggt_1b --frames 4 --stride 1 --resolution 392x294

    The weights are random; the time does not depend on their values.
    """

    name: ClassVar[str] = 'bench'

    size: Literal['small', 'vggt_1b'] = 'small'
    """Network."""
    frames: tuple[int, ...] = (8,)
    """Frames per window."""
    stride: tuple[int, ...] = (1, 4)
    """New frames per window."""
    resolution: Annotated[tuple[str, ...], arg(metavar='WxH [WxH ...]')] = ('84x56',)
    """Image sizes, pixels, multiples of 14."""
    windows: int = 10
    """Timed windows of each combination."""
    device: str = 'auto'
    """Torch device, as the setting of that name."""
    precision: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
    """Number format, as the setting of that name."""
    compile: Flag = False
    """Also time the engine with compiled layers."""
    json: Path | None = None
    """File for the figures."""
    plot: Path | None = None
    """PNG of time and memory over frames."""

    def run(self) -> int:
        """Benchmark every combination and print a table."""
        for name, values in (('frames', self.frames), ('stride', self.stride)):
            if not values or min(values) < 1:
                raise ValueError(f'--{name} is {values}, expected at least one number from 1')
        resolutions = [parse_resolution(text) for text in self.resolution]
        from vggt_ros.lab.benchmarks.speed import benchmark_sizes, speed_table, write_results
        from vggt_ros.lab.evaluation.plots import draw_speed

        found = []
        for figures in benchmark_sizes(
            self.size,
            resolutions,
            self.frames,
            self.stride,
            self.windows,
            self.device,
            self.precision,
            self.compile,
        ):
            found.append(figures)
            print(speed_table([figures]).splitlines()[2], flush=True)
        print(speed_table(found))
        if self.plot is not None:
            draw_speed(found, self.plot)
        if self.json is not None:
            write_results(found, self.json)
        return COMPLETE


def parse_resolution(text: str) -> tuple[int, int]:
    """
    Parse an image size.

    :param text: WIDTHxHEIGHT.
    :raises ValueError: if it is something else, or no multiple of the patch size.
    """
    sides = [int(side) for side in text.split('x') if side.isdecimal()]
    if len(sides) != 2 or any(side < 1 or side % PATCH_SIZE for side in sides):
        raise ValueError(f'found {text!r}, expected WIDTHxHEIGHT in multiples of {PATCH_SIZE}')
    return sides[0], sides[1]


@dataclass(frozen=True)
class BenchNode(Command):
    """
    Benchmark the node at 30 Hz, with and without the Fast DDS profile of the package.

        vggt bench-node --seconds 60 --json docs/bench/node.json

    Two tables: the node with the embedded network at two image sizes and with all topics
    subscribed; and its work beside the network, with a stand-in for the network.
    """

    name: ClassVar[str] = 'bench-node'

    seconds: float = 60.0
    """Duration of each measurement."""
    only: Literal['node', 'own'] | None = None
    """Only one of the two tables."""
    json: Path | None = None
    """File for the figures."""

    def run(self) -> int:
        """Run all measurements one after the other."""
        from vggt_ros.lab.node.node_benchmark import BenchmarkError
        from vggt_ros.lab.node.node_cases import benchmark_node

        try:
            benchmark_node(self.seconds, self.only, self.json)
        except BenchmarkError as error:
            raise CommandError(str(error)) from error
        return COMPLETE


@dataclass(frozen=True)
class Ablate(Command):
    """
    Measure what each speed-up setting costs in accuracy, on synthetic windows.

        vggt ablate --windows 100
    """

    name: ClassVar[str] = 'ablate'

    model: str = 'embedded'
    """Checkpoint, as the setting of that name."""
    device: str = 'auto'
    """Torch device, as the setting of that name."""
    seed: int = 1
    """Seed of rooms and noise."""
    windows: int = 100
    """Number of windows."""
    frames: int = 8
    """Frames per window."""
    int8: Flag = False
    """Also 8-bit weights; needs torchao."""

    def run(self) -> int:
        """Compare all settings on the same windows and print a table."""
        from vggt_ros.lab.benchmarks.approximations import (
            approximation_table,
            compare_approximations,
        )

        found = compare_approximations(
            self.model, self.device, self.seed, self.windows, self.frames, self.int8
        )
        print(approximation_table(found))
        return COMPLETE


if __name__ == '__main__':
    sys.exit(Bench.main())
