# SPDX-License-Identifier: Apache-2.0
"""Points are followed both ways, and a window whose cameras are off is refined by them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_network import FakeNetwork, true_cameras
from PIL import Image

from vggt_ros.engine import StreamingEngine
from vggt_ros.frames.batch import Batch
from vggt_ros.frames.frame import Frame
from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.geometry.rotation import rotation_angle
from vggt_ros.inference.network import Network, load_network
from vggt_ros.io.recordings import open_frames
from vggt_ros.lab.evaluation.trajectory import compare_orientations
from vggt_ros.lab.evaluation.truth_network import Errors, World, true_intrinsics
from vggt_ros.lab.synthetic.windows import render_windows, window_seeds
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.model.prediction import Prediction
from vggt_ros.offline.export import ExportOptions
from vggt_ros.offline.point_tracks import (
    Followed,
    TrackingOptions,
    choose_queries,
    find_tracks,
    lift,
    refine_window,
)
from vggt_ros.offline.reconstruct import ReconstructOptions, reconstruct_recording
from vggt_ros.offline.refinement import Criteria, Refinement
from vggt_ros.offline.run import RunOptions
from vggt_ros.settings import ModelSettings, Settings

FRAMES, HEIGHT, WIDTH, STEP = 6, 210, 280, 700_000_000
ROOM = World(np.array([4.0, 3.0, 5.0]), true_cameras)
STAMPS = [i * STEP for i in range(FRAMES)]


class TrackingNetwork(FakeNetwork):
    """Follows points as they move on the walls of its room, with an error of `noise` pixels."""

    def __init__(self, noise: float = 0.0, lost: float = 0.0, **more: Any) -> None:
        super().__init__(image_width=WIDTH, world=ROOM, **more)
        self.noise, self.lost = noise, lost
        self.runs = 0
        self._random = np.random.default_rng(0)

    def __call__(self, batch: Any, heads: tuple[str, ...]) -> Prediction:
        self.batch = batch
        return super().__call__(batch, heads)

    def predict(
        self,
        images: torch.Tensor,
        heads: tuple[str, ...],
        query_points: torch.Tensor | None = None,
    ) -> Prediction:
        assert heads == ('tracks',) and query_points is not None
        self.runs += 1
        known = self.batch.images
        places = [int((known == image).flatten(1).all(1).nonzero()) for image in images[0]]
        stamps = [self.batch.frames[place].stamp_ns for place in places]
        tracks = follow(stamps, query_points[0].numpy())
        noise = self.noise * self._random.normal(size=tracks.shape)
        noise[0] = 0  # the query is where it was asked for
        away = self._random.random(tracks.shape[1]) < self.lost
        tracks[1:, away] = self._random.uniform(0, HEIGHT, tracks[1:, away].shape)
        visible = np.isfinite(tracks).all(-1)
        return Prediction(
            tracks=torch.from_numpy(np.nan_to_num(tracks) + noise)[None],
            visibility=torch.from_numpy(visible.astype(float))[None],
            track_confidence=torch.full((1, *visible.shape), 0.9),
        )


def follow(stamps: list[int], queries: np.ndarray) -> np.ndarray:
    """Where points (K, 2) of the first image are in all: (S, K, 2), NaN behind the camera."""
    matrix, cameras = true_intrinsics(HEIGHT, WIDTH), true_cameras(stamps)
    rays = np.concatenate([queries, np.ones((len(queries), 1))], -1) @ np.linalg.inv(matrix).T
    rays = rays @ cameras[0, :3, :3].T
    with np.errstate(divide='ignore', invalid='ignore'):
        to_walls = (np.sign(rays) * ROOM.half_room - cameras[0, :3, 3]) / rays
    distance = np.where(rays == 0, np.inf, to_walls).min(-1)
    points = cameras[0, :3, 3] + distance[:, None] * rays
    pixels, in_camera = project(
        torch.from_numpy(points),
        invert_rigid(torch.from_numpy(cameras))[:, :3],
        torch.from_numpy(matrix).expand(len(stamps), 3, 3),
    )
    return np.where((in_camera[..., 2:] > 0).numpy(), pixels.numpy(), np.nan)


def one_window(network: Network, images: list[np.ndarray] | None = None) -> MapUpdate:
    """Send the frames of one window through an engine."""
    images = images or [ROOM.paint(stamp, HEIGHT, WIDTH) for stamp in STAMPS]
    engine = StreamingEngine(
        Settings.from_flat({'window_size': len(images), 'window_stride': 1, 'min_parallax': 0.0}),
        network,
    )
    updates = [engine.add(Frame(image, i * STEP, 'camera')) for i, image in enumerate(images)]
    assert updates[-1] is not None
    return updates[-1]


def found_by(network: TrackingNetwork) -> Followed:
    update = one_window(network)
    followed = find_tracks(network, update.batch.images, update.reconstruction.confidence)
    print(followed.tracks.observed.sum(1), len(followed.first))
    return followed


def test_tracks_are_where_the_points_are() -> None:
    followed = found_by(network := TrackingNetwork())
    tracks, first = followed.tracks, followed.first
    assert len(first) > 100 and set(first) == {0, 2, 5}
    assert network.runs == 6
    for place in set(first):
        own = first == place
        order = [place, *(i for i in range(FRAMES) if i != place)]
        true = follow([STAMPS[i] for i in order], tracks.pixels[place, own])[np.argsort(order)]
        seen = tracks.observed[:, own]
        assert seen[place].all()
        np.testing.assert_allclose(tracks.pixels[:, own][seen], true[seen], atol=1e-3)
        inside = ((true >= 0.01) & (true <= [WIDTH - 1.01, HEIGHT - 1.01])).all(-1)
        assert (inside & ~seen).sum() == 0


def test_a_track_that_does_not_lead_back_is_dropped() -> None:
    right, some_lost = found_by(TrackingNetwork()), found_by(TrackingNetwork(lost=0.3))
    assert 0.2 < len(some_lost.first) / len(right.first) < 0.75
    true = np.stack(
        [
            follow([STAMPS[place], *STAMPS], some_lost.tracks.pixels[place, [track]])[1:, 0]
            for track, place in enumerate(some_lost.first)
        ],
        1,
    )
    missed = np.linalg.norm(some_lost.tracks.pixels - true, axis=-1)[some_lost.tracks.observed]
    assert (missed > 3).mean() < 0.01


def test_queries_are_spread_over_confident_corners() -> None:
    random = np.random.default_rng(0)
    image = np.full((140, 210), 128, np.uint8)
    image[:, :140] = np.kron(random.integers(0, 255, (14, 14)), np.ones((10, 10)))
    confidence = np.full(image.shape, 5, np.float32)
    confidence[:70, :70] = 1
    queries = choose_queries(image, confidence, 60)
    assert len(queries) == 60 and len(np.unique(queries, axis=0)) == 60
    x, y = queries.T
    assert x.max() < 145, 'a bare wall has no corners'
    assert not ((x < 70) & (y < 70)).any(), 'the depth there is not confident'
    counts = [((x // 70 == i) & (y // 70 == j)).sum() for i, j in ((1, 0), (0, 1), (1, 1))]
    assert sum(counts) > 55 and min(counts) > 12
    assert len(choose_queries(image, confidence, 60, min_confidence=9)) == 0
    assert len(choose_queries(np.full_like(image, 7), confidence, 60)) == 0


def test_points_begin_at_the_depth_under_their_query() -> None:
    update = one_window(network := TrackingNetwork())
    geometry = update.reconstruction
    followed = find_tracks(network, update.batch.images, geometry.confidence)
    poses, matrices = geometry.window_from_camera, geometry.intrinsics
    points = lift(followed, geometry.depth, poses, matrices)
    pixels, _ = project(
        torch.from_numpy(points),
        invert_rigid(torch.from_numpy(poses))[:, :3],
        torch.from_numpy(matrices),
    )
    seen = followed.tracks.observed
    np.testing.assert_allclose(pixels.numpy()[seen], followed.tracks.pixels[seen], atol=0.05)
    first_only = lift(followed, {0: geometry.depth[0]}, poses, matrices)
    np.testing.assert_array_equal(np.isfinite(first_only[:, 0]), followed.first == 0)


def test_one_query_frame_is_refused() -> None:
    with pytest.raises(ValueError, match='query_frames is 1, expected 2 or more'):
        TrackingOptions(query_frames=1)


def rotation_errors(update: MapUpdate, result: Refinement) -> tuple[float, float]:
    """Mean angle to the truth before and after, degrees, relative to the first camera."""
    true = true_cameras(STAMPS)[:, :3, :3]
    found = []
    for cameras in (update.reconstruction.window_from_camera, result.world_from_camera):
        turns = cameras[0, :3, :3].T @ cameras[1:, :3, :3]
        apart = turns.transpose(0, 2, 1) @ (true[0].T @ true[1:])
        found.append(math.degrees(float(rotation_angle(torch.from_numpy(apart)).mean())))
    return found[0], found[1]


def test_a_window_whose_cameras_are_off_is_refined() -> None:
    pytest.importorskip('pycolmap', reason='needs pycolmap')
    errors = Errors(depth=0.02, rotation=math.radians(2), translation=0.03)
    network = TrackingNetwork(noise=0.5, lost=0.1, errors=errors)
    update = one_window(network)
    result = refine_window(network, update.batch, update.reconstruction)
    before, after = rotation_errors(update, result)
    print(result, before, after)
    assert result.accepted and result.rms_after < 0.6 < result.rms_before
    assert before > 1.5 and after < 0.2
    np.testing.assert_array_equal(result.world_from_camera[0], np.eye(4))


def test_untrained_tracks_move_nothing() -> None:
    """The tracks head of the embedded weights has never been trained."""
    pytest.importorskip('pycolmap', reason='needs pycolmap')
    network = load_network(ModelSettings(checkpoint='embedded', device='cpu'))
    windows = render_windows(window_seeds('test', 0, 0, 1), FRAMES, 56, 84)
    images = (windows.images[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    update = one_window(network, list(images))
    for criteria in (Criteria(), Criteria(min_confidence=0.0, min_per_frame=5)):
        result = refine_window(
            network,
            update.batch,
            update.reconstruction,
            TrackingOptions(min_visibility=0),
            criteria,
        )
        print(result)
        assert not result.accepted and result.why_not
        np.testing.assert_array_equal(
            result.world_from_camera, update.reconstruction.window_from_camera
        )


def test_where_the_lens_saw_nothing_is_no_query() -> None:
    pytest.importorskip('pycolmap', reason='needs pycolmap')
    network = TrackingNetwork()
    update = one_window(network)
    left = np.zeros((HEIGHT, WIDTH), np.bool_)
    batch: Batch = replace(
        update.batch, fitted=tuple(replace(each, seen=left) for each in update.batch.images)
    )
    assert not refine_window(network, batch, update.reconstruction).accepted
    assert network.runs == 0


def test_a_map_of_several_windows_is_refined(tmp_path) -> None:
    pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')
    stamps = [i * STEP for i in range(12)]
    (tmp_path / 'pictures').mkdir()
    for i, stamp in enumerate(stamps):
        picture = Image.fromarray(ROOM.paint(stamp, HEIGHT, WIDTH))
        picture.save(tmp_path / 'pictures' / f'{i}.png')
    source = open_frames(str(tmp_path / 'pictures'), rate=1e9 / STEP)
    flat = {'window_size': 6, 'window_stride': 3, 'min_parallax': 0.0, 'min_confidence': 0.0}

    def error(refine: bool) -> tuple[float, str]:
        errors = Errors(depth=0.01, rotation=math.radians(2), translation=0.03)
        made = reconstruct_recording(
            source,
            TrackingNetwork(noise=0.5, errors=errors),  # type: ignore[arg-type]
            Settings.from_flat(flat),
            ReconstructOptions(RunOptions(tracks=refine), ExportOptions(refine=refine)),
            tmp_path / f'map{refine}',
            lambda _: None,
            lambda: False,
        ).made
        assert made is not None and len(made.joined.windows) == 3
        poses = np.stack([frame.world_from_camera for frame in made.joined.frames])
        truth = true_cameras(stamps)
        off = compare_orientations(truth, poses).mean()
        return math.degrees(off), made.description.get('refinement', '')

    (before, nothing), (after, said) = error(False), error(True)
    assert not nothing and said.startswith('refined: ')
    assert before > 0.8 and after < 0.4 * before
