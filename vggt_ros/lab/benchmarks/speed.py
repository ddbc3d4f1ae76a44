# SPDX-License-Identifier: Apache-2.0
"""
How fast windows are computed, against computing each of them as a whole, in the same run.

Machines differ and are never quiet, so the figure is a ratio: naive and engine take turns, window
by window. What is compared is the network alone, from images in memory to depth in memory; the
node's own work is `make soak`'s.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vggt_ros.frames.batch import Batch
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.inference.warm_up import Load, make_noise_windows
from vggt_ros.lab.benchmarks.naive_forward import naive_forward
from vggt_ros.model import VGGT
from vggt_ros.model.kernels import compile_layers
from vggt_ros.model.linear_weights import pack_linear_layers
from vggt_ros.model.prediction import HEADS

Size = tuple[int, int, int, int]

_MATMUL = 2048  # side of the matrices by which the device's peak is measured


def benchmark_network(
    model: VGGT, load: Load, windows: int, with_compiled: bool = False
) -> dict[str, Any]:
    """
    Time naive and engine in turn.

    :param model: whose parameters need no gradients, or the FLOPs cannot be counted.
    :param windows: of each that are counted, after one that is not.
    :param with_compiled: time the engine with compiled layers too, as `compiled`.
    :returns: `ratio_to_naive` (of the medians), `windows_per_second`, latencies in s (`p50`, `p95`
        of a window and of one new frame), `flops` of a window and `tflops` per second for both,
        `matmul_tflops` (the device's, by products of large matrices), `floor_ratio` (time against
        the engine's FLOPs at that rate), `peak_memory_bytes` (CUDA only, else None).
    """
    batches = make_noise_windows(load, windows + 1)
    network = VGGTNetwork(model, 'benchmark', False, 'float32')
    device = torch.device(network.device)
    network(batches[0], HEADS)
    naive_forward(model, batches[0].stack(device)[None])

    def run_engine(batch: Batch) -> None:
        network(batch, HEADS)

    def run_naive(batch: Batch) -> None:
        naive_forward(model, batch.stack(device)[None]).cpu()

    flops = {
        'engine': count_flops(partial(run_engine, batches[1])),
        'naive': count_flops(partial(run_naive, batches[1])),
    }
    # counted before: the counter of operations does not know packed layers
    network = VGGTNetwork(_pack(model), 'benchmark', False, 'float32')
    network(batches[0], HEADS)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = {'naive': [], 'engine': []}
    compiled = _compile(model, batches[:2]) if with_compiled else None
    memory = None
    for batch in batches[1:]:
        seconds['engine'].append(_time(device, partial(run_engine, batch)))
        if device.type == 'cuda':
            memory = torch.cuda.max_memory_allocated(device)
        seconds['naive'].append(_time(device, partial(run_naive, batch)))
        if compiled is not None:
            told = _time(device, lambda batch=batch: compiled(batch, HEADS))  # type: ignore[misc]
            seconds.setdefault('compiled', []).append(told)
    peak = measure_matmul(device)
    found: dict[str, Any] = {}
    for way, times in seconds.items():
        p50, p95 = np.percentile(times, [50, 95])
        found[way] = {
            'p50': float(p50),
            'p95': float(p95),
            'p50_per_new_frame': float(p50) / load.stride,
            'flops': flops['naive' if way == 'naive' else 'engine'],
            'tflops': flops['naive' if way == 'naive' else 'engine'] / float(p50) / 1e12,
        }
    engine = found['engine']
    return {
        'ratio_to_naive': found['naive']['p50'] / engine['p50'],
        'windows_per_second': 1 / engine['p50'],
        'tflops': engine['tflops'],
        'matmul_tflops': peak / 1e12,
        'floor_ratio': engine['p50'] / (engine['flops'] / peak),
        'flops_ratio': flops['naive'] / flops['engine'],
        'peak_memory_bytes': memory,
        **({'ratio_of_compiled': engine['p50'] / found['compiled']['p50']} if compiled else {}),
        **found,
    }


def _pack(model: VGGT) -> VGGT:
    """Pack a copy of a model on the CPU, as `load_network` does."""
    if next(model.parameters()).device.type != 'cpu':
        return model
    copied = copy.deepcopy(model)
    pack_linear_layers(copied.aggregator, copied.camera_head)
    return copied


def _compile(model: VGGT, batches: list[Batch]) -> VGGTNetwork:
    """Compile a copy of the model for windows like the second, of which the first goes before."""
    copied = copy.deepcopy(model)
    compile_layers(copied)
    network = VGGTNetwork(copied, 'compiled', False, 'float32')
    for batch in (*batches, batches[0]):
        network(batch, HEADS)
    return network


def measure_matmul(device: torch.device) -> float:
    """
    Measure FLOP/s by products of large matrices, in float32 on a CPU, else in bfloat16.

    On a CPU by the better of two libraries, the plain layer's and the packed one's.
    """
    kind = torch.float32 if device.type == 'cpu' else torch.bfloat16
    one = torch.randn(_MATMUL, _MATMUL, device=device, dtype=kind)
    layer = nn.Sequential(nn.Linear(_MATMUL, _MATMUL, bias=False, device=device, dtype=kind))
    with torch.inference_mode():
        times = [_median_time(device, lambda: layer(one))]
        if pack_linear_layers(layer):
            times.append(_median_time(device, lambda: layer(one)))
    return 2 * _MATMUL**3 / min(times)


def _median_time(device: torch.device, work: Callable[[], object]) -> float:
    return float(np.median([_time(device, work) for _ in range(6)][1:]))


def _time(device: torch.device, work: Callable[[], object]) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], object]) -> int:
    """Count the operations of some work; products of packed layers are not known."""
    # torch's counter knows the attention kernels of CUDA, but not that of the CPU
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        work()
    return int(counter.get_total_flops())


def _count_attention(q: Size, k: Size, v: Size, *_: object, **__: object) -> int:
    """Count q kᵀ and what is made of it and v, from their shapes (B, heads, tokens, channels)."""
    batch, heads, queries, channels = q
    return 2 * batch * heads * queries * k[2] * (channels + v[3])


def speed_table(found: list[dict[str, Any]]) -> str:
    """Lay results out for a person, as Markdown."""
    lines = [
        '| size | frames | stride | pixels | engine s | naive s | ratio | by FLOPs | of peak |',
        '|---|--:|--:|---|--:|--:|--:|--:|--:|',
    ]
    for each in found:
        share = each['tflops'] / each['matmul_tflops']
        lines.append(
            f'| {each["size"]} | {each["frames"]} | {each["stride"]} | {each["resolution"]} | '
            f'{each["engine"]["p50"]:.3g} | {each["naive"]["p50"]:.3g} | '
            f'{each["ratio_to_naive"]:.2f} | {each["flops_ratio"]:.2f} | {share:.0%} |'
        )
    told = [each['ratio_of_compiled'] for each in found if 'ratio_of_compiled' in each]
    if told:
        lines += ['', 'engine s / compiled engine s: ' + ', '.join(f'{t:.2f}' for t in told)]
    return '\n'.join(lines)
