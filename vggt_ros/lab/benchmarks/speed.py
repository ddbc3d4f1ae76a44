# SPDX-License-Identifier: Apache-2.0
"""
Speed of the network in the engine, relative to computing each window as a whole, in the same run.

Machines differ and are never idle, so the result is a ratio: naive and engine alternate, window by
window. Only the network is timed, from images in memory to depth in memory; `make bench-node`
times the node's own work.
"""

from __future__ import annotations

import copy
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vggt_ros.frames.batch import Batch
from vggt_ros.inference.load import choose_device, choose_precision
from vggt_ros.inference.memory import predict_peak
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.inference.warm_up import Load, make_noise_windows
from vggt_ros.model import VGGT, VGGTConfig, cast_linear_weights
from vggt_ros.model.dpt_head import FRAMES_CHUNK_SIZE
from vggt_ros.model.kernels import compile_layers
from vggt_ros.model.linear_weights import pack_linear_layers
from vggt_ros.model.prediction import HEADS, Prediction

Shape = tuple[int, int, int, int]

_CONFIGS = {'small': VGGTConfig.small, 'vggt_1b': VGGTConfig.vggt_1b}
_NAIVE_HEADS = ('camera', 'depth', 'points')
_MATMUL = 2048  # side of the matrices that measure the device's peak


def benchmark_sizes(
    size: str,
    resolutions: Sequence[tuple[int, int]],
    frames: Sequence[int],
    strides: Sequence[int],
    windows: int,
    device: str = 'auto',
    precision: str = 'auto',
    with_compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """
    Benchmark every combination of resolution, frames and stride.

    :param size: of the network, 'small' or 'vggt_1b'; its weights are random.
    :param resolutions: width and height, pixels.
    :param strides: new frames per window, at most all of them.
    :param device: as the setting of that name, as `precision`.
    :returns: the results of each combination, see `benchmark_network`.
    :raises ValueError: for an unknown device.
    """
    torch_device = choose_device(device)
    dtype = choose_precision(precision, torch_device)
    torch.manual_seed(0)
    model = VGGT(_CONFIGS[size]()).eval().requires_grad_(False)
    if dtype != torch.float32:
        cast_linear_weights(model, dtype)
    model = model.to(torch_device)
    for width, height in resolutions:
        for count in frames:
            for stride in sorted({min(each, count) for each in strides}):
                load = Load(count, stride, height, width)
                results = benchmark_network(model, load, windows, with_compiled)
                yield {
                    'size': size,
                    'frames': count,
                    'stride': stride,
                    'resolution': f'{width}x{height}',
                    'decoded': len(load.depth_frames),
                    'device': str(torch_device),
                    'precision': str(dtype).removeprefix('torch.'),
                    'predicted_memory_bytes': predict_peak(model, load, FRAMES_CHUNK_SIZE),
                    **results,
                }


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the results of `benchmark_sizes` as JSON, with date and machine."""
    machine = {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'machine': f'{platform.machine()}, {torch.get_num_threads()} threads',
        'torch': torch.__version__,
    }
    figures = {'results': list(results)} if len(results) > 1 else results[0]
    path.write_text(json.dumps({**machine, **figures}, indent=1) + '\n')


def benchmark_network(
    model: VGGT, load: Load, windows: int, with_compiled: bool = False
) -> dict[str, Any]:
    """
    Time naive and engine alternately.

    :param model: whose parameters need no gradients, or the FLOPs cannot be counted.
    :param windows: that are timed of each, after one that is not.
    :param with_compiled: time the engine with compiled layers too, as `compiled`.
    :returns: `ratio_to_naive` (of the medians), `windows_per_second`, latencies in s (`p50`, `p95`
        of a window and of one new frame), `flops` of a window and `tflops` per second for both,
        `matmul_tflops` (the device's, by products of large matrices), `floor_ratio` (time over
        that of the engine's FLOPs at this rate), `peak_memory_bytes` (CUDA only, else None).
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
    # counted before: the FLOP counter does not know packed layers
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
            run_compiled = partial(compiled.__call__, batch, HEADS)
            seconds.setdefault('compiled', []).append(_time(device, run_compiled))
    peak = measure_matmul(device)
    results: dict[str, Any] = {}
    for variant, times in seconds.items():
        p50, p95 = (float(value) for value in np.percentile(times, [50, 95]))
        operations = flops['naive' if variant == 'naive' else 'engine']
        results[variant] = {
            'p50': p50,
            'p95': p95,
            'p50_per_new_frame': p50 / load.stride,
            'flops': operations,
            'tflops': operations / p50 / 1e12,
        }
    engine = results['engine']
    if compiled is not None:
        results['ratio_of_compiled'] = engine['p50'] / results['compiled']['p50']
    return {
        'ratio_to_naive': results['naive']['p50'] / engine['p50'],
        'windows_per_second': 1 / engine['p50'],
        'tflops': engine['tflops'],
        'matmul_tflops': peak / 1e12,
        'floor_ratio': engine['p50'] / (engine['flops'] / peak),
        'flops_ratio': flops['naive'] / flops['engine'],
        'peak_memory_bytes': memory,
        **results,
    }


@torch.inference_mode()
def naive_forward(model: VGGT, images: Tensor) -> Prediction:
    """
    Compute a window as a whole, without any of the engine's savings.

    All frames are encoded, all layers of all frames are kept, both dense heads decode every frame,
    and tables of constants are computed anew. The result is that of `VGGT.forward`.

    :param images: (B, S, 3, H, W), on the model's device.
    """
    model.clear_tables()
    size = images.shape[-2], images.shape[-1]
    all_layers = range(model.config.agg.depth)
    tokens = model.aggregate(model.encode(images), model.patch_grid(size), all_layers)
    return model.decode(tokens, size, heads=_NAIVE_HEADS)


def _pack(model: VGGT) -> VGGT:
    """Pack a copy of a model on the CPU, as `load_network` does."""
    if next(model.parameters()).device.type != 'cpu':
        return model
    copied = copy.deepcopy(model)
    pack_linear_layers(copied.aggregator, copied.camera_head)
    return copied


def _compile(model: VGGT, batches: list[Batch]) -> VGGTNetwork:
    """Compile a copy of the model for windows like the second of two consecutive ones."""
    copied = copy.deepcopy(model)
    compile_layers(copied)
    network = VGGTNetwork(copied, 'compiled', False, 'float32')
    for batch in (*batches, batches[0]):
        network(batch, HEADS)
    return network


def measure_matmul(device: torch.device) -> float:
    """
    Measure FLOP/s by products of large matrices, in float32 on a CPU, else in bfloat16.

    On a CPU the faster of two libraries counts, the plain layer's and the packed one's.
    """
    dtype = torch.float32 if device.type == 'cpu' else torch.bfloat16
    matrix = torch.randn(_MATMUL, _MATMUL, device=device, dtype=dtype)
    layer = nn.Sequential(nn.Linear(_MATMUL, _MATMUL, bias=False, device=device, dtype=dtype))
    with torch.inference_mode():
        times = [_median_time(device, lambda: layer(matrix))]
        if pack_linear_layers(layer):
            times.append(_median_time(device, lambda: layer(matrix)))
    return 2 * _MATMUL**3 / min(times)


def _median_time(device: torch.device, work: Callable[[], object]) -> float:
    return float(np.median([_time(device, work) for _ in range(6)][1:]))


def _time(device: torch.device, work: Callable[[], object]) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], object]) -> int:
    """Count floating-point operations; products of packed layers are not counted."""
    # torch's counter knows the attention kernels of CUDA, but not that of the CPU
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        work()
    return int(counter.get_total_flops())


def _count_attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    """Count q kᵀ and its product with v, from shapes (B, heads, tokens, channels)."""
    batch, heads, queries, channels = q
    return 2 * batch * heads * queries * k[2] * (channels + v[3])


def speed_table(results: list[dict[str, Any]]) -> str:
    """Format results as a Markdown table."""
    lines = [
        '| size | frames | stride | pixels | engine s | naive s | ratio | by FLOPs | of peak |',
        '|---|--:|--:|---|--:|--:|--:|--:|--:|',
    ]
    for result in results:
        share = result['tflops'] / result['matmul_tflops']
        lines.append(
            f'| {result["size"]} | {result["frames"]} | {result["stride"]} | '
            f'{result["resolution"]} | '
            f'{result["engine"]["p50"]:.3g} | {result["naive"]["p50"]:.3g} | '
            f'{result["ratio_to_naive"]:.2f} | {result["flops_ratio"]:.2f} | {share:.0%} |'
        )
    ratios = [each['ratio_of_compiled'] for each in results if 'ratio_of_compiled' in each]
    if ratios:
        lines += ['', 'engine s / compiled engine s: ' + ', '.join(f'{r:.2f}' for r in ratios)]
    return '\n'.join(lines)
