# SPDX-License-Identifier: Apache-2.0
"""A reconstruction on one page: `report.html`, which needs no other file and no network."""

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

from vggt_ros.geometry.outliers import without_outliers
from vggt_ros.io.images import read_image
from vggt_ros.offline.atomic_write import atomic_writer
from vggt_ros.offline.depth_images import read_depth_png
from vggt_ros.offline.export import Export
from vggt_ros.offline.joined_map import JoinedMap
from vggt_ros.offline.record import STEPS

REPORT = 'report.html'
_PAIRS = 6  # pictures beside their depth
_WIDTH = 360  # of these, pixels
_DRAWN = 150_000  # points of the top view
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
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr));
  gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ color: #555; font-size: .85rem; }}
</style></head><body>
<h1>{title}</h1>{warning}
<h2>In figures</h2><table>{figures}</table>
<h2>From above</h2>
<img alt="path and cloud from above" src="{top}">
<h2>Pictures and their depth</h2>
<p class="note">Near is red, far is blue; grey pixels are not trusted. All have the same scale.</p>
<div class="pairs">{pairs}</div>
<h2>Window by window</h2>
<img alt="confidence, scale, registration and time of each window" src="{curves}">
{left_out}
<h2>Files</h2><table>{files}</table>
</body></html>
"""

_FILES = (
    ('cloud.ply', 'points with colour, confidence and the frame that saw them first'),
    ('trajectory.tum', 'stamp, position, quaternion x y z w of each frame, camera-to-world'),
    ('sparse/0', 'COLMAP model with tracks; this folder is a COLMAP data set'),
    ('scene.glb', 'cloud and path for viewers of 3-D models'),
    ('depth', 'depth of each frame as 16-bit PNG; times depth_step of reconstruction.json'),
    ('images', 'the pictures that were used'),
    ('reconstruction.json', 'frames, intrinsics, settings, counts'),
)


def write_report(folder: Path, made: Export, unreadable: list[str]) -> None:
    """
    Write the page.

    :param unreadable: pictures that were left out, and why.
    """
    about = made.description
    warning = f'<p class="warning">{html.escape(about["warning"])}</p>' if about['warning'] else ''
    page = _PAGE.format(
        title=html.escape(about['title']),
        warning=warning,
        figures=_rows(_figures(made)),
        top=_as_data(_draw_top(made)),
        pairs=''.join(_pairs(folder, made)),
        curves=_as_data(_draw_curves(made.joined)),
        left_out=_left_out(unreadable),
        files=_rows([(name, text) for name, text in _FILES if (folder / name).exists()]),
    )
    with atomic_writer(folder / REPORT) as file:
        file.write(page.encode())


def _figures(made: Export) -> list[tuple[str, str]]:
    joined, about = made.joined, made.description
    centres = np.stack([frame.world_from_camera[:3, 3] for frame in joined.frames])
    length = float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum())
    height, width = joined.source_size
    intrinsics = np.median([frame.intrinsics for frame in joined.frames], axis=0)
    view = np.degrees(2 * np.arctan(width / 2 / intrinsics[0, 0]))
    seconds = sum(float(window.seconds.sum()) for window in joined.windows)
    spoken = {
        'm': f'metres, by scale_source {about["run"]["settings"]["scale"]["scale_source"]}',
    }.get(joined.unit, "the network's own: lengths are <b>not metres</b> (no scale source)")
    maps = 1 + len(made.other_maps)
    told = [
        ('network', html.escape(about['model'])),
        ('pictures', f'{about["received"]} read, {len(joined.frames)} of {width}x{height} in the '
         f'map, {about["no_parallax"]} left out since the camera stood still'),
        ('windows', f'{len(joined.windows)} in {seconds:.1f} s of computing'),
        ('maps', '1' if maps == 1 else f'{maps}: this is the largest, see other_maps'),
        ('loops closed', str(sum(window.loop for window in joined.windows))),
        ('unit of length', spoken),
        ('length of the way', f'{length:.2f} {joined.unit}'),
        ('horizontal field of view', f'{view:.1f} degrees'),
        ('points', f'{len(made.cloud.xyz)}, in voxels of {made.cloud.voxel:.3g} {joined.unit}'),
    ]  # fmt: skip
    refined = about.get('refinement')
    return told + ([('bundle adjustment', html.escape(refined))] if refined else [])


def _rows(rows: list[tuple[str, str]]) -> str:
    return ''.join(f'<tr><th>{name}</th><td>{text}</td></tr>' for name, text in rows)


def _left_out(unreadable: list[str]) -> str:
    if not unreadable:
        return ''
    lines = ''.join(f'<li>{html.escape(line)}</li>' for line in unreadable[:50])
    return f'<h2>{len(unreadable)} unreadable pictures were left out</h2><ul>{lines}</ul>'


def _pairs(folder: Path, made: Export) -> list[str]:
    frames = [f for f in made.description['frames'] if f['image'] and f['depth']]
    if not frames:
        return ['<p class="note">No pictures were kept.</p>']
    few = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, _PAIRS).astype(int))]
    depths = [read_depth_png(folder / f['depth'], f['depth_step']) for f in few]
    seen = np.concatenate([depth[np.isfinite(depth)] for depth in depths])
    low, high = np.percentile(seen, (2, 98)) if len(seen) else (0.0, 1.0)
    pairs = []
    for frame, depth in zip(few, depths, strict=True):
        image = read_image(folder / frame['image'])
        size = (_WIDTH, round(_WIDTH * image.shape[0] / image.shape[1]))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        shown = cv2.resize(_colour(depth, low, high), size, interpolation=cv2.INTER_NEAREST)
        known = depth[np.isfinite(depth)]
        middle = f'{np.median(known):.2f} {made.joined.unit}' if len(known) else 'unknown'
        pairs.append(
            f'<figure><img alt="picture and depth" src="{_as_jpeg(np.hstack([small, shown]))}">'
            f'<figcaption>{Path(frame["image"]).name}: median depth {middle}, '
            f'{np.isfinite(depth).mean():.0%} trusted</figcaption></figure>'
        )
    return pairs


def _colour(depth: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.uint8]:
    share = np.clip((depth - low) / max(high - low, 1e-9), 0, 1)
    grey = np.nan_to_num(255 * (1 - share)).astype(np.uint8)
    drawn = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    drawn[~np.isfinite(depth)] = 187
    return drawn  # type: ignore[return-value]


def _draw_top(made: Export) -> Figure:
    figure = Figure(figsize=(11.5, 6.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit, cloud = made.joined.unit, made.cloud
    if len(cloud.xyz):
        shown = np.flatnonzero(without_outliers(cloud.xyz))
        shown = shown[:: max(1, -(-len(shown) // _DRAWN))]
        shown = shown[np.argsort(-cloud.xyz[shown, 1])]  # y points down: what is high comes last
        x, z = cloud.xyz[shown][:, [0, 2]].T
        axes.scatter(x, z, s=1.0, c=cloud.rgb[shown] / 255, linewidths=0)
    poses = np.stack([frame.world_from_camera for frame in made.joined.frames])
    axes.plot(*poses[:, [0, 2], 3].T, color=_PATH_COLOUR, linewidth=2, label='camera path')
    axes.plot(*poses[0, [0, 2], 3], 'o', color=_PATH_COLOUR, markersize=9, label='start')
    few = poses[np.unique(np.linspace(0, len(poses) - 1, 12).astype(int))]
    axes.quiver(*few[:, [0, 2], 3].T, *few[:, [0, 2], 2].T, color=_PATH_COLOUR, angles='xy',
                scale=22, width=0.003)  # fmt: skip
    axes.set_title('cloud and camera path from above; arrows look along the camera')
    axes.set_xlabel(f'x, right of the first camera ({unit})')
    axes.set_ylabel(f'z, ahead of the first camera ({unit})')
    axes.set_aspect('equal', adjustable='datalim')
    axes.legend(loc='best')
    axes.grid(alpha=0.3)
    return figure


def _draw_curves(joined: JoinedMap) -> Figure:
    figure = Figure(figsize=(11.5, 6.5), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    windows = joined.windows
    first = windows[0].stamp_ns
    when = np.array([(window.stamp_ns - first) * 1e-9 for window in windows])
    mark = 'o-' if len(windows) < 60 else '-'
    axes[0, 0].plot(when, [window.confidence for window in windows], mark)
    axes[0, 0].set_title('mean confidence of the depth (1 is none)')
    axes[0, 1].plot(when, [100 * window.residual for window in windows], mark)
    axes[0, 1].set_title('residual against the window before, % of the depth')
    known = [window.factor if window.factor_valid else np.nan for window in windows]
    axes[1, 0].plot(when, known, mark)
    axes[1, 0].set_title('metres in one unit of the map' + ('' if np.isfinite(known).any() else
                         ': unknown'))  # fmt: skip
    bottom = np.zeros(len(windows))
    width = 0.8 * (np.diff(when).min() if len(when) > 1 else 1.0)
    for i, step in enumerate(STEPS):
        told = 1000 * np.array([window.seconds[i] for window in windows])
        axes[1, 1].bar(when, told, width, bottom, label=step)
        bottom += told
    axes[1, 1].set_title('time of each step, ms')
    axes[1, 1].legend()
    for each in axes.ravel():
        each.grid(alpha=0.3)
        each.set_ylim(bottom=0)
    for each in axes[1]:
        each.set_xlabel('s of the recording')
    return figure


def _as_data(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format='png')
    return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def _as_jpeg(image: npt.NDArray[Any]) -> str:
    _, data = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return 'data:image/jpeg;base64,' + base64.b64encode(data.tobytes()).decode()
