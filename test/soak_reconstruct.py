# SPDX-License-Identifier: Apache-2.0
"""
A long recording goes through `reconstruct`, whose memory must stay as it is.

    make soak-offline ARGS='--frames 20000'

Renders a few pictures, shows them to and fro under many names, and follows the resident memory of
the process. Fails if it moves by more than 5 % between a tenth and all of the windows. What is
written in the end (cloud, COLMAP, report) is told beside.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2

from vggt_ros.lab.evaluation.sequences import render_sequence
from vggt_ros.lab.synthetic.sequences import SEQUENCES

PICTURES = 60
LARGEST_CHANGE = 0.05
STRIDE = 4


def make_recording(folder: Path, frames: int) -> None:
    """Link to a few pictures, forwards and backwards."""
    pictures = folder.with_name('pictures')
    pictures.mkdir()
    folder.mkdir()
    for i, image in enumerate(render_sequence(SEQUENCES['handheld'](PICTURES), 0, 96, 128)[0]):
        cv2.imwrite(str(pictures / f'{i}.png'), image[..., ::-1])
    for i in range(frames):
        there = PICTURES - 1 - abs(i % (2 * PICTURES - 2) - (PICTURES - 1))
        (folder / f'{i:06d}.png').symlink_to(pictures / f'{there}.png')


def resident(process: int) -> float:
    """Return MiB."""
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith('VmRSS'):
            return int(line.split()[1]) / 1024
    return 0.0


def follow(child: subprocess.Popen[bytes], windows: Path, expected: int) -> dict[int, float]:
    """Return the memory at each tenth of the windows, and the largest after them under 11."""
    told: dict[int, float] = {}
    while child.poll() is None:
        done = len(list(windows.iterdir())) if windows.exists() else 0
        tenth = 10 * done // expected
        size = resident(child.pid)
        if tenth not in told and 0 < done < expected - 1:
            told[tenth] = size
            print(f'{10 * tenth:3d} %, {done} windows: {size:.1f} MiB', flush=True)
        if done >= expected - 1:
            told.setdefault(10, size)
            told[11] = max(told.get(11, 0.0), size)
        time.sleep(0.5)
    return told


def main() -> int:
    """Soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--frames', type=int, default=20_000)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='vggt_ros_soak_'))
    try:
        make_recording(folder / 'recording', asked.frames)
        begin = time.monotonic()
        command = [sys.executable, '-m', 'vggt_ros.cli.reconstruct', str(folder / 'recording')]
        command += ['--output', str(folder / 'map'), '--checkpoint', 'embedded']
        child = subprocess.Popen([*command, '--min-parallax', '0'], stderr=subprocess.DEVNULL)
        expected = (asked.frames - 8) // STRIDE + 1
        told = follow(child, folder / 'map.partial' / 'windows', expected)
        took = time.monotonic() - begin
    finally:
        shutil.rmtree(folder)
    steady = [told[tenth] for tenth in range(1, 11) if tenth in told]
    if child.returncode or len(steady) < 2:
        print(f'reconstruct ended with {child.returncode} after {took:.0f} s')
        return 1
    change = max(steady) / min(steady) - 1
    print(
        f'{asked.frames} frames in {took:.0f} s: {min(steady):.1f} to {max(steady):.1f} MiB '
        f'({change:.1%}) from 10 to 100 %; up to {told.get(11, 0.0):.1f} MiB while writing files'
    )
    return int(change > LARGEST_CHANGE)


if __name__ == '__main__':
    sys.exit(main())
