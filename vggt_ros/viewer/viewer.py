# SPDX-License-Identifier: Apache-2.0
"""
A web page that shows a scene in 3D, served by viser (PyPI).

One thread does all drawing: controls and `show` only notify it, so that several changes are drawn
at once.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_ros.viewer.controls import Controls, DisplayOptions
from vggt_ros.viewer.layers import CameraLayer, CloudLayer
from vggt_ros.viewer.scene import (
    MAX_POINTS,
    Array,
    ViewerScene,
    camera_view,
    initial_view,
    scene_extent,
    trajectory_length,
)

_EMPTY = ViewerScene(
    title='waiting for the first window',
    warning='',
    unit='',
    cameras=(),
    xyz=np.zeros((0, 3), np.float32),
    rgb=np.zeros((0, 3), np.uint8),
    confidence=np.zeros(0, np.float32),
    frame=np.zeros(0, np.int32),
)
_FRAME_SECONDS = 0.12  # between two frames when the timeline is played
_FRUSTUM_SCALE = (0.02, 0.05)  # times the scene's radius, minimum and maximum
_FRUSTUM_SCALE_OF_TRAJECTORY = 0.06  # times its length, so that frusta hardly overlap
_POINT_SIZE = 0.004  # times the scene's radius
_FOV = np.radians(55.0)  # vertical field of view of the page


class ViewerError(RuntimeError):
    """The page cannot be served."""


class Viewer:
    """
    Serves the page, which is empty until the first scene.

    :param port: to serve on, or the next free one if it is in use: see `url`.
    :raises ViewerError: if viser is missing, or the host is not an address of this machine.
    """

    def __init__(self, host: str = '127.0.0.1', port: int = 8080) -> None:
        viser = _import_viser()
        _check_host(host)
        self.server: Any = viser.ViserServer(host=host, port=port, verbose=False)
        self.server.scene.set_up_direction('-y')
        self.server.initial_camera.fov = _FOV
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._scene = _EMPTY  # as passed to `show`
        self._drawn = _EMPTY  # sorted by frame and subsampled
        self._radius = 1.0
        self._frustum_scale = 1.0
        self._has_scene = False  # whether a scene with content was shown
        self._closing = False
        self.cloud = CloudLayer(self.server.scene)
        self._cameras = CameraLayer(self.server.scene)
        self.points_shown = 0
        self.controls = Controls(self.server.gui, self._wake.set, self._view_from_camera)
        self.controls.set_scene(_EMPTY)
        self._thread = threading.Thread(target=self._run, name='viewer', daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the page."""
        return f'http://{self.server.get_host()}:{self.server.get_port()}'

    def show(self, scene: ViewerScene) -> None:
        """Replace the scene; the view and the values of the controls are kept."""
        if not self._thread.is_alive():
            raise ViewerError('the viewer is closed or has failed and cannot show a scene')
        with self._lock:
            self._scene = scene
        self._wake.set()

    def close(self) -> None:
        """Stop serving; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._thread.join()
        self.server.stop()

    def _run(self) -> None:
        drawn: tuple[ViewerScene, DisplayOptions] | None = None
        while True:
            self._wake.wait(_FRAME_SECONDS if self.controls.playing else None)
            if self._closing:
                return
            notified = self._wake.is_set()
            self._wake.clear()
            if self.controls.playing and not notified:
                self.controls.advance()
            with self._lock:
                scene = self._scene
            if drawn is None or scene is not drawn[0]:
                self._prepare(scene)
            options = self.controls.options
            if drawn is None or scene is not drawn[0] or options != drawn[1]:
                self._draw(options)
            drawn = scene, options

    def _prepare(self, scene: ViewerScene) -> None:
        """Prepare a new scene for drawing."""
        self._drawn = subsample_points(scene)
        self.controls.set_scene(scene)
        if not scene.cameras and not len(scene.xyz):
            return
        self._radius = scene_extent(scene)[1]
        low, high = (part * self._radius for part in _FRUSTUM_SCALE)
        scale = _FRUSTUM_SCALE_OF_TRAJECTORY * trajectory_length(scene.cameras)
        self._frustum_scale = min(max(scale, low), high)
        position, look_at = initial_view(scene)
        self.server.initial_camera.position = position
        self.server.initial_camera.look_at = look_at
        if not self._has_scene:
            self._has_scene = True
            for client in self.server.get_clients().values():  # their page is still empty
                with client.atomic():
                    _set_view(client, position, look_at)

    def _draw(self, options: DisplayOptions) -> None:
        scene = self._drawn
        frame = min(options.frame, max(len(scene.cameras) - 1, 0))
        threshold = _confidence_threshold(scene.confidence, options.hidden_percent)
        with self.server.atomic():
            self.points_shown = self.cloud.draw(
                scene, threshold, frame, options.point_size * _POINT_SIZE * self._radius
            )
            step = options.frustum_step if options.show_frusta else 0
            self._cameras.draw(scene, step, frame, self._frustum_scale, options.show_trajectory)
        self.controls.show_point_count(
            self.points_shown, len(scene.xyz), len(self._scene.xyz), threshold
        )
        self.controls.show_frame(scene, frame)

    def _view_from_camera(self, client: Any) -> None:
        """Move the view of one browser to the selected camera."""
        scene, frame = self._drawn, self.controls.options.frame
        if client is None or not scene.cameras:
            return
        camera = scene.cameras[min(frame, len(scene.cameras) - 1)]
        position, look_at, up = camera_view(camera.world_from_camera, self._radius)
        with client.atomic():
            _set_view(client, position, look_at)
            client.camera.up_direction = up
            client.camera.fov = camera.vertical_fov


def follow(
    read: Callable[[], ViewerScene | None],
    viewer: Viewer,
    period: float = 1.0,
    until: threading.Event | None = None,
) -> None:
    """
    Show every new scene until an event is set or Ctrl-C.

    :param read: returns the scene, or None if it has not changed.
    :param period: s between two calls of `read`.
    """
    until = until or threading.Event()
    while not until.is_set():
        scene = read()
        if scene is not None:
            viewer.show(scene)
        until.wait(period)


def subsample_points(scene: ViewerScene) -> ViewerScene:
    """Sort the points by frame, and subsample them evenly to what a browser can display."""
    order = np.argsort(scene.frame, kind='stable')
    if len(order) > MAX_POINTS:
        order = order[np.linspace(0, len(order) - 1, MAX_POINTS).astype(np.int64)]
    return replace(
        scene,
        xyz=scene.xyz[order],
        rgb=scene.rgb[order],
        confidence=scene.confidence[order],
        frame=scene.frame[order],
    )


def _confidence_threshold(confidence: npt.NDArray[np.float32], hidden_percent: float) -> float:
    """
    Return the confidence below which about this percentage of the points is.

    Rounded down to a step that is small compared to the spread of the values and rarely changes:
    otherwise each window of a growing scene would move the threshold and resend all points.
    """
    if not len(confidence):
        return 1.0
    low, threshold, high = np.percentile(confidence, [10, hidden_percent, 90]).tolist()
    if high <= low:
        return float(threshold)
    step = 2.0 ** math.floor(math.log2((high - low) / 64))
    return float(math.floor(threshold / step) * step)


def _set_view(client: Any, position: Array, look_at: Array) -> None:
    """Set position and target, which do not depend on the pose that the browser reports."""
    client.camera.position = position
    client.camera.look_at = look_at


def _check_host(host: str) -> None:
    """Reject an address on which viser would try one port after the other forever."""
    try:
        with socket.create_server((host, 0)):
            pass
    except OSError as error:
        raise ViewerError(
            f'cannot serve the page on {host!r} ({error.strerror}), expected an address of this '
            'machine'
        ) from error


def _import_viser() -> ModuleType:
    try:
        import viser
    except ImportError as error:
        raise ViewerError(
            f'the viewer needs viser, which cannot be imported ({error}): pip install viser'
        ) from error
    module: ModuleType = viser
    return module
