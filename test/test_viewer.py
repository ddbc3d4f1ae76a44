# SPDX-License-Identifier: Apache-2.0
"""The page of the viewer, in a real browser."""

from __future__ import annotations

import dataclasses
import sys
import threading

import numpy as np
import pytest

pytest.importorskip('viser', reason='needs viser')
import viewer_page
from viewer_page import take_screenshot, wait_for

from vggt_ros.viewer.scene import (
    MAX_POINTS,
    SceneCamera,
    ViewerScene,
    camera_view,
    initial_view,
)
from vggt_ros.viewer.viewer import Viewer, ViewerError, follow, subsample_points

HIGH, LOW = (200, 0, 200), (0, 180, 0)  # colours of the halves of high and low confidence
FRAMES = 6
HIGH_POINTS = 7320
K = np.array([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])


def wall(frames=FRAMES, side=120, **changes):
    """
    Create a wall 4 in front of the first camera; its right half has low confidence.

    The cameras move to the right; each observes another strip, the first one the topmost.
    """
    x, y = (0.02 * (grid.ravel() - side / 2) for grid in np.meshgrid(*[np.arange(side)] * 2))
    right = x > 0
    rows = np.repeat(np.arange(side), side)
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 3] = 0.1 * np.arange(frames)
    image = np.full((60, 80, 3), 128, np.uint8)
    parts = {
        'title': 'a wall <b>',
        'warning': '',
        'unit': 'm',
        'cameras': tuple(SceneCamera(i * 10**9, pose, K, image) for i, pose in enumerate(poses)),
        'xyz': np.stack([x, y, np.full_like(x, 4)], axis=-1).astype(np.float32),
        'rgb': np.where(right[:, None], LOW, HIGH).astype(np.uint8),
        'confidence': np.where(right, 1.0, 3.0).astype(np.float32),
        'frame': (rows * frames // side).astype(np.int32),
    }
    return ViewerScene(**{**parts, **changes})


@pytest.fixture(scope='module')
def viewer():
    made = Viewer(port=8200)
    yield made
    made.close()


@pytest.fixture(scope='module')
def browser(viewer):
    pytest.importorskip('playwright', reason='needs playwright')
    if viewer_page.find_browser() is None:
        pytest.skip('needs a chromium')
    viewer.show(wall())
    with viewer_page.open_page(900, 600) as page:
        page.goto(viewer.url)
        page.wait_for_selector('text=points shown', timeout=60_000)
        yield page


@pytest.fixture
def page(browser, viewer):
    """The page with the whole wall visible."""
    viewer.show(wall())
    (client,) = viewer.server.get_clients().values()
    client.camera.position, client.camera.look_at = initial_view(wall())
    slide(browser, 'Hide least confident (%)', 'Home')
    slide(browser, 'Frame', 'End')
    wait_for(lambda: viewer.points_shown == 120 * 120, what='all points')
    wait_for(lambda: count(browser, LOW) > 1000, what='the colours of the wall')
    return browser


def slide(page, label, key):
    """Press a key on the slider with a label."""
    text = page.get_by_text(label, exact=True)
    text.locator('xpath=following::*[@role="slider"][1]').press(key)


def count(page, colour):
    """Count the pixels that have about a colour: the browser antialiases edges."""
    box = page.locator('canvas').first.bounding_box()
    scene = take_screenshot(page)[:, int(box['x']) : int(box['x'] + box['width'])].astype(int)
    return int((np.abs(scene - colour).max(axis=-1) < 30).sum())


def test_the_page_shows_the_cloud_in_its_colours(page):
    assert count(page, HIGH) > 1000
    assert count(page, LOW) > 1000
    assert 'a wall <b>' in page.inner_text('body')  # as text, not as markup
    assert 'points shown: 14,400 of 14,400' in page.inner_text('body')


def test_the_confidence_slider_hides_the_least_confident_points(page, viewer):
    before = count(page, HIGH)
    slide(page, 'Hide least confident (%)', 'End')
    wait_for(lambda: viewer.points_shown < 120 * 120, what='fewer points')
    assert viewer.points_shown == HIGH_POINTS == np.sum(wall().confidence == 3)
    wait_for(lambda: count(page, LOW) < 20, what='the right half to disappear')
    assert count(page, HIGH) > 0.9 * before
    assert f'points shown: {viewer.points_shown:,} of 14,400' in page.inner_text('body')


def test_the_timeline_shows_what_was_observed_so_far(page, viewer):
    before = count(page, LOW)
    slide(page, 'Frame', 'Home')
    wait_for(lambda: viewer.points_shown == 120 * 120 // FRAMES, what='the first strip')
    wait_for(lambda: 0 < count(page, LOW) < before / 2, what='fewer pixels')
    page.get_by_role('button', name='Play').click()
    wait_for(lambda: viewer.points_shown == 120 * 120, what='the end of the timeline')
    wait_for(lambda: not viewer.controls.playing)
    assert viewer.controls.options.frame == FRAMES - 1


def test_the_view_can_move_to_the_camera_of_a_frame(page, viewer):
    (client,) = viewer.server.get_clients().values()
    page.get_by_role('button', name='View from this camera').click()
    last = wall().cameras[-1].world_from_camera
    wait_for(lambda: np.allclose(client.camera.position, last[:3, 3], atol=1e-3))
    wait_for(lambda: np.allclose(np.abs(client.camera.wxyz), [1, 0, 0, 0], atol=1e-3))
    wait_for(lambda: count(page, LOW) > 20_000, what='the near wall without frusta')
    assert client.camera.fov == pytest.approx(2 * np.arctan(0.5), abs=1e-3)


def test_a_growing_scene_keeps_the_controls_and_the_view(page, viewer):
    (client,) = viewer.server.get_clients().values()
    slide(page, 'Hide least confident (%)', 'End')
    wait_for(lambda: viewer.points_shown == HIGH_POINTS, what='fewer points')
    before = client.camera.position.copy()
    viewer.show(wall(frames=2 * FRAMES, warning='do not <trust> this'))
    wait_for(lambda: 'of 14,400' in page.inner_text('body'))
    wait_for(lambda: 'do not <trust> this' in page.inner_text('body'), what='the warning')
    options = viewer.controls.options
    assert (options.hidden_percent, options.frame) == (99, 2 * FRAMES - 1)
    assert viewer.points_shown == HIGH_POINTS
    assert np.allclose(client.camera.position, before)


# --- without a browser


def test_points_are_subsampled_evenly_for_the_browser(viewer):
    viewer.controls.hidden_percent.value = 0
    scene = wall(side=1000)
    viewer.show(scene)
    wait_for(lambda: viewer.points_shown == MAX_POINTS, what='subsampled points')
    per_frame = np.bincount(subsample_points(scene).frame)
    assert per_frame == pytest.approx(np.full(FRAMES, MAX_POINTS / FRAMES), rel=0.01)
    wait_for(lambda: 'subsampled from the 1,000,000' in viewer.controls.point_count.content)


def test_old_points_of_a_growing_scene_are_not_sent_again(viewer):
    viewer.controls.hidden_percent.value = 10
    frames = 50
    random = np.random.default_rng(0)
    whole = wall(frames=frames, confidence=random.uniform(1, 5, 120 * 120).astype(np.float32))
    known = whole.frame < frames - 4
    parts = ('xyz', 'rgb', 'confidence', 'frame')
    start = {part: getattr(whole, part)[known] for part in parts}
    viewer.show(dataclasses.replace(whole, cameras=whole.cameras[:-4], **start))
    wait_for(lambda: viewer.points_shown == pytest.approx(0.9 * known.sum(), rel=0.02))
    before = viewer.cloud.nodes
    viewer.show(whole)
    wait_for(lambda: viewer.points_shown == pytest.approx(0.9 * len(known), rel=0.02))
    after = viewer.cloud.nodes
    assert len(after) == 25 and len(before) == 23
    assert all(after[index] is node for index, node in before.items())


def test_a_scene_may_shrink_to_one_camera_and_to_nothing(viewer):
    viewer.show(wall(frames=1))
    wait_for(lambda: viewer.points_shown == 14_400)
    assert viewer.controls.options.frame == 0
    parts = ('xyz', 'rgb', 'confidence', 'frame')
    viewer.show(wall(cameras=(), **{part: getattr(wall(), part)[:0] for part in parts}))
    wait_for(lambda: viewer.points_shown == 0)


def test_follow_shows_new_scenes_until_the_event_is_set(viewer):
    scenes = iter([None, wall(), None])
    ended = threading.Event()

    def read():
        scene = next(scenes, None)
        if scene is None and viewer.points_shown == 14_400:
            ended.set()
        return scene

    follow(read, viewer, period=0.01, until=ended)
    assert viewer.points_shown == 14_400


def test_a_closed_viewer_cannot_show_a_scene():
    viewer = Viewer(port=8300)
    viewer.close()
    viewer.close()
    with pytest.raises(ViewerError, match='closed'):
        viewer.show(wall())


def test_without_viser_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'viser', None)
    with pytest.raises(ViewerError, match='pip install viser'):
        Viewer()


def test_an_address_of_another_machine_is_rejected():
    with pytest.raises(
        ViewerError, match=r"'203\.0\.113\.7'.*expected an address of this machine"
    ):
        Viewer(host='203.0.113.7')


def test_outliers_do_not_change_the_initial_view():
    scene = wall()
    xyz = scene.xyz.copy()
    xyz[::50] = 1e4
    position, look_at = initial_view(scene)
    other, other_look_at = initial_view(dataclasses.replace(scene, xyz=xyz))
    assert position[1] < 0 and position[2] < 0  # above and behind the first camera
    assert np.linalg.norm(look_at - [0, 0, 4]) < 2
    assert np.linalg.norm(other - position) < 0.2
    assert np.linalg.norm(other_look_at - look_at) < 0.2


def test_the_view_from_a_camera_is_upright_unless_the_camera_is_upside_down():
    pitched = np.eye(4)
    pitched[:3, :3] = [[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]]
    position, look_at, up = camera_view(pitched, 2)
    assert np.allclose(look_at - position, 2 * pitched[:3, 2])
    assert np.allclose(up, [0, -1, 0])
    for rolled in (np.diag([-1.0, -1, 1, 1]), pitched @ np.diag([-1.0, -1, 1, 1])):
        assert np.allclose(camera_view(rolled, 2)[2], -rolled[:3, 1])


def test_points_with_an_invalid_frame_index_are_rejected():
    with pytest.raises(ValueError, match='frame indices 0 to 9, expected 0 to 5'):
        wall(frame=(np.arange(120 * 120) % 10).astype(np.int32))
