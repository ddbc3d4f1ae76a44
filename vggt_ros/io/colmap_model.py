# SPDX-License-Identifier: Apache-2.0
"""Maps as sparse models of COLMAP, written by pycolmap; its pixels begin at an image's corner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pycolmap

from vggt_ros.geometry.poses import Array

_CORNER = 0.5  # of the first pixel, from its centre


@dataclass(frozen=True, slots=True)
class ColmapModel:
    """What is written: one pinhole camera, S pictures, K points, O observations."""

    size: tuple[int, int]  # H, W of the pictures
    intrinsics: Array  # (3, 3), pixel centres at integer coordinates
    names: tuple[str, ...]  # S files
    camera_from_world: Array  # (S, 4, 4)
    xyz: npt.NDArray[np.floating]  # (K, 3)
    rgb: npt.NDArray[np.uint8]  # (K, 3)
    errors: npt.NDArray[np.floating]  # (K,), mean reprojection error, pixels
    point: npt.NDArray[np.integer]  # (O,), index of the point
    image: npt.NDArray[np.integer]  # (O,), index of the picture that shows it
    pixels: npt.NDArray[np.floating]  # (O, 2), where


def write_colmap(folder: Path, model: ColmapModel) -> None:
    """Write `cameras.bin`, `images.bin`, `points3D.bin` and what COLMAP wants beside them."""
    written = pycolmap.Reconstruction()
    height, width = model.size
    fx, fy = model.intrinsics[0, 0], model.intrinsics[1, 1]
    cx, cy = model.intrinsics[:2, 2] + _CORNER
    written.add_camera_with_trivial_rig(
        pycolmap.Camera(
            model='PINHOLE', width=width, height=height, params=[fx, fy, cx, cy], camera_id=1
        )
    )
    order = np.argsort(model.image, kind='stable')
    starts = np.searchsorted(model.image[order], np.arange(len(model.names) + 1))
    tracks = [pycolmap.Track() for _ in model.xyz]
    for i, name in enumerate(model.names):
        own = order[starts[i] : starts[i + 1]]
        image = pycolmap.Image(name=name, camera_id=1, image_id=i + 1)
        image.points2D = pycolmap.Point2DList(
            [pycolmap.Point2D(pixel + _CORNER) for pixel in model.pixels[own].astype(np.float64)]
        )
        pose = model.camera_from_world[i]
        written.add_image_with_trivial_frame(
            image, pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:3, :3]), pose[:3, 3])
        )
        for at, point in enumerate(model.point[own].tolist()):
            tracks[point].add_element(i + 1, at)
    for xyz, rgb, error, track in zip(
        model.xyz.astype(np.float64), model.rgb, model.errors, tracks, strict=True
    ):
        number = written.add_point3D(xyz, track, rgb)
        written.points3D[number].error = float(error)
    folder.mkdir(parents=True, exist_ok=True)
    written.write(folder)
