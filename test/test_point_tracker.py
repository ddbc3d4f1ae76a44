# SPDX-License-Identifier: Apache-2.0
"""Point tracks keep their ids over many windows and agree with the ground truth."""

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
from test_rectifier import project_with_distortion

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
NETWORK_HEIGHT, NETWORK_WIDTH = 42, 56  # of the network's images
POINTS, SIZE, STRIDE = 24, 6, 2
TOLERANCE = 0.01  # pixels; predictions are float32
WORLD = World(ROOM, true_cameras)
LENSES = {
    'plumb_bob': ((120.0, 118.0, 82.0, 58.0), [-0.25, 0.08, 0.001, -0.002, -0.01]),
    'equidistant': ((90.0, 90.0, 78.0, 61.0), [0.02, -0.005, 0.001, 0.0]),
}


def frame(i: int, red: int | None = None, camera: int = 0, lens: str = '') -> Frame:
    """Noise, which has corners everywhere; the fake network predicts from the stamp alone."""
    image = np.random.default_rng([i, camera]).integers(0, 200, (HEIGHT, WIDTH, 3), np.uint8)
    if red is not None:
        image[0, 0, 0] = red
    calibration = None
    if lens:
        (fx, fy, cx, cy), d = LENSES[lens]
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        calibration = Calibration(WIDTH, HEIGHT, lens, matrix, np.array(d))
    return Frame(image, i * STEP_NS, f'camera_{camera}', calibration, camera)


class RecordingNetwork(FakeNetwork):
    """Records its inputs, and modifies its predictions by a function."""

    def __init__(self, modify: Callable[[Batch, Prediction], Prediction] | None = None) -> None:
        super().__init__()
        self.inputs: list[tuple[Batch, tuple[str, ...]]] = []
        self._modify = modify

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        self.inputs.append((batch, heads))
        prediction = super().__call__(batch, heads)
        return prediction if self._modify is None else self._modify(batch, prediction)


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


def to_camera(network_pixels: np.ndarray, lens: str) -> np.ndarray:
    """Transform pixels (K, 2) of the network's images into the camera's, with distortion."""
    pixels = (network_pixels + 0.5) * WIDTH / NETWORK_WIDTH - 0.5
    if not lens:
        return pixels
    plane = (pixels - (WIDTH / 2, HEIGHT / 2)) * math.tan(FIELD_OF_VIEW / 2) / (WIDTH / 2)
    rays = np.concatenate([plane, np.ones((len(plane), 1))], -1)
    calibration = calibration_of(lens)
    return project_with_distortion(lens, calibration.K, calibration.D, rays)


def to_network(pixels: np.ndarray, lens: str = '') -> np.ndarray:
    """Invert `to_camera` by iteration."""
    network_pixels = (pixels.astype(float) + 0.5) * NETWORK_WIDTH / WIDTH - 0.5
    for _ in range(100 if lens else 0):
        network_pixels += 0.2 * (pixels - to_camera(network_pixels, lens))
    np.testing.assert_allclose(to_camera(network_pixels, lens), pixels, atol=1e-4)
    return network_pixels


def project(points: np.ndarray, stamp_ns: int, lens: str) -> np.ndarray:
    """Project points (K, 3) of the room into the camera's image: (K, 2) pixels."""
    camera = true_cameras([stamp_ns])[0]
    in_camera = (points - camera[:3, 3]) @ camera[:3, :3]
    homogeneous = in_camera @ true_intrinsics(NETWORK_HEIGHT, NETWORK_WIDTH).T
    return to_camera(homogeneous[:, :2] / homogeneous[:, 2:], lens)


@pytest.mark.parametrize('lens', ['', *LENSES])
def test_each_id_is_one_point_of_the_scene_over_many_windows(lens: str) -> None:
    view = math.degrees(FIELD_OF_VIEW) if lens else 0.0
    streaming = engine(rectified_field_of_view=view)
    updates = run(streaming, (frame(i, lens=lens) for i in range(30)))
    assert len(updates) == 13 and {u.map_id for u in updates} == {0}
    points: dict[int, np.ndarray] = {}  # in the room, by track id
    compared = 0
    for update in updates:
        tracks = tracks_of(update)
        assert tracks.pixels.shape == (SIZE, len(tracks.ids), 2)
        for i, observed in enumerate(update.batch.frames):
            for k in np.flatnonzero(tracks.visibility[i] > 0.5):
                track_id, pixel = int(tracks.ids[k]), tracks.pixels[i, k]
                if track_id not in points:
                    network_pixel = to_network(pixel[None], lens)
                    _, on_walls = WORLD.cast_rays_at(
                        observed.stamp_ns, network_pixel, NETWORK_HEIGHT, NETWORK_WIDTH
                    )
                    points[track_id] = on_walls[0]
                expected = project(points[track_id][None], observed.stamp_ns, lens)[0]
                np.testing.assert_allclose(pixel, expected, atol=TOLERANCE)
                compared += 1
    assert compared > 1000
    assert len(points) > POINTS + 5  # points leave the field of view and are replaced


def test_tracks_continue_while_they_are_visible_and_lost_ones_are_replaced() -> None:
    updates = run(engine(), (frame(i) for i in range(40)))
    windows_by_track: dict[int, list[int]] = {}
    for update in updates:
        tracks = tracks_of(update)
        assert len(set(tracks.ids.tolist())) == len(tracks.ids) == POINTS
        for track_id in tracks.ids.tolist():
            windows_by_track.setdefault(track_id, []).append(update.window_id)
    for before, after in pairwise(updates):
        old, new = tracks_of(before), tracks_of(after)
        shared = [i for i, n in enumerate(before.batch.ids) if n in after.batch.ids]
        visible = old.visibility[shared].max(0) > 0.5
        assert set(old.ids[visible]) <= set(new.ids)
        assert not set(old.ids[~visible]) & set(new.ids)
        assert all(track_id > old.ids.max() for track_id in set(new.ids) - set(old.ids))
    for windows in windows_by_track.values():
        assert windows == list(range(windows[0], windows[-1] + 1))
    assert len(windows_by_track) > POINTS + 5


def test_no_track_is_replaced_while_the_camera_is_stationary() -> None:
    stationary = World(ROOM, lambda stamps: true_cameras([0] * len(stamps)))
    updates = run(engine(FakeNetwork(world=stationary)), (frame(i) for i in range(20)))
    for update in updates:
        tracks = tracks_of(update)
        assert tracks.ids.tolist() == list(range(POINTS))
        assert (tracks.visibility == 1).all()
        np.testing.assert_allclose(
            tracks.pixels, tracks.pixels[:1].repeat(SIZE, 0), atol=TOLERANCE
        )


def test_a_new_map_has_new_tracks() -> None:
    streaming = engine()
    updates = run(streaming, (frame(i) for i in range(10)))
    streaming.reset('requested')
    updates += run(streaming, (frame(i) for i in range(10, 20)))
    updates += run(streaming, (frame(i) for i in range(10)))  # stamps run backwards
    assert [u.map_id for u in updates] == [0] * 3 + [1] * 3 + [2] * 3
    ids = [set(tracks_of(u).ids.tolist()) for u in updates]
    for first in (3, 6):
        assert min(ids[first]) > max(set.union(*ids[:first]))


def test_a_new_map_that_shares_frames_with_the_last_one_has_new_tracks() -> None:
    def randomise_depth(batch: Batch, prediction: Prediction) -> Prediction:
        assert prediction.depth is not None
        generator = torch.Generator().manual_seed(batch.window_id)
        noise = torch.randn(prediction.depth.shape, generator=generator).exp()
        return replace(prediction, depth=prediction.depth * noise)

    updates = run(engine(RecordingNetwork(randomise_depth)), (frame(i) for i in range(8)))
    assert [u.map_id for u in updates] == [0, 1]
    assert tracks_of(updates[1]).ids.tolist() == list(range(POINTS, 2 * POINTS))


def test_tracks_continue_over_a_lost_window() -> None:
    network = RecordingNetwork()
    streaming = engine(network)
    updates = run(streaming, (frame(i) for i in range(SIZE + STRIDE - 1)))
    with pytest.raises(PredictionError):
        streaming.add(frame(7, red=Failure.NAN))
    updates += run(streaming, (frame(i) for i in range(8, 10)))
    assert [u.window_id for u in updates] == [0, 2] and {u.map_id for u in updates} == {0}
    old, new = map(tracks_of, updates)
    visible = old.visibility[-2:].max(0) > 0.5  # frames 4 and 5
    assert set(old.ids[visible]) <= set(new.ids)


@pytest.mark.parametrize('output', ['visibility', 'track_confidence'])
def test_a_track_continues_from_the_frame_where_it_was_last_visible(output: str) -> None:
    """Tracks of even ids are lost after the third frame of the first window, some earlier."""

    def hide(batch: Batch, prediction: Prediction) -> Prediction:
        values = getattr(prediction, output)
        if batch.window_id > 0 or values is None:
            return prediction
        values = values.clone()
        values[0, 3:, ::2] = 0.2
        values[0, 2:, ::4] = 0.2
        return replace(prediction, **{output: values})

    network = RecordingNetwork(hide)
    run(engine(network), (frame(i) for i in range(SIZE + STRIDE)))
    first, second = (batch.queries for batch, _ in network.inputs)
    assert first is not None and second is not None
    query_frames = dict(zip(second.ids.tolist(), second.frames.tolist()))
    assert not set(first.ids.tolist()[::4]) & set(query_frames)
    from_third = [track_id for track_id in first.ids.tolist()[2::4] if track_id in query_frames]
    # The third frame of the first window is the first of the second.
    assert from_third and {query_frames[track_id] for track_id in from_third} == {0}
    assert len(query_frames) == POINTS and max(query_frames) >= POINTS


def test_new_tracks_start_where_depth_is_confident_and_away_from_others() -> None:
    def lower_confidence_on_the_left(_batch: Batch, prediction: Prediction) -> Prediction:
        assert prediction.depth_confidence is not None
        confidence = prediction.depth_confidence.clone()
        confidence[..., : NETWORK_WIDTH // 2] = 1.0
        return replace(prediction, depth_confidence=confidence)

    network = RecordingNetwork(lower_confidence_on_the_left)
    updates = run(engine(network), (frame(i) for i in range(30)))
    started = 0
    for (batch, _), update in zip(network.inputs[1:], updates):
        queries, before = batch.queries, tracks_of(update)
        assert queries is not None
        new = queries.ids > before.ids.max()
        started += new.sum()
        assert (queries.points[new, 0] >= NETWORK_WIDTH // 2).all()
        assert set(queries.frames[new]) <= {SIZE - STRIDE - 1}  # the newest shared frame
        continued = np.isin(before.ids, queries.ids) & (before.visibility[-1] > 0.5)
        others = to_network(before.pixels[-1, continued])
        points = np.concatenate([others, queries.points[new]])
        distances = np.linalg.norm(points[:, None] - queries.points[new], axis=-1)
        spacing = 0.5 * math.sqrt(NETWORK_WIDTH * NETWORK_HEIGHT / POINTS)
        assert (np.sort(distances, axis=0)[1:2] >= spacing - 1).all()
    assert started > 5


def test_no_track_starts_in_the_bars_around_an_image() -> None:
    network = RecordingNetwork()
    run(engine(network, fit='pad'), (frame(i) for i in range(SIZE)))
    (batch, _) = network.inputs[0]
    assert batch.image_size == (56, 56) and batch.queries is not None
    rows = batch.queries.points[:, 1]
    assert (rows >= 7 + 3).all() and (rows < 49 - 3).all()  # corners at their border do not count
    assert len(rows) == POINTS


def test_tracks_are_not_predicted_unless_requested() -> None:
    network = RecordingNetwork()
    streaming = engine(network)
    updates = run(streaming, (frame(i) for i in range(8)), with_tracks=False)
    assert [u.tracks for u in updates] == [None, None]
    assert all(heads == ('camera', 'depth') for _, heads in network.inputs)
    assert all(batch.queries is None for batch, _ in network.inputs)
    (update,) = run(streaming, (frame(i) for i in range(8, 10)))
    assert len(tracks_of(update).ids) == POINTS
    without_points = RecordingNetwork()
    run(engine(without_points, track_points=0), (frame(i) for i in range(8)))
    assert all(heads == ('camera', 'depth') for _, heads in without_points.inputs)


def test_tracks_continue_when_windows_are_halved() -> None:
    network = RecordingNetwork()
    frames = [frame(i, red=Failure.OUT_OF_MEMORY if i == 11 else None) for i in range(15)]
    updates = run(engine(network, window_size=8, window_stride=4), frames)
    assert [u.batch.ids for u in updates] == [tuple(range(8)), (7, 9, 10, 11), (11, 12, 13, 14)]
    continued = [set(tracks_of(a).ids) & set(tracks_of(b).ids) for a, b in pairwise(updates)]
    assert all(continued)
    assert [tracks_of(u).pixels.shape[0] for u in updates] == [8, 4, 4]


def test_tracks_start_in_the_first_camera_and_are_predicted_in_all() -> None:
    network = RecordingNetwork()
    streaming = engine(network)
    updates = []
    for i in range(10):
        update = streaming.add([frame(i, camera=0), frame(i, camera=1)])
        updates += [] if update is None else [update]
    assert len(updates) == 3
    newest = -1
    for (batch, _), update in zip(network.inputs, updates):
        assert batch.queries is not None
        tracks = tracks_of(update)
        assert tracks.pixels.shape == (2 * SIZE, len(tracks.ids), 2)
        started = batch.queries.frames[batch.queries.ids > newest]
        assert {batch.frames[i].camera for i in started} <= {0}
        newest = max(newest, int(batch.queries.ids.max()))
        # both cameras have the same pose
        np.testing.assert_allclose(tracks.pixels[::2], tracks.pixels[1::2], atol=TOLERANCE)


def test_pixels_of_each_camera_are_those_of_its_own_images() -> None:
    """The images of the second camera are lower and padded with 7 rows above and below."""

    def low_frame(i: int) -> Frame:
        other = frame(i, camera=1)
        return replace(other, image=other.image[:100])

    streaming = engine()
    updates = [streaming.add([frame(i), low_frame(i)]) for i in range(SIZE)]
    assert updates[-1] is not None
    tracks = tracks_of(updates[-1])
    network_pixels = np.stack([to_network(pixels) for pixels in tracks.pixels[::2]])
    expected = (network_pixels + np.array([0.5, 0.5 - 7])) * (
        WIDTH / NETWORK_WIDTH,
        100 / 28,
    ) - 0.5
    np.testing.assert_allclose(tracks.pixels[1::2], expected, atol=TOLERANCE)
    rows = network_pixels[..., 1].round()
    in_bars = (rows < 7) | (rows >= 35)
    first, second = tracks.visibility[::2] > 0.5, tracks.visibility[1::2] > 0.5
    assert (first & in_bars).any()
    np.testing.assert_array_equal(second, first & ~in_bars)


@pytest.fixture(scope='module')
def small_model() -> VGGT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VGGT(VGGTConfig.small()).eval()


def network_of(model: VGGT, width: int = 84) -> VGGTNetwork:
    return VGGTNetwork(model, 'small', True, 'float32', width)


def test_tracks_do_not_change_the_map_of_the_real_network(small_model: VGGT) -> None:
    plain = run(engine(network_of(small_model), track_points=0), (frame(i) for i in range(12)))
    tracked = run(engine(network_of(small_model)), (frame(i) for i in range(12)))
    assert len(plain) == len(tracked) == 4
    for one, other in zip(plain, tracked):
        assert one.tracks is None
        np.testing.assert_array_equal(one.world_from_camera, other.world_from_camera)
        assert one.reconstruction.depth.keys() == other.reconstruction.depth.keys()
        for i, depth in one.reconstruction.depth.items():
            np.testing.assert_array_equal(depth, other.reconstruction.depth[i])
            confidence = other.reconstruction.confidence[i]
            np.testing.assert_array_equal(one.reconstruction.confidence[i], confidence)


def test_the_real_network_predicts_tracks(
    small_model: VGGT, caplog: pytest.LogCaptureFixture
) -> None:
    """The biases make all points visible: untrained, it would lose half of them at random."""
    tracker = small_model.track_head.tracker
    heads = tracker.vis_predictor[0], tracker.conf_predictor[0]
    biases = [head.bias.detach().clone() for head in heads]
    with torch.no_grad():
        for head in heads:
            head.bias.fill_(20.0)
    try:
        with caplog.at_level(logging.WARNING):
            updates = run(engine(network_of(small_model)), (frame(i) for i in range(14)))
    finally:
        with torch.no_grad():
            for head, bias in zip(heads, biases):
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
        (x, y), visible = np.moveaxis(tracks.pixels, -1, 0), tracks.visibility > 0.5
        assert (x[visible] >= -1).all() and (x[visible] <= WIDTH).all()
        assert (y[visible] >= -1).all() and (y[visible] <= HEIGHT).all()
    for before, after in pairwise(updates):
        shared = tracks_of(before).visibility[STRIDE:].max(0) > 0.5
        if after.map_id == before.map_id:
            assert set(tracks_of(before).ids[shared]) <= set(tracks_of(after).ids)


def test_images_too_small_for_tracks_are_reported_once_and_the_map_continues(
    small_model: VGGT, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        updates = run(engine(network_of(small_model, 28)), (frame(i) for i in range(12)))
    assert len(updates) == 4 and all(update.tracks is None for update in updates)
    assert caplog.text.count('needs at least 32 pixels a side') == 1


def test_a_trained_track_head_is_recognised_by_its_weights(small_model: VGGT) -> None:
    assert not network_of(small_model).tracks_trained
    trained = VGGT(VGGTConfig.tiny())
    query = torch.tensor([[[5.0, 5.0], [20.0, 9.0]]])
    optimiser = torch.optim.AdamW(trained.track_head.parameters(), lr=1e-4)
    prediction = trained(torch.rand(1, 2, 3, 28, 28), query, heads=('tracks',))
    prediction.tracks.square().mean().backward()
    optimiser.step()
    assert network_of(trained, 28).tracks_trained
