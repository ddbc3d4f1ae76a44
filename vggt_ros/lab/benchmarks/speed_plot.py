# SPDX-License-Identifier: Apache-2.0
"""How time and memory of a window grow with its frames: a picture of the benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator


def draw_speed(found: Sequence[dict[str, Any]], path: Path) -> None:
    """
    Draw results as PNG.

    :param found: of `cli.benchmark`, of one size of network and one device.
    """
    figure = Figure(figsize=(11, 4.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    for resolution in dict.fromkeys(each['resolution'] for each in found):
        own = [each for each in found if each['resolution'] == resolution]
        for stride in sorted({each['stride'] for each in own}):
            line = sorted((e for e in own if e['stride'] == stride), key=lambda e: e['frames'])
            frames = [each['frames'] for each in line]
            took = [1e3 * each['engine']['p50'] for each in line]
            time.plot(frames, took, 'o-', label=f'engine, {resolution}, {stride} new')
            measured = [each['peak_memory_bytes'] for each in line]
            if None not in measured:
                told = [each / 1e6 for each in measured]
                memory.plot(frames, told, 's--', label=f'measured, {resolution}, {stride} new')
        predicted = {each['frames']: each['predicted_memory_bytes'] / 1e6 for each in own}
        memory.plot(*zip(*sorted(predicted.items())), 'o-', label=f'predicted, {resolution}')
        whole = {each['frames']: 1e3 * each['naive']['p50'] for each in own}
        time.plot(*zip(*sorted(whole.items())), 'k:', label=f'whole windows, {resolution}')
    time.set_ylabel('time for a window, ms (median)')
    memory.set_ylabel('memory with the weights, MB')
    for axes in (time, memory):
        axes.set_xlabel('frames in a window')
        axes.set_xscale('log', base=2)
        axes.set_xticks(sorted({each['frames'] for each in found}))
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FormatStrFormatter('%g'))
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=8)
    figure.suptitle(f'{found[0]["size"]} on {found[0]["device"]}, {found[0]["precision"]}')
    figure.savefig(path)
