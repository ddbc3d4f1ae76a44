# SPDX-License-Identifier: Apache-2.0
"""
A long recording goes through `reconstruct`, whose memory must not grow.

    make soak-offline ARGS='--frames 20000'

Renders a few images, links to them forwards and backwards under many names, and measures the
resident memory of the process. Fails if it changes by more than 5 % between a tenth and all of the
windows. The memory of the export (cloud, COLMAP, report) is printed separately.
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
from vggt_ros.lab.synthetic.trajectories import SEQUENCES

IMAGES = 60
MAX_CHANGE = 0.05
STRIDE = 4


def make_recording(folder: Path, frames: int) -> None:
    """Link to a few images, forwards and backwards."""
    images = folder.with_name('images')
    images.mkdir()
    folder.mkdir()
    for i, image in enumerate(render_sequence(SEQUENCES['handheld'](IMAGES), 0, 96, 128)[0]):
        cv2.imwrite(str(images / f'{i}.png'), image[..., ::-1])
    for i in range(frames):
        shown = IMAGES - 1 - abs(i % (2 * IMAGES - 2) - (IMAGES - 1))
        (folder / f'{i:06d}.png').symlink_to(images / f'{shown}.png')


def resident(process: int) -> float:
    """Return MiB of resident memory."""
    for line in Path(f'/proc/{process}/status').read_text().splitlines():
        if line.startswith('VmRSS'):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(child: subprocess.Popen[bytes], windows: Path, expected: int) -> dict[int, float]:
    """Return MiB at each tenth of the windows, and under 11 the largest of the export."""
    sizes: dict[int, float] = {}
    while child.poll() is None:
        done = len(list(windows.iterdir())) if windows.exists() else 0
        tenth = 10 * done // expected
        size = resident(child.pid)
        if tenth not in sizes and 0 < done < expected - 1:
            sizes[tenth] = size
            print(f'{10 * tenth:3d} %, {done} windows: {size:.1f} MiB', flush=True)
        if done >= expected - 1:
            sizes.setdefault(10, size)
            sizes[11] = max(sizes.get(11, 0.0), size)
        time.sleep(0.5)
    return sizes


def main() -> int:
    """Run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--frames', type=int, default=20_000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix='vggt_ros_soak_'))
    try:
        make_recording(folder / 'recording', arguments.frames)
        begin = time.monotonic()
        command = [sys.executable, '-m', 'vggt_ros.cli.reconstruct', str(folder / 'recording')]
        command += ['--output', str(folder / 'map'), '--checkpoint', 'embedded']
        child = subprocess.Popen([*command, '--min-parallax', '0'], stderr=subprocess.DEVNULL)
        expected = (arguments.frames - 8) // STRIDE + 1
        sizes = measure(child, folder / 'map.partial' / 'windows', expected)
        took = time.monotonic() - begin
    finally:
        shutil.rmtree(folder)
    steady = [sizes[tenth] for tenth in range(1, 11) if tenth in sizes]
    if child.returncode or len(steady) < 2:
        print(f'reconstruct ended with {child.returncode} after {took:.0f} s')
        return 1
    change = max(steady) / min(steady) - 1
    print(
        f'{arguments.frames} frames in {took:.0f} s: {min(steady):.1f} to {max(steady):.1f} MiB '
        f'({change:.1%}) from 10 to 100 %; up to {sizes.get(11, 0.0):.1f} MiB during the export'
    )
    return int(change > MAX_CHANGE)


if __name__ == '__main__':
    sys.exit(main())
