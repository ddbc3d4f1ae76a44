# SPDX-License-Identifier: Apache-2.0
"""Points are tracked forwards and backwards, and refine a window with wrong cameras."""

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
from vggt_ros.inference.load import load_network
from vggt_ros.inference.network import Network
from vggt_ros.io.recordings import open_frames
from vggt_ros.lab.evaluation.trajectory_errors import orientation_errors
from vggt_ros.lab.evaluation.truth_network import PredictionNoise, World, true_intrinsics
from vggt_ros.lab.synthetic.windows import render_windows, window_seeds
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.model.prediction import Prediction
from vggt_ros.offline.export import ExportOptions
from vggt_ros.offline.point_tracks import (
    QueryTracks,
    TrackingOptions,
    choose_corners,
    track_window,
    unproject_queries,
)
from vggt_ros.offline.reconstruct import ReconstructOptions, reconstruct_recording
from vggt_ros.offline.refine import refine_window
from vggt_ros.offline.refinement import Criteria, Refinement
from vggt_ros.offline.run import RunOptions
from vggt_ros.settings import ModelSettings, Settings

FRAMES, HEIGHT, WIDTH, STEP = 6, 210, 280, 700_000_000
ROOM = World(np.array([4.0, 3.0, 5.0]), true_cameras)
STAMPS = [i * STEP for i in range(FRAMES)]


class TrackingNetwork(FakeNetwork):
    """Tracks points on the walls of its room, with an error of `noise` pixels."""

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
        known = self.batch.stack()
        indices = [int((known == image).flatten(1).all(1).nonzero()) for image in images[0]]
        stamps = [self.batch.frames[i].stamp_ns for i in indices]
        tracks = true_tracks(stamps, query_points[0].numpy())
        noise = self.noise * self._random.normal(size=tracks.shape)
        noise[0] = 0  # the query is exact
        lost = self._random.random(tracks.shape[1]) < self.lost
        tracks[1:, lost] = self._random.uniform(0, HEIGHT, tracks[1:, lost].shape)
        visible = np.isfinite(tracks).all(-1)
        return Prediction(
            tracks=torch.from_numpy(np.nan_to_num(tracks) + noise)[None],
            visibility=torch.from_numpy(visible.astype(float))[None],
            track_confidence=torch.full((1, *visible.shape), 0.9),
        )


def true_tracks(stamps: list[int], queries: np.ndarray) -> np.ndarray:
    """Return points (K, 2) of the first image in all images: (S, K, 2), NaN behind the camera."""
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
    images = images or [ROOM.render_image(stamp, HEIGHT, WIDTH) for stamp in STAMPS]
    engine = StreamingEngine(
        Settings.from_flat({'window_size': len(images), 'window_stride': 1, 'min_parallax': 0.0}),
        network,
    )
    updates = [engine.add(Frame(image, i * STEP, 'camera')) for i, image in enumerate(images)]
    assert updates[-1] is not None
    return updates[-1]


def tracks_of(network: TrackingNetwork) -> QueryTracks:
    update = one_window(network)
    tracked = track_window(network, update.batch.stack(), update.reconstruction.confidence)
    print(tracked.tracks.observed.sum(1), len(tracked.query_frame))
    return tracked


def test_tracks_agree_with_the_scene() -> None:
    tracked = tracks_of(network := TrackingNetwork())
    tracks, first = tracked.tracks, tracked.query_frame
    assert len(first) > 100 and set(first) == {0, 2, 5}
    assert network.runs == 6
    for query_frame in set(first):
        own = first == query_frame
        order = [query_frame, *(i for i in range(FRAMES) if i != query_frame)]
        true = true_tracks([STAMPS[i] for i in order], tracks.pixels[query_frame, own])[
            np.argsort(order)
        ]
        seen = tracks.observed[:, own]
        assert seen[query_frame].all()
        np.testing.assert_allclose(tracks.pixels[:, own][seen], true[seen], atol=1e-3)
        inside = ((true >= 0.01) & (true <= [WIDTH - 1.01, HEIGHT - 1.01])).all(-1)
        assert (inside & ~seen).sum() == 0


def test_a_track_that_fails_the_backward_check_is_dropped() -> None:
    right, some_lost = tracks_of(TrackingNetwork()), tracks_of(TrackingNetwork(lost=0.3))
    assert 0.2 < len(some_lost.query_frame) / len(right.query_frame) < 0.75
    true = np.stack(
        [
            true_tracks([STAMPS[i], *STAMPS], some_lost.tracks.pixels[i, [track]])[1:, 0]
            for track, i in enumerate(some_lost.query_frame)
        ],
        1,
    )
    missed = np.linalg.norm(some_lost.tracks.pixels - true, axis=-1)[some_lost.tracks.observed]
    assert (missed > 3).mean() < 0.01


def test_queries_are_distributed_over_confident_corners() -> None:
    random = np.random.default_rng(0)
    image = np.full((140, 210), 128, np.uint8)
    image[:, :140] = np.kron(random.integers(0, 255, (14, 14)), np.ones((10, 10)))
    confidence = np.full(image.shape, 5, np.float32)
    confidence[:70, :70] = 1
    queries = choose_corners(image, confidence, 60)
    assert len(queries) == 60 and len(np.unique(queries, axis=0)) == 60
    x, y = queries.T
    assert x.max() < 145, 'a bare wall has no corners'
    assert not ((x < 70) & (y < 70)).any(), 'the depth there is not confident'
    counts = [((x // 70 == i) & (y // 70 == j)).sum() for i, j in ((1, 0), (0, 1), (1, 1))]
    assert sum(counts) > 55 and min(counts) > 12
    assert len(choose_corners(image, confidence, 60, min_confidence=9)) == 0
    assert len(choose_corners(np.full_like(image, 7), confidence, 60)) == 0


def test_queries_are_unprojected_with_the_depth() -> None:
    update = one_window(network := TrackingNetwork())
    geometry = update.reconstruction
    tracked = track_window(network, update.batch.stack(), geometry.confidence)
    poses, matrices = geometry.window_from_camera, geometry.intrinsics
    points = unproject_queries(tracked, geometry.depth, poses, matrices)
    pixels, _ = project(
        torch.from_numpy(points),
        invert_rigid(torch.from_numpy(poses))[:, :3],
        torch.from_numpy(matrices),
    )
    seen = tracked.tracks.observed
    np.testing.assert_allclose(pixels.numpy()[seen], tracked.tracks.pixels[seen], atol=0.05)
    first_only = unproject_queries(tracked, {0: geometry.depth[0]}, poses, matrices)
    np.testing.assert_array_equal(np.isfinite(first_only[:, 0]), tracked.query_frame == 0)


def test_one_query_frame_is_rejected() -> None:
    with pytest.raises(ValueError, match='query_frames is 1, expected 2 or more'):
        TrackingOptions(query_frames=1)


def rotation_errors(update: MapUpdate, result: Refinement) -> tuple[float, float]:
    """Mean angle to the truth before and after, degrees, relative to the first camera."""
    true = true_cameras(STAMPS)[:, :3, :3]
    found = []
    for cameras in (update.reconstruction.window_from_camera, result.world_from_camera):
        rotations = cameras[0, :3, :3].T @ cameras[1:, :3, :3]
        difference = rotations.transpose(0, 2, 1) @ (true[0].T @ true[1:])
        found.append(math.degrees(float(rotation_angle(torch.from_numpy(difference)).mean())))
    return found[0], found[1]


def test_a_window_with_wrong_cameras_is_refined() -> None:
    pytest.importorskip('pycolmap', reason='needs pycolmap')
    errors = PredictionNoise(depth=0.02, rotation=math.radians(2), translation=0.03)
    network = TrackingNetwork(noise=0.5, lost=0.1, prediction_noise=errors)
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
        assert not result.accepted and result.rejection_reason
        np.testing.assert_array_equal(
            result.world_from_camera, update.reconstruction.window_from_camera
        )


def test_there_are_no_queries_where_the_lens_does_not_see() -> None:
    pytest.importorskip('pycolmap', reason='needs pycolmap')
    network = TrackingNetwork()
    update = one_window(network)
    unseen = np.zeros((HEIGHT, WIDTH), np.bool_)
    batch: Batch = replace(
        update.batch, images=tuple(replace(each, seen=unseen) for each in update.batch.images)
    )
    assert not refine_window(network, batch, update.reconstruction).accepted
    assert network.runs == 0


def test_a_map_of_several_windows_is_refined(tmp_path) -> None:
    pytest.importorskip('trimesh', reason='reconstruct needs vggt_ros[offline]')
    stamps = [i * STEP for i in range(12)]
    (tmp_path / 'images').mkdir()
    for i, stamp in enumerate(stamps):
        image = Image.fromarray(ROOM.render_image(stamp, HEIGHT, WIDTH))
        image.save(tmp_path / 'images' / f'{i}.png')
    source = open_frames(str(tmp_path / 'images'), rate=1e9 / STEP)
    flat = {'window_size': 6, 'window_stride': 3, 'min_parallax': 0.0, 'min_confidence': 0.0}

    def error(refine: bool) -> tuple[float, str]:
        errors = PredictionNoise(depth=0.01, rotation=math.radians(2), translation=0.03)
        exported = reconstruct_recording(
            source,
            TrackingNetwork(noise=0.5, prediction_noise=errors),  # type: ignore[arg-type]
            Settings.from_flat(flat),
            ReconstructOptions(RunOptions(tracks=refine), ExportOptions(refine=refine)),
            tmp_path / f'map{refine}',
            lambda _: None,
            lambda: False,
        ).export
        assert exported is not None and len(exported.map.windows) == 3
        poses = np.stack([frame.world_from_camera for frame in exported.map.frames])
        truth = true_cameras(stamps)
        angle = orientation_errors(truth, poses).mean()
        return math.degrees(angle), exported.description.get('refinement', '')

    (before, nothing), (after, refinement) = error(False), error(True)
    assert not nothing and refinement.startswith('refined: ')
    assert before > 0.8 and after < 0.4 * before
