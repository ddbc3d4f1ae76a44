# SPDX-License-Identifier: Apache-2.0
"""The viewer's page, looked at by a real browser."""

from __future__ import annotations

import dataclasses
import sys
import threading

import numpy as np
import pytest

pytest.importorskip('viser', reason='needs viser')
import viewer_page
from viewer_page import picture_of, wait_for

from vggt_ros.viewer.first_view import first_view, view_from
from vggt_ros.viewer.scene import SceneCamera, ViewerScene
from vggt_ros.viewer.viewer import MOST_POINTS, Viewer, ViewerError, follow

SURE, UNSURE = (200, 0, 200), (0, 180, 0)  # colours of the two halves of the wall
FRAMES = 6
SURE_POINTS = 7320
LENS = np.array([[60.0, 0, 40], [0, 60, 30], [0, 0, 1]])


def wall(frames=FRAMES, side=120, **changes):
    """
    Put up a wall 4 in front of the first camera, whose right half is less sure.

    The cameras walk to the right; each sees another strip, the first one the topmost.
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
        'cameras': tuple(SceneCamera(i * 10**9, poses[i], LENS, image) for i in range(frames)),
        'xyz': np.stack([x, y, np.full_like(x, 4)], axis=-1).astype(np.float32),
        'rgb': np.where(right[:, None], UNSURE, SURE).astype(np.uint8),
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
    """The page with the whole wall to see."""
    viewer.show(wall())
    (client,) = viewer._server.get_clients().values()
    client.camera.position, client.camera.look_at = first_view(wall())
    slide(browser, 'Hide unsure, %', 'Home')
    slide(browser, 'Frame', 'End')
    wait_for(lambda: viewer.points_shown == 120 * 120, what='all points')
    wait_for(lambda: count(browser, UNSURE) > 1000, what='the colours of the wall')
    return browser


def slide(page, label, key):
    """Press a key on the slider beside a label."""
    text = page.get_by_text(label, exact=True)
    text.locator('xpath=following::*[@role="slider"][1]').press(key)


def count(page, colour):
    """Count the pixels that have a colour, more or less: the browser smooths edges."""
    box = page.locator('canvas').first.bounding_box()
    scene = picture_of(page)[:, int(box['x']) : int(box['x'] + box['width'])].astype(int)
    return int((np.abs(scene - colour).max(axis=-1) < 30).sum())


def test_the_page_shows_the_cloud_in_its_colours(page):
    assert count(page, SURE) > 1000
    assert count(page, UNSURE) > 1000
    assert 'a wall <b>' in page.inner_text('body')  # as text, not as markup
    assert 'points shown: 14,400 of 14,400' in page.inner_text('body')


def test_the_confidence_slider_hides_the_less_sure_points(page, viewer):
    sure = count(page, SURE)
    slide(page, 'Hide unsure, %', 'End')
    wait_for(lambda: viewer.points_shown < 120 * 120, what='fewer points')
    assert viewer.points_shown == SURE_POINTS == np.sum(wall().confidence == 3)
    wait_for(lambda: count(page, UNSURE) < 20, what='the right half to go')
    assert count(page, SURE) > 0.9 * sure
    assert f'points shown: {viewer.points_shown:,} of 14,400' in page.inner_text('body')


def test_the_timeline_shows_what_was_seen_so_far(page, viewer):
    before = count(page, UNSURE)
    slide(page, 'Frame', 'Home')
    wait_for(lambda: viewer.points_shown == 120 * 120 // FRAMES, what='the first strip')
    wait_for(lambda: 0 < count(page, UNSURE) < before / 2, what='fewer pixels')
    page.get_by_role('button', name='Play').click()
    wait_for(lambda: viewer.points_shown == 120 * 120, what='the end of the play')
    wait_for(lambda: not viewer.controls.playing)
    assert viewer.controls.choice.moment == FRAMES - 1


def test_one_can_look_from_the_camera_of_a_frame(page, viewer):
    (client,) = viewer._server.get_clients().values()
    page.get_by_role('button', name='Look from this camera').click()
    last = wall().cameras[-1].world_from_camera
    wait_for(lambda: np.allclose(client.camera.position, last[:3, 3], atol=1e-3))
    wait_for(lambda: np.allclose(np.abs(client.camera.wxyz), [1, 0, 0, 0], atol=1e-3))
    wait_for(lambda: count(page, UNSURE) > 20_000, what='the wall near, with nothing before it')
    assert client.camera.fov == pytest.approx(2 * np.arctan(0.5), abs=1e-3)


def test_a_scene_that_grows_keeps_what_is_set_and_the_view(page, viewer):
    (client,) = viewer._server.get_clients().values()
    slide(page, 'Hide unsure, %', 'End')
    wait_for(lambda: viewer.points_shown == SURE_POINTS, what='fewer points')
    before = client.camera.position.copy()
    viewer.show(wall(frames=2 * FRAMES, warning='nothing of this is <true>'))
    wait_for(lambda: 'of 14,400' in page.inner_text('body'))
    wait_for(lambda: 'nothing of this is <true>' in page.inner_text('body'), what='the warning')
    choice = viewer.controls.choice
    assert (choice.hidden_percent, choice.moment) == (99, 2 * FRAMES - 1)
    assert viewer.points_shown == SURE_POINTS
    assert np.allclose(client.camera.position, before)


# --- without a browser


def test_points_beyond_what_a_browser_bears_are_thinned_evenly(viewer):
    viewer.controls._hidden.value = 0
    viewer.show(wall(side=1000))
    wait_for(lambda: viewer.points_shown == MOST_POINTS, what='dropped points')
    each = np.bincount(viewer._drawn.frame)
    assert each == pytest.approx(np.full(FRAMES, MOST_POINTS / FRAMES), rel=0.01)
    wait_for(lambda: 'the scene has 1,000,000' in viewer.controls._count.content)


def test_what_a_scene_had_before_it_grew_is_not_sent_again(viewer):
    viewer.controls._hidden.value = 10
    frames = 50
    random = np.random.default_rng(0)
    whole = wall(frames=frames, confidence=random.uniform(1, 5, 120 * 120).astype(np.float32))
    known = whole.frame < frames - 4
    parts = ('xyz', 'rgb', 'confidence', 'frame')
    start = {part: getattr(whole, part)[known] for part in parts}
    viewer.show(dataclasses.replace(whole, cameras=whole.cameras[:-4], **start))
    wait_for(lambda: viewer.points_shown == pytest.approx(0.9 * known.sum(), rel=0.02))
    before = {number: part.node for number, part in viewer._cloud._slices.items()}
    viewer.show(whole)
    wait_for(lambda: viewer.points_shown == pytest.approx(0.9 * len(known), rel=0.02))
    after = {number: part.node for number, part in viewer._cloud._slices.items()}
    assert len(after) == 25 and len(before) == 23
    assert all(after[number] is node for number, node in before.items())


def test_a_scene_may_shrink_to_one_camera_and_to_nothing(viewer):
    viewer.show(wall(frames=1))
    wait_for(lambda: viewer.points_shown == 14_400)
    assert viewer.controls.choice.moment == 0
    parts = ('xyz', 'rgb', 'confidence', 'frame')
    viewer.show(wall(cameras=(), **{part: getattr(wall(), part)[:0] for part in parts}))
    wait_for(lambda: viewer.points_shown == 0)


def test_follow_shows_what_is_new_until_it_is_told_to_end(viewer):
    scenes = iter([None, wall(), None])
    ended = threading.Event()

    def read():
        scene = next(scenes, None)
        if scene is None and viewer.points_shown == 14_400:
            ended.set()
        return scene

    follow(read, viewer, period=0.01, until=ended)
    assert viewer.points_shown == 14_400


def test_a_closed_viewer_refuses_to_show():
    viewer = Viewer(port=8300)
    viewer.close()
    viewer.close()
    with pytest.raises(ViewerError, match='closed'):
        viewer.show(wall())


def test_without_viser_one_sentence_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'viser', None)
    with pytest.raises(ViewerError, match='pip install viser'):
        Viewer()


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(
        ViewerError, match=r"'203\.0\.113\.7'.*expected an address of this machine"
    ):
        Viewer(host='203.0.113.7')


def test_far_outliers_do_not_move_the_first_view():
    scene = wall()
    xyz = scene.xyz.copy()
    xyz[::50] = 1e4
    position, look_at = first_view(scene)
    other, aim = first_view(dataclasses.replace(scene, xyz=xyz))
    assert position[1] < 0 and position[2] < 0  # above and behind the first camera
    assert np.linalg.norm(look_at - [0, 0, 4]) < 2
    assert np.linalg.norm(other - position) < 0.2
    assert np.linalg.norm(aim - look_at) < 0.2


def test_a_view_from_a_camera_is_upright_unless_the_camera_is_not():
    pitched = np.eye(4)
    pitched[:3, :3] = [[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]]
    position, look_at, up = view_from(pitched, 2)
    assert np.allclose(look_at - position, 2 * pitched[:3, 2])
    assert np.allclose(up, [0, -1, 0])
    for turned in (np.diag([-1.0, -1, 1, 1]), pitched @ np.diag([-1.0, -1, 1, 1])):
        assert np.allclose(view_from(turned, 2)[2], -turned[:3, 1])


def test_points_of_a_frame_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match='frames 0 to 9, expected 0 to 5'):
        wall(frame=(np.arange(120 * 120) % 10).astype(np.int32))
