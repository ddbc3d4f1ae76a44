# SPDX-License-Identifier: Apache-2.0
"""
Compare this network with the reference's golden data.

    python -m vggt_ros.cli.parity --golden DIR

Prints the worst deviation per golden case and part of the network; with `--full` also that of
VGGT-1B with time and memory (5 GB are needed). Exit status 1 if any limit is exceeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from vggt_ros.lab.parity.golden_cases import (
    Deviation,
    build_full_size,
    check_case,
    check_full_size,
    worst_by_head,
)

FULL_CASES = ('F140x182', 'F294x518', 'F518x518')


def main() -> int:
    """Run the cases that the command line names."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    found: list[Deviation] = []
    print(f'{"case":10} {"part":11} {"worst tensor":28} {"error":>9} {"limit":>9}')
    for folder in sorted(options.golden.glob('pub*')):
        deviations = check_case(folder)
        report(deviations)
        found += deviations
    runs = []
    if options.full is not None:
        model = build_full_size()
        for case in options.full_cases:
            run = check_full_size(model, options.full / f'{case}.json')
            report(run.deviations)
            print(f'{case:10} forward {run.seconds:.1f} s, peak {run.peak_gigabytes:.2f} GiB')
            found += run.deviations
            runs.append(run)
    if options.json is not None:
        record = {
            'torch': torch.__version__,
            'deviations': [dataclasses.asdict(deviation) for deviation in found],
            'full_size': [
                {'case': r.case, 'seconds': r.seconds, 'peak_gigabytes': r.peak_gigabytes}
                for r in runs
            ],
        }
        options.json.write_text(json.dumps(record, indent=1) + '\n')
    failed = [deviation for deviation in found if not deviation.passed]
    print(f'{len(found)} tensors compared, {len(failed)} beyond the limit')
    return 1 if failed or not found else 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Compare the network with the reference.')
    parser.add_argument(
        '--golden', type=Path, required=True, help='folder with the golden cases pub*'
    )
    parser.add_argument('--full', type=Path, help='folder with the full-size JSON files')
    parser.add_argument('--full-cases', nargs='+', choices=FULL_CASES, default=FULL_CASES)
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    return parser.parse_args()


def report(deviations: list[Deviation]) -> None:
    """Print one line per part of the network."""
    for head, worst in worst_by_head(deviations).items():
        flag = '' if worst.passed else '  FAILED'
        figures = f'{worst.error:9.1e} {worst.limit:9.0e}{flag}'
        print(f'{worst.case:10} {head:11} {worst.name:28} {figures}', flush=True)


if __name__ == '__main__':
    raise SystemExit(main())
