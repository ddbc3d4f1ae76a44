# SPDX-License-Identifier: Apache-2.0
"""The control panel of the page: display options, timeline, and information about the scene."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vggt_ros.viewer.scene import SceneCamera, ViewerScene, trajectory_length

_MAX_FRUSTA = 25  # by default; more would hide the cloud
_HIDDEN_PERCENT = 10  # by default; the least confident points occlude the others
_MAX_STEPS = 160  # of the timeline when it is played
_WARNING = 'background:#b00020;color:white;padding:0.5em 0.7em;border-radius:4px;margin:0.4em 0'


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """The current values of the controls."""

    hidden_percent: float  # of the points, the least confident
    point_size: float  # relative
    show_frusta: bool
    frustum_step: int  # every n-th camera has a frustum
    show_trajectory: bool
    frame: int  # index of the last frame shown


class Controls:
    """
    Sliders, buttons and texts; the public members are viser's handles.

    :param gui: of a viser server.
    :param on_change: called, in any thread, when a value changes.
    :param on_view_from_camera: called with the client that requests it.
    """

    def __init__(
        self,
        gui: Any,
        on_change: Callable[[], None],
        on_view_from_camera: Callable[[Any], None],
    ) -> None:
        self._gui = gui
        self.playing = False
        self._frustum_step_chosen = False
        gui.configure_theme(show_logo=False, show_share_button=False, control_width='large')
        gui.set_panel_label('vggt_ros')
        gui.main_panel.dock_right()
        self.header = gui.add_html('')
        self._add_points()
        self._add_timeline(on_view_from_camera)
        self._add_cameras()
        for handle in (
            self.hidden_percent,
            self.point_size,
            self.show_frusta,
            self.show_trajectory,
            self.frame,
        ):
            handle.on_update(lambda _: on_change())
        self.frustum_step.on_update(lambda event: self._choose_frustum_step(event, on_change))
        self.play.on_click(lambda _: self._toggle(on_change))

    def _add_points(self) -> None:
        with self._gui.add_folder('Points'):
            self.hidden_percent = self._gui.add_slider(
                'Hide least confident (%)',
                min=0,
                max=99,
                step=1,
                initial_value=_HIDDEN_PERCENT,
                hint='Percentage of the points to hide, those of lowest confidence first',
            )
            self.point_count = self._gui.add_html('')
            self.point_size = self._gui.add_slider(
                'Point size', min=0.2, max=4.0, step=0.1, initial_value=1.0
            )

    def _add_timeline(self, on_view_from_camera: Callable[[Any], None]) -> None:
        with self._gui.add_folder('Timeline'):
            self.frame = self._gui.add_slider(
                'Frame',
                min=0,
                max=0,
                step=1,
                initial_value=0,
                hint='Shows points and cameras up to this frame, whose camera is orange',
            )
            self.frame_text = self._gui.add_html('')
            self.play = self._gui.add_button('Play')
            self.view_from_camera = self._gui.add_button(
                'View from this camera',
                hint='Also hides the frusta; "Reset View" at the top of the panel goes back',
            )
            self.view_from_camera.on_click(
                lambda event: self._view_from_camera(event.client, on_view_from_camera)
            )
            self.image = self._gui.add_image(np.zeros((3, 4, 3), np.uint8), visible=False)

    def _add_cameras(self) -> None:
        with self._gui.add_folder('Cameras'):
            self.show_frusta = self._gui.add_checkbox('Camera frusta', initial_value=True)
            self.frustum_step = self._gui.add_slider(
                'Every n-th frame',
                min=1,
                max=1,
                step=1,
                initial_value=1,
                hint='Shows a camera frustum for every n-th frame',
            )
            self.show_trajectory = self._gui.add_checkbox('Trajectory', initial_value=True)

    @property
    def options(self) -> DisplayOptions:
        """The current values."""
        return DisplayOptions(
            hidden_percent=float(self.hidden_percent.value),
            point_size=float(self.point_size.value),
            show_frusta=bool(self.show_frusta.value),
            frustum_step=int(self.frustum_step.value),
            show_trajectory=bool(self.show_trajectory.value),
            frame=int(self.frame.value),
        )

    def set_scene(self, scene: ViewerScene) -> None:
        """Adapt ranges and header to a scene; a timeline at its end stays at the end."""
        last = max(len(scene.cameras) - 1, 0)
        at_end = self.frame.value == self.frame.max
        _set_range(self.frame, last, last if at_end else self.frame.value)
        step = max(-(-len(scene.cameras) // _MAX_FRUSTA), 1)
        chosen = self._frustum_step_chosen
        _set_range(self.frustum_step, max(last, 1), self.frustum_step.value if chosen else step)
        self.header.content = _header(scene)

    def advance(self) -> None:
        """Step to the next frame of the timeline; stop playing at the last one."""
        last = int(self.frame.max)
        self.frame.value = min(self.frame.value + -(-(last + 1) // _MAX_STEPS), last)
        if self.frame.value == last:
            self._set_playing(False)

    def show_point_count(self, shown: int, drawn: int, total: int, threshold: float) -> None:
        """
        Show the number of visible points.

        :param drawn: points sent to the browser at most.
        :param total: points of the scene.
        """
        text = (
            f'points shown: <b>{shown:,}</b> of {drawn:,}<br>minimum confidence: {threshold:.2f}'
        )
        if drawn < total:
            text += f'<br>subsampled from the {total:,} points of the scene'
        self._set_text(self.point_count, text)

    def show_frame(self, scene: ViewerScene, frame: int) -> None:
        """Show time and image of the selected frame."""
        self.image.visible = bool(scene.cameras)
        if not scene.cameras:
            return
        camera = scene.cameras[frame]
        seconds = (camera.stamp_ns - scene.cameras[0].stamp_ns) / 1e9
        self._set_text(self.frame_text, f'time since the first frame: {seconds:.2f} s')
        if not np.array_equal(self.image.image, camera.image):
            self.image.image = camera.image

    @staticmethod
    def _set_text(handle: Any, text: str) -> None:
        text = f'<div style="padding:0 0.75em;font-size:0.8em;line-height:1.45">{text}</div>'
        if handle.content != text:
            handle.content = text

    def _choose_frustum_step(self, event: Any, on_change: Callable[[], None]) -> None:
        self._frustum_step_chosen |= event.client is not None
        on_change()

    def _view_from_camera(self, client: Any, on_view_from_camera: Callable[[Any], None]) -> None:
        self.show_frusta.value = False  # they would be in front of the view
        on_view_from_camera(client)

    def _toggle(self, on_change: Callable[[], None]) -> None:
        if not self.playing and self.frame.value == self.frame.max:
            self.frame.value = 0
        self._set_playing(not self.playing)
        on_change()

    def _set_playing(self, playing: bool) -> None:
        self.playing = playing
        self.play.label = 'Pause' if playing else 'Play'


def _set_range(slider: Any, last: int, value: int) -> None:
    """Set maximum and value of a slider, in the order in which the value stays in range."""
    value = min(max(value, int(slider.min)), last)
    if last < slider.value:
        slider.value = value
    slider.max = last
    if slider.value != value:
        slider.value = value


def _header(scene: ViewerScene) -> str:
    """Format title, warning, and a summary of the trajectory."""
    parts = [f'<b>{html.escape(scene.title)}</b>']
    if scene.warning:
        parts.append(f'<div style="{_WARNING}">{html.escape(scene.warning)}</div>')
    summary = _summary(scene.cameras, scene.unit) if scene.cameras else 'no frames yet'
    parts.append(f'<div style="font-size:0.8em">{html.escape(summary)}</div>')
    return f'<div style="padding:0 0.75em 0.5em">{"".join(parts)}</div>'


def _summary(cameras: tuple[SceneCamera, ...], unit: str) -> str:
    seconds = (cameras[-1].stamp_ns - cameras[0].stamp_ns) / 1e9
    plural = '' if len(cameras) == 1 else 's'
    length = trajectory_length(cameras)
    return f'{len(cameras)} frame{plural}, {seconds:.1f} s, trajectory of {length:.2f} {unit}'
