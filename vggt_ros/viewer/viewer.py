# SPDX-License-Identifier: Apache-2.0
"""
A scene as a page that a browser shows and turns, served by viser (PyPI).

All drawing is one thread's: sliders and `show` only wake it, so that many changes become one.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_ros.viewer.controls import Choice, Controls
from vggt_ros.viewer.first_view import first_view, scene_extent, view_from
from vggt_ros.viewer.layers import (
    CameraLayer,
    CloudLayer,
    vertical_field_of_view,
)
from vggt_ros.viewer.scene import MOST_POINTS, Array, ViewerScene, trajectory_length

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
_FRUSTUM = (0.02, 0.05)  # of the scene's radius, least and most
_FRUSTUM_ON_WAY = 0.06  # of the way, so that frusta hardly overlap
_POINT = 0.004  # of the scene's radius
_VIEW = np.radians(55.0)  # vertical field of view of the page


class ViewerError(RuntimeError):
    """A page that cannot be served."""


class Viewer:
    """
    The page. It is there at once, and empty until something is shown.

    :param port: where to serve; if it is taken, the next free one: see `url`.
    :raises ViewerError: if viser is missing, or the host is no address of this machine.
    """

    def __init__(self, host: str = '127.0.0.1', port: int = 8080) -> None:
        viser = _import_viser()
        _check_host(host)
        self._server: Any = viser.ViserServer(host=host, port=port, verbose=False)
        self._server.scene.set_up_direction('-y')
        self._server.initial_camera.fov = _VIEW
        self._awake = threading.Event()
        self._lock = threading.Lock()
        self._shown = _EMPTY  # as asked for
        self._drawn = _EMPTY  # dropped, in order of frames
        self._radius = 1.0
        self._frustum = 1.0
        self._seen = False  # whether a scene was there to look at
        self._closing = False
        self._cloud = CloudLayer(self._server.scene)
        self._cameras = CameraLayer(self._server.scene)
        self.points_shown = 0
        self.controls = Controls(self._server.gui, self._awake.set, self._look_from_camera)
        self.controls.fit(_EMPTY)
        self._thread = threading.Thread(target=self._run, name='viewer', daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f'http://{self._server.get_host()}:{self._server.get_port()}'

    def show(self, scene: ViewerScene) -> None:
        """Replace what is seen; what somebody has set, and the view, stay as they are."""
        if not self._thread.is_alive():
            raise ViewerError('the viewer is closed, or failed before, and shows nothing any more')
        with self._lock:
            self._shown = scene
        self._awake.set()

    def close(self) -> None:
        """Stop serving. Closing twice is no error."""
        if self._closing:
            return
        self._closing = True
        self._awake.set()
        self._thread.join()
        self._server.stop()

    def _run(self) -> None:
        drawn: tuple[ViewerScene, Choice] | None = None
        while True:
            self._awake.wait(_FRAME_SECONDS if self.controls.playing else None)
            if self._closing:
                return
            pushed = self._awake.is_set()
            self._awake.clear()
            if self.controls.playing and not pushed:
                self.controls.advance()
            with self._lock:
                scene = self._shown
            if drawn is None or scene is not drawn[0]:
                self._take(scene)
            choice = self.controls.choice
            if drawn is None or scene is not drawn[0] or choice != drawn[1]:
                self._draw(choice)
            drawn = scene, choice

    def _take(self, scene: ViewerScene) -> None:
        """Prepare a new scene."""
        self._drawn = _thin(scene)
        self.controls.fit(scene)
        if not scene.cameras and not len(scene.xyz):
            return
        self._radius = scene_extent(scene)[1]
        low, high = (part * self._radius for part in _FRUSTUM)
        self._frustum = min(max(_FRUSTUM_ON_WAY * trajectory_length(scene.cameras), low), high)
        position, look_at = first_view(scene)
        self._server.initial_camera.position = position
        self._server.initial_camera.look_at = look_at
        if not self._seen:
            self._seen = True
            for client in self._server.get_clients().values():  # they look at an empty page
                with client.atomic():
                    _place(client, position, look_at)

    def _draw(self, choice: Choice) -> None:
        scene = self._drawn
        moment = min(choice.moment, max(len(scene.cameras) - 1, 0))
        threshold = _threshold(scene.confidence, choice.hidden_percent)
        with self._server.atomic():
            self.points_shown = self._cloud.draw(
                scene, threshold, moment, choice.point_size * _POINT * self._radius
            )
            every = choice.every if choice.frusta else 0
            self._cameras.draw(scene, every, moment, self._frustum, choice.path)
        self.controls.show_point_count(
            self.points_shown, len(scene.xyz), len(self._shown.xyz), threshold
        )
        self.controls.show_time(scene, moment)

    def _look_from_camera(self, client: Any) -> None:
        """Put the eye of one browser where the chosen camera is."""
        scene, moment = self._drawn, self.controls.choice.moment
        if client is None or not scene.cameras:
            return
        camera = scene.cameras[min(moment, len(scene.cameras) - 1)]
        position, look_at, up = view_from(camera.world_from_camera, self._radius)
        with client.atomic():
            _place(client, position, look_at)
            client.camera.up_direction = up
            client.camera.fov = vertical_field_of_view(camera)


def follow(
    read: Callable[[], ViewerScene | None],
    viewer: Viewer,
    period: float = 1.0,
    until: threading.Event | None = None,
) -> None:
    """
    Show what comes, until an event or Ctrl-C.

    :param read: returns the scene, or None if there is nothing new.
    :param period: s between two looks.
    """
    until = until or threading.Event()
    while not until.is_set():
        scene = read()
        if scene is not None:
            viewer.show(scene)
        until.wait(period)


def _thin(scene: ViewerScene) -> ViewerScene:
    """Put the points in order of their frames, and take no more than a browser bears."""
    order = np.argsort(scene.frame, kind='stable')
    if len(order) > MOST_POINTS:
        order = order[np.linspace(0, len(order) - 1, MOST_POINTS).astype(np.int64)]
    return ViewerScene(
        title=scene.title,
        warning=scene.warning,
        unit=scene.unit,
        cameras=scene.cameras,
        xyz=scene.xyz[order],
        rgb=scene.rgb[order],
        confidence=scene.confidence[order],
        frame=scene.frame[order],
    )


def _threshold(confidence: npt.NDArray[np.float32], hidden_percent: float) -> float:
    """
    Choose what a point's confidence has to be so that this share is hidden.

    Rounded down, to steps that are fine beside the spread of the values and seldom change: else
    each window of a scene that grows would move the threshold and all points were sent again.
    """
    if not len(confidence):
        return 1.0
    low, wanted, high = np.percentile(confidence, [10, hidden_percent, 90]).tolist()
    if high <= low:
        return float(wanted)
    step = 2.0 ** math.floor(math.log2((high - low) / 64))
    return float(math.floor(wanted / step) * step)


def _place(client: Any, position: Array, look_at: Array) -> None:
    """Set what does not depend on where the browser says that it is: it may say so meanwhile."""
    client.camera.position = position
    client.camera.look_at = look_at


def _check_host(host: str) -> None:
    """Refuse an address on which viser would try one port after the other for ever."""
    try:
        with socket.create_server((host, 0)):
            pass
    except OSError as error:
        raise ViewerError(
            f'no page can be served on {host!r} ({error.strerror}), expected an address of this '
            'machine'
        ) from error


def _import_viser() -> ModuleType:
    try:
        import viser
    except ImportError as error:
        raise ViewerError(
            f'the viewer needs viser, which cannot be imported ({error}): pip install viser'
        ) from error
    found: ModuleType = viser
    return found
