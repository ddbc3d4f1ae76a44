# SPDX-License-Identifier: Apache-2.0
"""
Cloud and cameras of a scene as nodes of viser's scene tree; only what changed is sent again.

The cloud is split by frames into a few slices, each a node of its own: when the timeline moves,
one of them is sent again and the others are shown or hidden; when the scene grows, old ones stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.geometry.rotation import quaternion_from_matrix
from vggt_ros.viewer.scene import Array, SceneCamera, ViewerScene, camera_positions

_MAX_SLICES = 32
_FRUSTUM_COLOUR = (90, 105, 130)
_SELECTED_COLOUR = (255, 120, 0)
_TRAJECTORY_COLOUR = (25, 90, 200)


@dataclass(slots=True)
class _Slice:
    node: Any
    xyz: npt.NDArray[np.float32]
    rgb: npt.NDArray[np.uint8]


class CloudLayer:
    """The points."""

    def __init__(self, scene_api: Any) -> None:
        self._scene_api = scene_api
        self._slices: dict[int, _Slice] = {}

    @property
    def nodes(self) -> dict[int, Any]:
        """The scene nodes of the slices, by index."""
        return {index: part.node for index, part in self._slices.items()}

    def draw(self, scene: ViewerScene, threshold: float, frame: int, size: float) -> int:
        """
        Show the points observed up to a frame with at least some confidence.

        :param scene: its points are sorted by frame.
        :param size: of a point, in the unit of the scene.
        :returns: the number of points shown.
        """
        span = _frames_per_slice(len(scene.cameras))
        ends = range(span, len(scene.cameras) + span, span)
        shown = 0
        for index, end in enumerate(ends):
            low, high = np.searchsorted(scene.frame, [end - span, min(end, frame + 1)])
            mask = scene.confidence[low:high] >= threshold
            count = int(mask.sum())
            shown += count
            if count:
                self._show(index, scene.xyz[low:high][mask], scene.rgb[low:high][mask], size)
            elif index in self._slices:
                self._slices[index].node.visible = False
        for index in [index for index in self._slices if index >= len(ends)]:
            self._slices.pop(index).node.remove()
        return shown

    def _show(
        self, index: int, xyz: npt.NDArray[np.float32], rgb: npt.NDArray[np.uint8], size: float
    ) -> None:
        old = self._slices.get(index)
        if old and np.array_equal(old.xyz, xyz) and np.array_equal(old.rgb, rgb):
            old.node.visible = True
            if old.node.point_size != size:
                old.node.point_size = size
            return
        node = self._scene_api.add_point_cloud(
            f'/cloud/{index}',
            xyz,
            rgb,
            point_size=size,
            point_shape='rounded',
            point_shading='flat',
            precision='float32',
        )
        self._slices[index] = _Slice(node, xyz, rgb)


def _frames_per_slice(frames: int) -> int:
    """Choose a power of two, so that the boundaries seldom move when a scene grows."""
    return 1 << max(math.ceil(math.log2(max(frames, 1) / _MAX_SLICES)), 0)


class CameraLayer:
    """The cameras: frusta with images, the selected camera, and the trajectory."""

    def __init__(self, scene_api: Any) -> None:
        self._scene_api = scene_api
        self._frusta: dict[int, tuple[SceneCamera, Any]] = {}  # by index
        self._trajectory: Any = None
        self._drawn_positions: Array = np.zeros((0, 3))
        self._selected: Any = None

    def draw(
        self, scene: ViewerScene, step: int, frame: int, scale: float, show_trajectory: bool
    ) -> None:
        """
        Show every n-th camera up to a frame, and highlight the camera of that frame.

        :param step: n; 0: only the highlighted camera.
        :param scale: distance of an image from its camera, in the unit of the scene.
        """
        visible = set(range(0, frame + 1, step)) - {frame} if step else set()
        for index, (_, node) in list(self._frusta.items()):
            if index >= len(scene.cameras):
                node.remove()
                del self._frusta[index]
            elif index not in visible:
                node.visible = False
        for index in sorted(visible):
            self._show(index, scene.cameras[index], scale)
        self._highlight(scene.cameras[frame] if scene.cameras else None, scale)
        self._draw_trajectory(scene, frame if show_trajectory else 0)

    def _show(self, index: int, camera: SceneCamera, scale: float) -> None:
        old = self._frusta.get(index)
        if old and _equal(old[0], camera):
            old[1].visible = True
            if old[1].scale != scale:
                old[1].scale = scale
            return
        node = self._scene_api.add_camera_frustum(
            f'/cameras/{index}',
            **_projection(camera),
            **_pose(camera.world_from_camera),
            scale=scale,
            thickness=1.0,
            thickness_units='screen',
            color=_FRUSTUM_COLOUR,
            image=camera.image,
            cast_shadow=False,
            receive_shadow=False,
        )
        self._frusta[index] = (camera, node)

    def _highlight(self, camera: SceneCamera | None, scale: float) -> None:
        """Highlight a camera; without its image, which would hide the view from there."""
        if camera is None:
            if self._selected is not None:
                self._selected.remove()
                self._selected = None
            return
        self._selected = self._scene_api.add_camera_frustum(
            '/selected',
            **_projection(camera),
            **_pose(camera.world_from_camera),
            scale=1.6 * scale,
            thickness=3.0,
            thickness_units='screen',
            color=_SELECTED_COLOUR,
            cast_shadow=False,
            receive_shadow=False,
        )

    def _draw_trajectory(self, scene: ViewerScene, frame: int) -> None:
        positions = camera_positions(scene.cameras[: frame + 1])
        if np.array_equal(positions, self._drawn_positions):
            return
        self._drawn_positions = positions
        if len(positions) > 1:
            self._trajectory = self._scene_api.add_line_segments(
                '/trajectory',
                np.stack([positions[:-1], positions[1:]], axis=1),
                _TRAJECTORY_COLOUR,
                thickness=3.0,
                thickness_units='screen',
            )
        elif self._trajectory is not None:
            self._trajectory.remove()
            self._trajectory = None


def _equal(one: SceneCamera, other: SceneCamera) -> bool:
    return (
        np.array_equal(one.world_from_camera, other.world_from_camera)
        and np.array_equal(one.intrinsics, other.intrinsics)
        and np.array_equal(one.image, other.image)
    )


def _projection(camera: SceneCamera) -> dict[str, float]:
    height, width = camera.image.shape[:2]
    return {
        'fov': camera.vertical_fov,
        'aspect': float(width * camera.intrinsics[1, 1] / (height * camera.intrinsics[0, 0])),
    }


def _pose(world_from_camera: Array) -> dict[str, Array]:
    return {
        'wxyz': _wxyz_from_matrix(world_from_camera[:3, :3]),
        'position': world_from_camera[:3, 3],
    }


def _wxyz_from_matrix(rotation: Array) -> Array:
    """Convert a rotation (3, 3) to a quaternion (4,) in viser's order."""
    xyzw = quaternion_from_matrix(torch.from_numpy(np.ascontiguousarray(rotation))).numpy()
    return np.asarray(xyzw[[3, 0, 1, 2]], np.float64)
