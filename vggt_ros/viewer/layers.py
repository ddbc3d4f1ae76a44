# SPDX-License-Identifier: Apache-2.0
"""
What a browser shows of a scene, as nodes of viser's scene tree, sent again only where changed.

The cloud is cut by frames into a few slices of its own node each: when the timeline moves, one of
them is sent anew and the others are shown or hidden; when the scene grows, the old ones stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.viewer.scene import Array, SceneCamera, ViewerScene

_SLICES = 32  # at most
_FRUSTUM = (90, 105, 130)
_SELECTED = (255, 120, 0)
_PATH = (25, 90, 200)


@dataclass(slots=True)
class _Slice:
    node: Any
    xyz: npt.NDArray[np.float32]
    rgb: npt.NDArray[np.uint8]


class CloudLayer:
    """The points."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._slices: dict[int, _Slice] = {}

    def draw(self, scene: ViewerScene, threshold: float, moment: int, size: float) -> int:
        """
        Show the points that were seen up to a frame with at least some confidence.

        :param scene: its points are in order of their frames.
        :param size: of a point, in the unit of the scene.
        :returns: how many points there are now.
        """
        span = _frames_per_slice(len(scene.cameras))
        ends = range(span, len(scene.cameras) + span, span)
        shown = 0
        for number, end in enumerate(ends):
            low, high = np.searchsorted(scene.frame, [end - span, min(end, moment + 1)])
            kept = scene.confidence[low:high] >= threshold
            count = int(kept.sum())
            shown += count
            if count:
                self._put(number, scene.xyz[low:high][kept], scene.rgb[low:high][kept], size)
            elif number in self._slices:
                self._slices[number].node.visible = False
        for number in [number for number in self._slices if number >= len(ends)]:
            self._slices.pop(number).node.remove()
        return shown

    def _put(
        self, number: int, xyz: npt.NDArray[np.float32], rgb: npt.NDArray[np.uint8], size: float
    ) -> None:
        there = self._slices.get(number)
        if there and np.array_equal(there.xyz, xyz) and np.array_equal(there.rgb, rgb):
            there.node.visible = True
            if there.node.point_size != size:
                there.node.point_size = size
            return
        node = self._tree.add_point_cloud(
            f'/cloud/{number}',
            xyz,
            rgb,
            point_size=size,
            point_shape='rounded',
            point_shading='flat',
            precision='float32',
        )
        self._slices[number] = _Slice(node, xyz, rgb)


def _frames_per_slice(frames: int) -> int:
    """Choose a power of two, so that the cuts of a scene that grows seldom move."""
    return 1 << max(math.ceil(math.log2(max(frames, 1) / _SLICES)), 0)


class CameraLayer:
    """The cameras: their pictures, the chosen one, and the way that they went."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._frusta: dict[int, tuple[SceneCamera, Any]] = {}  # by index
        self._path: Any = None
        self._drawn_path = np.zeros((0, 3))
        self._selected: Any = None

    def draw(self, scene: ViewerScene, every: int, moment: int, scale: float, path: bool) -> None:
        """
        Show every n-th camera up to a frame, and mark that frame's.

        :param every: n; 0: no frusta, but the chosen one.
        :param scale: distance of a picture from its camera, in the unit of the scene.
        """
        wanted = set(range(0, moment + 1, every)) - {moment} if every else set()
        for index, (_, node) in list(self._frusta.items()):
            if index >= len(scene.cameras):
                node.remove()
                del self._frusta[index]
            elif index not in wanted:
                node.visible = False
        for index in sorted(wanted):
            self._put(index, scene.cameras[index], scale)
        self._mark(scene.cameras[moment] if scene.cameras else None, scale)
        self._draw_path(scene, moment if path else 0)

    def _put(self, index: int, camera: SceneCamera, scale: float) -> None:
        there = self._frusta.get(index)
        if there and _same(there[0], camera):
            there[1].visible = True
            if there[1].scale != scale:
                there[1].scale = scale
            return
        node = self._tree.add_camera_frustum(
            f'/cameras/{index}',
            **_lens(camera),
            **_pose(camera.world_from_camera),
            scale=scale,
            thickness=1.0,
            thickness_units='screen',
            color=_FRUSTUM,
            image=camera.image,
            cast_shadow=False,
            receive_shadow=False,
        )
        self._frusta[index] = (camera, node)

    def _mark(self, camera: SceneCamera | None, scale: float) -> None:
        """Mark a camera; without its picture, which would hide what is seen from there."""
        if camera is None:
            if self._selected is not None:
                self._selected.remove()
                self._selected = None
            return
        self._selected = self._tree.add_camera_frustum(
            '/selected',
            **_lens(camera),
            **_pose(camera.world_from_camera),
            scale=1.6 * scale,
            thickness=3.0,
            thickness_units='screen',
            color=_SELECTED,
            cast_shadow=False,
            receive_shadow=False,
        )

    def _draw_path(self, scene: ViewerScene, moment: int) -> None:
        places = np.array(
            [camera.world_from_camera[:3, 3] for camera in scene.cameras[: moment + 1]]
        ).reshape(-1, 3)
        if np.array_equal(places, self._drawn_path):
            return
        self._drawn_path = places
        if len(places) > 1:
            self._path = self._tree.add_line_segments(
                '/path',
                np.stack([places[:-1], places[1:]], axis=1),
                _PATH,
                thickness=3.0,
                thickness_units='screen',
            )
        elif self._path is not None:
            self._path.remove()
            self._path = None


def _same(one: SceneCamera, other: SceneCamera) -> bool:
    return (
        np.array_equal(one.world_from_camera, other.world_from_camera)
        and np.array_equal(one.intrinsics, other.intrinsics)
        and np.array_equal(one.image, other.image)
    )


def _lens(camera: SceneCamera) -> dict[str, float]:
    height, width = camera.image.shape[:2]
    return {
        'fov': vertical_field_of_view(camera),
        'aspect': float(width * camera.intrinsics[1, 1] / (height * camera.intrinsics[0, 0])),
    }


def vertical_field_of_view(camera: SceneCamera) -> float:
    """Measure how high a picture is, in radians."""
    return 2 * math.atan(camera.image.shape[0] / 2 / float(camera.intrinsics[1, 1]))


def _pose(world_from_camera: Array) -> dict[str, Array]:
    return {
        'wxyz': _wxyz_from_matrix(world_from_camera[:3, :3]),
        'position': world_from_camera[:3, 3],
    }


def _wxyz_from_matrix(rotation: Array) -> Array:
    """Turn a rotation (3, 3) into a quaternion (4,) in viser's order."""
    xyzw = quaternion_from_matrix(torch.from_numpy(np.ascontiguousarray(rotation))).numpy()
    return np.asarray(xyzw[[3, 0, 1, 2]], np.float64)
