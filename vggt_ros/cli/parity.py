# SPDX-License-Identifier: Apache-2.0
"""`vggt parity`: the network against outputs of the reference implementation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from vggt_ros.cli.command import COMPLETE, FAILED, Command

if TYPE_CHECKING:
    from vggt_ros.lab.parity.golden_cases import Deviation

FullCase = Literal['F140x182', 'F294x518', 'F518x518']


@dataclass(frozen=True)
class Parity(Command):
    """
    Compare the network with recorded outputs of the reference implementation.

        vggt parity --golden DIR

    Prints the largest deviation per golden case and part of the network; with --full also that of
    VGGT-1B, with time and memory (5 GB are needed). The exit code is 1 if a limit is exceeded.
    """

    name: ClassVar[str] = 'parity'

    golden: Path
    """Folder with the golden cases pub*."""
    full: Path | None = None
    """Folder with the JSON files of full size."""
    full_cases: tuple[FullCase, ...] = ('F140x182', 'F294x518', 'F518x518')
    """Which of them to compare."""
    json: Path | None = None
    """File for the figures."""
    threads: int | None = None
    """Threads of torch; default: torch's own choice."""

    def run(self) -> int:
        """Compare, print a line per part of the network, and write the figures."""
        if not self.full_cases:
            raise ValueError('--full-cases is empty, expected at least one case')
        import torch

        from vggt_ros.lab.parity.golden_cases import (
            build_full_size,
            check_case,
            check_full_size,
            write_deviations,
        )

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        found: list[Deviation] = []
        print(f'{"case":10} {"part":11} {"worst tensor":28} {"error":>9} {"limit":>9}')
        for folder in sorted(self.golden.glob('pub*')):
            deviations = check_case(folder)
            _print_worst(deviations)
            found += deviations
        runs = []
        if self.full is not None:
            model = build_full_size()
            for case in self.full_cases:
                run = check_full_size(model, self.full / f'{case}.json')
                _print_worst(run.deviations)
                print(f'{case:10} forward {run.seconds:.1f} s, peak {run.peak_gigabytes:.2f} GiB')
                found += run.deviations
                runs.append(run)
        if self.json is not None:
            write_deviations(found, runs, self.json)
        failed = [deviation for deviation in found if not deviation.passed]
        print(f'{len(found)} tensors compared, {len(failed)} beyond the limit')
        return FAILED if failed or not found else COMPLETE


def _print_worst(deviations: list[Deviation]) -> None:
    """Print the largest deviation of each part of the network."""
    from vggt_ros.lab.parity.golden_cases import worst_by_head

    for head, worst in worst_by_head(deviations).items():
        flag = '' if worst.passed else '  FAILED'
        figures = f'{worst.error:9.1e} {worst.limit:9.0e}{flag}'
        print(f'{worst.case:10} {head:11} {worst.name:28} {figures}', flush=True)


if __name__ == '__main__':
    sys.exit(Parity.main())
