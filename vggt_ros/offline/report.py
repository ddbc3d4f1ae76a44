# SPDX-License-Identifier: Apache-2.0
"""A reconstruction on one page, `report.html`, which needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vggt_ros.geometry.outliers import inlier_mask
from vggt_ros.offline.assembled_map import AssembledMap, MapFrame
from vggt_ros.offline.export import Export
from vggt_ros.offline.folder_files import has_file, write_file
from vggt_ros.offline.frame_images import (
    depth_name,
    image_name,
    read_frame_depth,
    read_frame_image,
)
from vggt_ros.offline.window_record import STEPS

_REPORT = 'report.html'
_PAIRS = 6  # images beside their depth
_WIDTH = 360  # of these, pixels
_MAX_DRAWN = 150_000  # points of the top view
_MAX_UNREADABLE = 50  # listed images
_PATH_COLOUR = '#d62728'

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px;
  padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.warning {{ background: #c00000; color: #fff; padding: .7rem 1rem; border-radius: 4px; }}
.note {{ color: #555; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; }}
th {{ white-space: nowrap; }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr));
  gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ color: #555; font-size: .85rem; }}
</style></head><body>
<h1>{title}</h1>{warning}
<h2>Summary</h2><table>{summary}</table>
<h2>Top view</h2>
<img alt="point cloud and trajectory from above" src="{top}">
<h2>Images and depth</h2>
<p class="note">Depth from {near} (red) to {far} (blue), the same colours in all images; grey:
low confidence, no depth.</p>
<div class="pairs">{pairs}</div>
<h2>Windows</h2>
<img alt="confidence, registration residual, metric scale and time of each window" src="{curves}">
{unreadable}
<h2>Files</h2><table>{files}</table>
</body></html>
"""

_FILES = (
    ('cloud.ply', 'point cloud with colour, confidence and the first frame that saw each point'),
    ('trajectory.tum', 'stamp, position and quaternion x y z w of each frame, camera-to-world'),
    ('sparse/0', 'COLMAP model with tracks; with images/, this folder is a COLMAP data set'),
    ('scene.glb', 'point cloud and trajectory for 3-D viewers'),
    ('depth', '16-bit depth images; multiply by depth_step of reconstruction.json'),
    ('images', 'the images of the map'),
    ('reconstruction.json', 'frames, intrinsics, settings, counts'),
)


def write_report(exported: Export) -> None:
    """Write the page into the folder of the reconstruction."""
    assembled, description = exported.map, exported.description
    warning = description['warning']
    pairs, near, far = _draw_pairs(assembled)
    page = _PAGE.format(
        title=html.escape(description['title']),
        warning=f'<p class="warning">{html.escape(warning)}</p>' if warning else '',
        summary=_rows(_summarise(exported)),
        top=_as_data(_draw_top(exported)),
        near=near,
        far=far,
        pairs=''.join(pairs),
        curves=_as_data(_draw_curves(assembled)),
        unreadable=_list_unreadable(description['unreadable']),
        files=_rows([each for each in _FILES if (assembled.folder / each[0]).exists()]),
    )
    write_file(assembled.folder, _REPORT, page.encode())


def _summarise(exported: Export) -> list[tuple[str, str]]:
    assembled, description = exported.map, exported.description
    centres = np.stack([frame.world_from_camera[:3, 3] for frame in assembled.frames])
    length = float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum())
    height, width = assembled.source_size
    intrinsics = np.median([frame.intrinsics for frame in assembled.frames], axis=0)
    view = np.degrees(2 * np.arctan(width / 2 / intrinsics[0, 0]))
    seconds = sum(sum(window.seconds.values()) for window in assembled.windows)
    source = description['run']['settings']['scale']['scale_source']
    scale = (
        f'metric, scale_source: {html.escape(source)}'
        if assembled.unit == 'm'
        else 'arbitrary: there is no metric scale source, lengths are <b>not metres</b>'
    )
    maps = 1 + len(exported.other_maps)
    unreadable = len(description['unreadable'])
    summary = [
        ('network', html.escape(description['model'])),
        ('images', f'{description["received"]} read, {len(assembled.frames)} in the map, '
         f'{description["no_parallax"]} skipped for lack of parallax (stationary camera)'
         + (f', {unreadable} unreadable, see below' if unreadable else '')),
        ('image size', f'{width} x {height} pixels, horizontal field of view {view:.1f} degrees'),
        ('windows', f'{len(assembled.windows)}, processed in {seconds:.1f} s'),
        ('maps', '1' if maps == 1 else f'{maps}; this is the largest, see other_maps'),
        ('loop closures', str(sum(window.loop_closed for window in assembled.windows))),
        ('scale', scale),
        ('trajectory length', f'{length:.2f} {assembled.unit}'),
        ('point cloud', f'{len(exported.cloud.xyz)} points, voxel size '
         f'{exported.cloud.voxel:.3g} {assembled.unit}'),
    ]  # fmt: skip
    refined = description.get('refinement')
    return summary + ([('bundle adjustment', html.escape(refined))] if refined else [])


def _rows(rows: list[tuple[str, str]]) -> str:
    return ''.join(f'<tr><th>{name}</th><td>{text}</td></tr>' for name, text in rows)


def _list_unreadable(unreadable: list[str]) -> str:
    if not unreadable:
        return ''
    lines = [f'<li>{html.escape(line)}</li>' for line in unreadable[:_MAX_UNREADABLE]]
    if len(unreadable) > len(lines):
        lines.append(f'<li>and {len(unreadable) - len(lines)} more</li>')
    return f'<h2>Unreadable images ({len(unreadable)})</h2><ul>{"".join(lines)}</ul>'


def _draw_pairs(assembled: AssembledMap) -> tuple[list[str], str, str]:
    """Return some images beside their depth, and the range of their colours."""
    folder = assembled.folder
    frames = [
        frame
        for frame in assembled.frames
        if frame.depth_step
        and has_file(folder, image_name(frame.frame_id))
        and has_file(folder, depth_name(frame.frame_id))
    ]
    if not frames:
        return ['<p class="note">There are no images: --no-images.</p>'], 'near', 'far'
    few = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, _PAIRS).astype(int))]
    depths = [read_frame_depth(folder, f.frame_id, f.depth_step, f.depth_size) for f in few]
    known = np.concatenate([depth[np.isfinite(depth)] for depth in depths])
    near, far = np.percentile(known, (2, 98)) if len(known) else (0.0, 1.0)
    pairs = [
        _draw_pair(assembled, frame, depth, near, far)
        for frame, depth in zip(few, depths, strict=True)
    ]
    return pairs, f'{near:.2f}', f'{far:.2f} {assembled.unit}'


def _draw_pair(
    assembled: AssembledMap,
    frame: MapFrame,
    depth: npt.NDArray[np.float32],
    near: float,
    far: float,
) -> str:
    image = read_frame_image(assembled.folder, frame.frame_id)
    size = (_WIDTH, max(round(_WIDTH * image.shape[0] / image.shape[1]), 1))
    left = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    right = cv2.resize(_colour(depth, near, far), size, interpolation=cv2.INTER_NEAREST)
    known = depth[np.isfinite(depth)]
    median = f'{np.median(known):.2f} {assembled.unit}' if len(known) else 'unknown'
    return (
        f'<figure><img alt="image and depth" src="{_as_jpeg(np.hstack([left, right]))}">'
        f'<figcaption>{Path(image_name(frame.frame_id)).name}: median depth {median}, '
        f'{len(known) / depth.size:.0%} of the pixels confident</figcaption></figure>'
    )


def _colour(depth: npt.NDArray[np.float32], near: float, far: float) -> npt.NDArray[np.uint8]:
    share = np.clip((depth - near) / max(far - near, 1e-9), 0, 1)
    levels = np.nan_to_num(255 * (1 - share)).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    coloured[~np.isfinite(depth)] = 187
    return coloured  # type: ignore[return-value]


def _draw_top(exported: Export) -> Figure:
    figure = Figure(figsize=(11.5, 6.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit, cloud = exported.map.unit, exported.cloud
    if len(cloud.xyz):
        shown = np.flatnonzero(inlier_mask(cloud.xyz))
        shown = shown[:: max(1, -(-len(shown) // _MAX_DRAWN))]
        shown = shown[np.argsort(-cloud.xyz[shown, 1])]  # y points down: the highest are on top
        x, z = cloud.xyz[shown][:, [0, 2]].T
        axes.scatter(x, z, s=1.0, c=cloud.rgb[shown] / 255, linewidths=0)
    poses = np.stack([frame.world_from_camera for frame in exported.map.frames])
    axes.plot(*poses[:, [0, 2], 3].T, color=_PATH_COLOUR, linewidth=2, label='trajectory')
    axes.plot(*poses[0, [0, 2], 3], 'o', color=_PATH_COLOUR, markersize=9, label='start')
    few = poses[np.unique(np.linspace(0, len(poses) - 1, 12).astype(int))]
    axes.quiver(*few[:, [0, 2], 3].T, *few[:, [0, 2], 2].T, color=_PATH_COLOUR, angles='xy',
                scale=22, width=0.003)  # fmt: skip
    axes.set_title('point cloud and trajectory from above; arrows: viewing directions')
    axes.set_xlabel(f'x, to the right of the first camera ({unit})')
    axes.set_ylabel(f'z, forward from the first camera ({unit})')
    axes.set_aspect('equal', adjustable='datalim')
    axes.legend(loc='best')
    axes.grid(alpha=0.3)
    return figure


def _draw_curves(assembled: AssembledMap) -> Figure:
    figure = Figure(figsize=(11.5, 6.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    windows = assembled.windows
    first = windows[0].stamp_ns
    times = np.array([(window.stamp_ns - first) * 1e-9 for window in windows])
    mark = 'o-' if len(windows) < 60 else '-'
    axes[0, 0].plot(times, [window.confidence for window in windows], mark)
    axes[0, 0].set_title('mean confidence of the depth (1: none)')
    axes[0, 1].plot(times, [100 * window.residual for window in windows], mark)
    axes[0, 1].set_title('registration residual, % of the depth')
    scales = [window.map_scale if window.map_scale_valid else np.nan for window in windows]
    axes[1, 0].plot(times, scales, mark)
    axes[1, 0].set_title('metric scale, metres per map unit')
    if not np.isfinite(scales).any():
        axes[1, 0].text(0.5, 0.5, 'unknown', ha='center', transform=axes[1, 0].transAxes)
    bottom = np.zeros(len(windows))
    width = 0.8 * (np.diff(times).min() if len(times) > 1 else 1.0)
    for step in STEPS:
        milliseconds = 1000 * np.array([window.seconds[step] for window in windows])
        axes[1, 1].bar(times, milliseconds, width, bottom, label=step)
        bottom += milliseconds
    axes[1, 1].set_title('processing time per window, ms')
    axes[1, 1].legend()
    for each in axes.ravel():
        each.grid(alpha=0.3)
        each.set_ylim(0, 1.05 * each.get_ylim()[1])
    for each in axes[1]:
        each.set_xlabel('time since the first window, s')
    return figure


def _as_data(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def _as_jpeg(image: npt.NDArray[Any]) -> str:
    _, data = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return 'data:image/jpeg;base64,' + base64.b64encode(data.tobytes()).decode()
