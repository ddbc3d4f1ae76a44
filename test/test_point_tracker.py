# SPDX-License-Identifier: Apache-2.0
"""Points keep their numbers over many windows and lie where the truth has them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_network import ROOM, Failure, FakeNetwork, true_cameras
from test_rectifier import project as bend

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Calibration, Frame
from vggt_ros.inference.network import VGGTNetwork
from vggt_ros.lab.evaluation.truth_network import FIELD_OF_VIEW, World, true_intrinsics
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.mapping.point_tracker import PointTracks
from vggt_ros.mapping.reconstruction import PredictionError
from vggt_ros.model import VGGT, Prediction, VGGTConfig
from vggt_ros.settings import Settings

STEP_NS = 200_000_000
HEIGHT, WIDTH = 120, 160  # of the camera's images
SMALL_HEIGHT, SMALL_WIDTH = 42, 56  # of the network's
POINTS, SIZE, STRIDE = 24, 6, 2
SAME = 0.01  # pixels; the network tells float32
WORLD = World(ROOM, true_cameras)
LENSES = {
    'plumb_bob': ((120.0, 118.0, 82.0, 58.0), [-0.25, 0.08, 0.001, -0.002, -0.01]),
    'equidistant': ((90.0, 90.0, 78.0, 61.0), [0.02, -0.005, 0.001, 0.0]),
}


def frame(i: int, red: int | None = None, camera: int = 0, lens: str = '') -> Frame:
    """Noise has corners everywhere; what is in the picture is told by the stamp alone."""
    image = np.random.default_rng([i, camera]).integers(0, 200, (HEIGHT, WIDTH, 3), np.uint8)
    if red is not None:
        image[0, 0, 0] = red
    calibration = None
    if lens:
        (fx, fy, cx, cy), d = LENSES[lens]
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        calibration = Calibration(WIDTH, HEIGHT, lens, matrix, np.array(d))
    return Frame(image, i * STEP_NS, f'camera_{camera}', calibration, camera)


class Noting(FakeNetwork):
    """Notes what it is asked, and says something else of the tracks if it is told to."""

    def __init__(
        self, change: Callable[[Batch, Prediction], Prediction] | None = None, **how: object
    ) -> None:
        super().__init__(**how)  # type: ignore[arg-type]
        self.asked: list[tuple[Batch, tuple[str, ...]]] = []
        self._change = change

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        self.asked.append((batch, heads))
        told = super().__call__(batch, heads)
        return told if self._change is None else self._change(batch, told)


def engine(network: FakeNetwork | VGGTNetwork | None = None, **values: object) -> StreamingEngine:
    flat = {
        'window_size': SIZE,
        'window_stride': STRIDE,
        'min_parallax': 0.0,
        'track_points': POINTS,
        **values,
    }
    return StreamingEngine(Settings.from_flat(flat), network or FakeNetwork())


def run(
    streaming: StreamingEngine, frames: Iterable[Frame], with_tracks: bool = True
) -> list[MapUpdate]:
    updates = (streaming.add(each, with_tracks=with_tracks) for each in frames)
    return [update for update in updates if update is not None]


def tracks_of(update: MapUpdate) -> PointTracks:
    assert update.tracks is not None
    return update.tracks


def calibration_of(lens: str) -> Calibration:
    calibration = frame(0, lens=lens).calibration
    assert calibration is not None
    return calibration


def to_camera(small: np.ndarray, lens: str) -> np.ndarray:
    """Bring pixels (K, 2) of the network's images to the camera's, by the lens's equations."""
    pixels = (small + 0.5) * WIDTH / SMALL_WIDTH - 0.5
    if not lens:
        return pixels
    plane = (pixels - (WIDTH / 2, HEIGHT / 2)) * math.tan(FIELD_OF_VIEW / 2) / (WIDTH / 2)
    rays = np.concatenate([plane, np.ones((len(plane), 1))], -1)
    calibration = calibration_of(lens)
    return bend(lens, calibration.K, calibration.D, rays)


def to_network(pixels: np.ndarray, lens: str = '') -> np.ndarray:
    """Undo `to_camera`, step by step."""
    small = (pixels.astype(float) + 0.5) * SMALL_WIDTH / WIDTH - 0.5
    for _ in range(100 if lens else 0):
        small += 0.2 * (pixels - to_camera(small, lens))
    np.testing.assert_allclose(to_camera(small, lens), pixels, atol=1e-4)
    return small


def see(points: np.ndarray, stamp_ns: int, lens: str) -> np.ndarray:
    """Say where the camera sees points (K, 3) of the room: (K, 2) pixels of its image."""
    camera = true_cameras([stamp_ns])[0]
    in_camera = (points - camera[:3, 3]) @ camera[:3, :3]
    homogeneous = in_camera @ true_intrinsics(SMALL_HEIGHT, SMALL_WIDTH).T
    return to_camera(homogeneous[:, :2] / homogeneous[:, 2:], lens)


@pytest.mark.parametrize('lens', ['', *LENSES])
def test_each_number_is_one_point_of_the_scene_over_many_windows(lens: str) -> None:
    view = math.degrees(FIELD_OF_VIEW) if lens else 0.0
    streaming = engine(rectified_field_of_view=view)
    updates = run(streaming, (frame(i, lens=lens) for i in range(30)))
    assert len(updates) == 13 and {u.map_id for u in updates} == {0}
    points: dict[int, np.ndarray] = {}  # in the room, by the number of the track
    compared = 0
    for update in updates:
        tracks = tracks_of(update)
        assert tracks.pixels.shape == (SIZE, len(tracks.ids), 2)
        for i, taken in enumerate(update.batch.frames):
            for k in np.flatnonzero(tracks.visibility[i] > 0.5):
                number, pixel = int(tracks.ids[k]), tracks.pixels[i, k]
                if number not in points:
                    small = to_network(pixel[None], lens)
                    found = WORLD.cast_rays_at(taken.stamp_ns, small, SMALL_HEIGHT, SMALL_WIDTH)
                    points[number] = found[1][0]
                expected = see(points[number][None], taken.stamp_ns, lens)[0]
                np.testing.assert_allclose(pixel, expected, atol=SAME)
                compared += 1
    assert compared > 1000
    assert len(points) > POINTS + 5  # the camera turns away from what it saw


def test_tracks_go_on_while_they_are_seen_and_lost_ones_are_replaced() -> None:
    updates = run(engine(), (frame(i) for i in range(40)))
    lives: dict[int, list[int]] = {}
    for update in updates:
        tracks = tracks_of(update)
        assert len(set(tracks.ids.tolist())) == len(tracks.ids) == POINTS
        for number in tracks.ids.tolist():
            lives.setdefault(number, []).append(update.window_id)
    for before, after in pairwise(updates):
        old, new = tracks_of(before), tracks_of(after)
        shared = [i for i, n in enumerate(before.batch.ids) if n in after.batch.ids]
        seen = old.visibility[shared].max(0) > 0.5
        assert set(old.ids[seen]) <= set(new.ids)
        assert not set(old.ids[~seen]) & set(new.ids)
        assert all(number > old.ids.max() for number in set(new.ids) - set(old.ids))
    assert all(windows == list(range(windows[0], windows[-1] + 1)) for windows in lives.values())
    assert len(lives) > POINTS + 5


def test_nothing_is_replaced_while_the_camera_stands() -> None:
    still = World(ROOM, lambda stamps: true_cameras([0] * len(stamps)))
    updates = run(engine(FakeNetwork(world=still)), (frame(i) for i in range(20)))
    for update in updates:
        tracks = tracks_of(update)
        assert tracks.ids.tolist() == list(range(POINTS))
        assert (tracks.visibility == 1).all()
        np.testing.assert_allclose(tracks.pixels, tracks.pixels[:1].repeat(SIZE, 0), atol=SAME)


def test_a_new_map_has_new_tracks() -> None:
    streaming = engine()
    updates = run(streaming, (frame(i) for i in range(10)))
    streaming.reset('asked for')
    updates += run(streaming, (frame(i) for i in range(10, 20)))
    updates += run(streaming, (frame(i) for i in range(10)))  # stamps run backwards
    assert [u.map_id for u in updates] == [0] * 3 + [1] * 3 + [2] * 3
    ids = [set(tracks_of(u).ids.tolist()) for u in updates]
    for first in (3, 6):
        assert min(ids[first]) > max(set.union(*ids[:first]))


def test_a_map_that_breaks_although_frames_are_shared_has_new_tracks() -> None:
    def guess(batch: Batch, told: Prediction) -> Prediction:
        assert told.depth is not None
        generator = torch.Generator().manual_seed(batch.window_id)
        return replace(
            told, depth=told.depth * torch.randn(told.depth.shape, generator=generator).exp()
        )

    updates = run(engine(Noting(guess)), (frame(i) for i in range(8)))
    assert [u.map_id for u in updates] == [0, 1]
    assert tracks_of(updates[1]).ids.tolist() == list(range(POINTS, 2 * POINTS))


def test_a_window_that_is_lost_costs_no_track() -> None:
    network = Noting()
    streaming = engine(network)
    updates = run(streaming, (frame(i) for i in range(SIZE + STRIDE - 1)))
    with pytest.raises(PredictionError):
        streaming.add(frame(7, red=Failure.NAN))
    updates += run(streaming, (frame(i) for i in range(8, 10)))
    assert [u.window_id for u in updates] == [0, 2] and {u.map_id for u in updates} == {0}
    old, new = map(tracks_of, updates)
    seen = old.visibility[-2:].max(0) > 0.5  # frames 4 and 5
    assert set(old.ids[seen]) <= set(new.ids)


@pytest.mark.parametrize('what', ['visibility', 'track_confidence'])
def test_a_track_goes_on_from_where_it_was_seen_last(what: str) -> None:
    """Tracks of even numbers vanish after the third frame of the first window, some earlier."""

    def hide(batch: Batch, told: Prediction) -> Prediction:
        values = getattr(told, what)
        if batch.window_id > 0 or values is None:
            return told
        values = values.clone()
        values[0, 3:, ::2] = 0.2
        values[0, 2:, ::4] = 0.2
        return replace(told, **{what: values})

    network = Noting(hide)
    run(engine(network), (frame(i) for i in range(SIZE + STRIDE)))
    first, second = (batch.queries for batch, _ in network.asked)
    assert first is not None and second is not None
    asked = dict(zip(second.ids.tolist(), second.frames.tolist()))
    assert not set(first.ids.tolist()[::4]) & set(asked)
    from_third = [number for number in first.ids.tolist()[2::4] if number in asked]
    assert from_third and {asked[number] for number in from_third} == {0}  # that frame comes first
    assert len(asked) == POINTS and max(asked) >= POINTS


def test_new_points_begin_where_depth_is_believed_and_nothing_is_followed_yet() -> None:
    def doubt_left(_batch: Batch, told: Prediction) -> Prediction:
        assert told.depth_confidence is not None
        doubted = told.depth_confidence.clone()
        doubted[..., : SMALL_WIDTH // 2] = 1.0
        return replace(told, depth_confidence=doubted)

    network = Noting(doubt_left)
    updates = run(engine(network), (frame(i) for i in range(30)))
    began = 0
    for (batch, _), update in zip(network.asked[1:], updates):
        queries, before = batch.queries, tracks_of(update)
        assert queries is not None
        new = queries.ids > before.ids.max()
        began += new.sum()
        assert (queries.points[new, 0] >= SMALL_WIDTH // 2).all()
        assert set(queries.frames[new]) <= {SIZE - STRIDE - 1}  # the newest that was there before
        alive = np.isin(before.ids, queries.ids) & (before.visibility[-1] > 0.5)
        others = to_network(before.pixels[-1, alive])
        both = np.concatenate([others, queries.points[new]])
        gaps = np.linalg.norm(both[:, None] - queries.points[new], axis=-1)
        spacing = 0.5 * math.sqrt(SMALL_WIDTH * SMALL_HEIGHT / POINTS)
        assert (np.sort(gaps, axis=0)[1:2] >= spacing - 1).all()
    assert began > 5


def test_bars_around_an_image_are_not_followed() -> None:
    network = Noting()
    run(engine(network, fit='pad'), (frame(i) for i in range(SIZE)))
    (batch, _) = network.asked[0]
    assert batch.image_size == (56, 56) and batch.queries is not None
    rows = batch.queries.points[:, 1]
    assert (rows >= 7 + 3).all() and (rows < 49 - 3).all()  # nor are corners that a bar makes
    assert len(rows) == POINTS


def test_nothing_is_computed_while_nobody_wants_tracks() -> None:
    network = Noting()
    streaming = engine(network)
    updates = run(streaming, (frame(i) for i in range(8)), with_tracks=False)
    assert [u.tracks for u in updates] == [None, None]
    assert all(heads == ('camera', 'depth') for _, heads in network.asked)
    assert all(batch.queries is None for batch, _ in network.asked)
    (update,) = run(streaming, (frame(i) for i in range(8, 10)))
    assert len(tracks_of(update).ids) == POINTS
    unset = Noting()
    run(engine(unset, track_points=0), (frame(i) for i in range(8)))
    assert all(heads == ('camera', 'depth') for _, heads in unset.asked)


def test_half_a_window_is_asked_for_points_that_it_has() -> None:
    network = Noting()
    frames = [frame(i, red=Failure.OUT_OF_MEMORY if i == 11 else None) for i in range(15)]
    updates = run(engine(network, window_size=8, window_stride=4), frames)
    assert [u.batch.ids for u in updates] == [tuple(range(8)), (7, 9, 10, 11), (11, 12, 13, 14)]
    kept = [set(tracks_of(a).ids) & set(tracks_of(b).ids) for a, b in pairwise(updates)]
    assert all(kept)
    assert [tracks_of(u).pixels.shape[0] for u in updates] == [8, 4, 4]


def test_points_begin_in_the_first_camera_and_are_looked_for_in_all() -> None:
    network = Noting()
    streaming = engine(network)
    updates = []
    for i in range(10):
        update = streaming.add([frame(i, camera=0), frame(i, camera=1)])
        updates += [] if update is None else [update]
    assert len(updates) == 3
    newest = -1
    for (batch, _), update in zip(network.asked, updates):
        assert batch.queries is not None
        tracks = tracks_of(update)
        assert tracks.pixels.shape == (2 * SIZE, len(tracks.ids), 2)
        began = batch.queries.frames[batch.queries.ids > newest]
        assert {batch.frames[i].camera for i in began} <= {0}
        newest = max(newest, int(batch.queries.ids.max()))
        # both cameras of a moment are in the same place here
        np.testing.assert_allclose(tracks.pixels[::2], tracks.pixels[1::2], atol=SAME)


def test_each_camera_has_pixels_of_its_own_images() -> None:
    """The flat images of the second camera have bars of 7 rows above and below."""

    def flat(i: int) -> Frame:
        other = frame(i, camera=1)
        return replace(other, image=other.image[:100])

    streaming = engine()
    updates = [streaming.add([frame(i), flat(i)]) for i in range(SIZE)]
    assert updates[-1] is not None
    tracks = tracks_of(updates[-1])
    small = np.stack([to_network(pixels) for pixels in tracks.pixels[::2]])
    expected = (small + np.array([0.5, 0.5 - 7])) * (WIDTH / SMALL_WIDTH, 100 / 28) - 0.5
    np.testing.assert_allclose(tracks.pixels[1::2], expected, atol=SAME)
    rows = small[..., 1].round()
    in_bars = (rows < 7) | (rows >= 35)
    first, second = tracks.visibility[::2] > 0.5, tracks.visibility[1::2] > 0.5
    assert (first & in_bars).any()
    np.testing.assert_array_equal(second, first & ~in_bars)


@pytest.fixture(scope='module')
def small() -> VGGT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VGGT(VGGTConfig.small()).eval()


def network_of(model: VGGT, width: int = 84) -> VGGTNetwork:
    return VGGTNetwork(model, 'small', True, 'float32', width)


def test_the_map_of_the_real_network_is_the_same_with_tracks(small: VGGT) -> None:
    plain = run(engine(network_of(small), track_points=0), (frame(i) for i in range(12)))
    tracked = run(engine(network_of(small)), (frame(i) for i in range(12)))
    assert len(plain) == len(tracked) == 4
    for one, other in zip(plain, tracked):
        assert one.tracks is None
        np.testing.assert_array_equal(one.world_from_camera, other.world_from_camera)
        assert one.reconstruction.depth.keys() == other.reconstruction.depth.keys()
        for i, depth in one.reconstruction.depth.items():
            np.testing.assert_array_equal(depth, other.reconstruction.depth[i])
            confidence = other.reconstruction.confidence[i]
            np.testing.assert_array_equal(one.reconstruction.confidence[i], confidence)


def test_the_real_network_follows_points(small: VGGT, caplog: pytest.LogCaptureFixture) -> None:
    """With a bias that makes it sure of all: untrained, it would lose half of them by chance."""
    tracker = small.track_head.tracker
    heads = tracker.vis_predictor[0], tracker.conf_predictor[0]
    kept = [head.bias.detach().clone() for head in heads]
    with torch.no_grad():
        for head in heads:
            head.bias.fill_(20.0)
    try:
        with caplog.at_level(logging.WARNING):
            updates = run(engine(network_of(small)), (frame(i) for i in range(14)))
    finally:
        with torch.no_grad():
            for head, bias in zip(heads, kept):
                head.bias.copy_(bias)
    assert caplog.text.count('UNTRAINED') == 1 and 'tracks are meaningless' in caplog.text
    assert len(updates) == 5
    for update in updates:
        tracks = tracks_of(update)
        count = len(tracks.ids)
        assert tracks.pixels.shape == (SIZE, count, 2) and np.isfinite(tracks.pixels).all()
        assert tracks.visibility.shape == tracks.confidence.shape == (SIZE, count)
        assert 0 < count <= POINTS
        assert not tracks.trained
        (x, y), seen = np.moveaxis(tracks.pixels, -1, 0), tracks.visibility > 0.5
        assert (x[seen] >= -1).all() and (x[seen] <= WIDTH).all()
        assert (y[seen] >= -1).all() and (y[seen] <= HEIGHT).all()
    for before, after in pairwise(updates):
        shared = tracks_of(before).visibility[STRIDE:].max(0) > 0.5
        if after.map_id == before.map_id:
            assert set(tracks_of(before).ids[shared]) <= set(tracks_of(after).ids)


def test_images_too_small_to_follow_points_in_are_said_once_and_the_map_goes_on(
    small: VGGT, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        updates = run(engine(network_of(small, 28)), (frame(i) for i in range(12)))
    assert len(updates) == 4 and all(update.tracks is None for update in updates)
    assert caplog.text.count('needs at least 32 pixels a side') == 1


def test_a_head_is_known_to_be_trained_by_its_weights(small: VGGT) -> None:
    assert not network_of(small).tracks_trained
    trained = VGGT(VGGTConfig.tiny())
    query = torch.tensor([[[5.0, 5.0], [20.0, 9.0]]])
    optimiser = torch.optim.AdamW(trained.track_head.parameters(), lr=1e-4)
    told = trained(torch.rand(1, 2, 3, 28, 28), query, heads=('tracks',))
    told.tracks.square().mean().backward()
    optimiser.step()
    assert network_of(trained, 28).tracks_trained
