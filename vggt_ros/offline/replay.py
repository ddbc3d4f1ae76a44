# SPDX-License-Identifier: Apache-2.0
"""A finished map goes back to ROS: a bag that replays what the node would have published."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vggt_ros.io.map_bag import MapBag
from vggt_ros.offline.depth_images import read_depth_png
from vggt_ros.offline.joined_map import JoinedMap


def write_bag(folder: Path, joined: JoinedMap, bag: Path) -> None:
    """
    Write the map of a reconstruction as a bag.

    :param folder: of the reconstruction, which has the pictures and their depth.
    :param bag: `.mcap` file to make; it has its name when all of it is written.
    """
    poses = np.stack([frame.world_from_camera for frame in joined.frames])
    stamps = [frame.stamp_ns for frame in joined.frames]
    # rosbag2 makes folders, with one file here
    with TemporaryDirectory(prefix=f'.{bag.stem}', dir=bag.parent) as beside:
        with MapBag(Path(beside) / bag.stem, stamps, poses) as written:
            for i, frame in enumerate(joined.frames):
                picture = folder / 'images' / f'{frame.number:06d}.jpg'
                path = folder / 'depth' / f'{frame.number:06d}.png'
                if not frame.depth_step:
                    continue  # it became part of another map first
                depth = read_depth_png(path, frame.depth_step)
                written.write_frame(
                    i,
                    joined.camera_frame,
                    picture.read_bytes() if picture.exists() else b'',
                    depth,
                    frame.depth_intrinsics,
                )
            for points in joined.points():
                for i in np.unique(points.frame):
                    own = points.frame == i
                    written.write_points(
                        int(i), points.xyz[own], points.rgb[own], points.confidence[own]
                    )
        os.replace(next(Path(beside).glob('*/*.mcap')), bag)
