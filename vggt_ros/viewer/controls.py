# SPDX-License-Identifier: Apache-2.0
"""The panel beside the picture: what may be chosen, and what is said about the scene."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vggt_ros.viewer.scene import SceneCamera, ViewerScene, trajectory_length

_FRUSTA = 25  # that are clear to look at; more are dropped until somebody chooses
_HIDDEN = 10  # % of the points at first: the worst ones hide the others
_STEPS = 160  # at most, when the timeline is played
_WARNING = 'background:#b00020;color:white;padding:0.5em 0.7em;border-radius:4px;margin:0.4em 0'


@dataclass(frozen=True, slots=True)
class Choice:
    """What somebody has set."""

    hidden_percent: float  # of the points, the least confident
    point_size: float  # relative
    frusta: bool
    every: int  # n-th camera has a frustum
    path: bool
    moment: int  # index of the frame up to which is shown


class Controls:
    """
    Sliders, buttons and texts.

    :param gui: of a viser server.
    :param changed: called, in any thread, when something is set.
    :param look: called with a client when it asks to look from the chosen camera.
    """

    def __init__(self, gui: Any, changed: Callable[[], None], look: Callable[[Any], None]) -> None:
        self._gui = gui
        self.playing = False
        self._every_chosen = False
        gui.configure_theme(show_logo=False, show_share_button=False, control_width='large')
        gui.set_panel_label('vggt_ros')
        gui.main_panel.dock_right()
        self._head = gui.add_html('')
        self._add_points()
        self._add_timeline(look)
        self._add_cameras()
        for entry in (self._hidden, self._size, self._frusta, self._path, self._frame):
            entry.on_update(lambda _: changed())
        self._every.on_update(lambda event: self._choose_every(event, changed))
        self._play.on_click(lambda _: self._toggle(changed))

    def _add_points(self) -> None:
        with self._gui.add_folder('Points'):
            self._hidden = self._gui.add_slider(
                'Hide unsure, %',
                min=0,
                max=99,
                step=1,
                initial_value=_HIDDEN,
                hint='hides this share of the points, the least confident ones',
            )
            self._count = self._gui.add_html('')
            self._size = self._gui.add_slider(
                'Point size', min=0.2, max=4.0, step=0.1, initial_value=1.0
            )

    def _add_timeline(self, look: Callable[[Any], None]) -> None:
        with self._gui.add_folder('Timeline'):
            self._frame = self._gui.add_slider(
                'Frame',
                min=0,
                max=0,
                step=1,
                initial_value=0,
                hint='shows points and cameras up to this frame, which is marked orange',
            )
            self._when = self._gui.add_html('')
            self._play = self._gui.add_button('Play')
            self._look = self._gui.add_button(
                'Look from this camera',
                hint='takes the frusta away, which would stand in front; '
                '"Reset View" in the panel\'s head leads back',
            )
            self._look.on_click(lambda event: self._look_from_camera(event.client, look))
            self._picture = self._gui.add_image(np.zeros((3, 4, 3), np.uint8), visible=False)

    def _add_cameras(self) -> None:
        with self._gui.add_folder('Cameras'):
            self._frusta = self._gui.add_checkbox('Frusta', initial_value=True)
            self._every = self._gui.add_slider(
                'Every n-th', min=1, max=1, step=1, initial_value=1, hint='camera has a frustum'
            )
            self._path = self._gui.add_checkbox('Path', initial_value=True)

    @property
    def choice(self) -> Choice:
        """What is set now."""
        return Choice(
            hidden_percent=float(self._hidden.value),
            point_size=float(self._size.value),
            frusta=bool(self._frusta.value),
            every=int(self._every.value),
            path=bool(self._path.value),
            moment=int(self._frame.value),
        )

    def fit(self, scene: ViewerScene) -> None:
        """Make the sliders as long as a scene; the timeline stays at its end if it is there."""
        last = max(len(scene.cameras) - 1, 0)
        at_end = self._frame.value == self._frame.max
        _stretch(self._frame, last, last if at_end else self._frame.value)
        dropped = max(-(-len(scene.cameras) // _FRUSTA), 1)
        _stretch(self._every, max(last, 1), self._every.value if self._every_chosen else dropped)
        self._head.content = _describe(scene)

    def advance(self) -> None:
        """Go on to the next frame; the last one ends the play."""
        last = int(self._frame.max)
        self._frame.value = min(self._frame.value + -(-(last + 1) // _STEPS), last)
        if self._frame.value == last:
            self._set_playing(False)

    def show_point_count(self, shown: int, sent: int, whole: int, threshold: float) -> None:
        """
        Say how many points there are to see.

        :param sent: what the browser may show at all.
        :param whole: what the scene has.
        """
        text = (
            f'points shown: <b>{shown:,}</b> of {sent:,}<br>'
            f'their confidence is {threshold:.2f} or more'
        )
        if sent < whole:
            text += f'<br>the scene has {whole:,}, dropped evenly for the browser'
        self._say(self._count, text)

    def show_time(self, scene: ViewerScene, moment: int) -> None:
        """Show the chosen frame's time and picture."""
        self._picture.visible = bool(scene.cameras)
        if not scene.cameras:
            return
        camera = scene.cameras[moment]
        seconds = (camera.stamp_ns - scene.cameras[0].stamp_ns) / 1e9
        self._say(
            self._when,
            f'frame {moment + 1} of {len(scene.cameras)}, at {seconds:.2f} s',
        )
        if not np.array_equal(self._picture.image, camera.image):
            self._picture.image = camera.image

    @staticmethod
    def _say(place: Any, text: str) -> None:
        text = f'<div style="padding:0 0.75em;font-size:0.8em;line-height:1.45">{text}</div>'
        if place.content != text:
            place.content = text

    def _choose_every(self, event: Any, changed: Callable[[], None]) -> None:
        self._every_chosen |= event.client is not None
        changed()

    def _look_from_camera(self, client: Any, look: Callable[[Any], None]) -> None:
        self._frusta.value = False
        look(client)

    def _toggle(self, changed: Callable[[], None]) -> None:
        if not self.playing and self._frame.value == self._frame.max:
            self._frame.value = 0
        self._set_playing(not self.playing)
        changed()

    def _set_playing(self, playing: bool) -> None:
        self.playing = playing
        self._play.label = 'Pause' if playing else 'Play'


def _stretch(slider: Any, last: int, value: int) -> None:
    """Set the end and the value of a slider, in the order in which the value stays inside."""
    value = min(max(value, int(slider.min)), last)
    if last < slider.value:
        slider.value = value
    slider.max = last
    if slider.value != value:
        slider.value = value


def _describe(scene: ViewerScene) -> str:
    """Write title, warning, and the way in figures."""
    parts = [f'<b>{html.escape(scene.title)}</b>']
    if scene.warning:
        parts.append(f'<div style="{_WARNING}">{html.escape(scene.warning)}</div>')
    facts = _way(scene.cameras, scene.unit) if scene.cameras else 'nothing to see yet'
    parts.append(f'<div style="font-size:0.8em">{html.escape(facts)}</div>')
    return f'<div style="padding:0 0.75em 0.5em">{"".join(parts)}</div>'


def _way(cameras: tuple[SceneCamera, ...], unit: str) -> str:
    seconds = (cameras[-1].stamp_ns - cameras[0].stamp_ns) / 1e9
    plural = '' if len(cameras) == 1 else 's'
    way = trajectory_length(cameras)
    return f'{len(cameras)} camera{plural} on a way of {way:.2f} {unit} in {seconds:.1f} s'
