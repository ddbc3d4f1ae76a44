# SPDX-License-Identifier: Apache-2.0
"""Where somebody stands who sees a scene for the first time, or through one of its cameras."""

from __future__ import annotations

import numpy as np

from vggt_ros.viewer.scene import Array, ViewerScene

UP = np.array([0.0, -1.0, 0.0])  # of the world frame, whose y axis points down
_SAMPLE = 20_000  # points are enough for a median
_NEAREST = 2.3  # of the scene's radius, between the eye and the middle


def scene_extent(scene: ViewerScene) -> tuple[Array, float]:
    """
    Find the middle of a scene and how large it is, whatever lies far outside.

    :returns: (3,), the median of the surer half of the points, of the cameras if there are none;
        and the radius around it that holds four fifths of them and the cameras' median.
    """
    places = np.array([camera.world_from_camera[:3, 3] for camera in scene.cameras])
    places = places.reshape(-1, 3)
    points = scene.xyz[:: max(len(scene.xyz) // _SAMPLE, 1)].astype(np.float64)
    if len(points):
        sure = scene.confidence[:: max(len(scene.xyz) // _SAMPLE, 1)]
        points = points[sure >= np.median(sure)]
    else:
        points = places
    if not len(points):
        return np.zeros(3), 1.0
    middle = np.median(points, axis=0)
    radius = float(np.quantile(np.linalg.norm(points - middle, axis=1), 0.8))
    if len(places):
        radius = max(radius, float(np.median(np.linalg.norm(places - middle, axis=1))))
    return middle, radius if radius > 0 else 1.0


def first_view(scene: ViewerScene) -> tuple[Array, Array]:
    """
    Stand behind and above the first camera and look at the middle of the scene.

    :returns: position (3,) and the point to look at (3,), world frame.
    """
    middle, radius = scene_extent(scene)
    first = scene.cameras[0].world_from_camera if scene.cameras else np.eye(4)
    forward = first[:3, 2] - UP * (UP @ first[:3, 2])
    length = float(np.linalg.norm(forward))
    forward = forward / length if length > 0.1 else np.array([0.0, 0.0, 1.0])
    eye = first[:3, 3] + radius * (1.4 * UP - forward)
    away = eye - middle
    distance = max(float(np.linalg.norm(away)), 1e-6)
    if distance < _NEAREST * radius:
        eye = middle + away * (_NEAREST * radius / distance)
    return eye, middle


def view_from(world_from_camera: Array, distance: float) -> tuple[Array, Array, Array]:
    """
    Stand where a camera is.

    :param distance: to the point to look at, about which the browser turns.
    :returns: position (3,), the point to look at (3,), and up (3,), which is the world's as far
        as the camera does not lean to a side.
    """
    right, down, forward = world_from_camera[:3, :3].T
    position = world_from_camera[:3, 3]
    up = UP - (UP @ right) * right
    if up @ -down < 0.1:  # it looks straight up or down, or stands on its head
        up = -down
    return position, position + distance * forward, up
