# SPDX-License-Identifier: Apache-2.0
"""
A network that returns the ground truth with noise of a known size, to measure all other stages.

Like a real network it predicts each window in a frame and scale of its own. These and the noise
are drawn from the window's id, so runs are repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.frames.batch import Batch, PreprocessedImage
from vggt_ros.geometry.camera import encode_pose, invert_rigid, project
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.rotation import matrix_from_quaternion
from vggt_ros.model.prediction import Prediction
from vggt_ros.settings import Settings

FIELD_OF_VIEW = 1.2  # horizontal, radians; pixels are square
CONFIDENCE, LOW_CONFIDENCE = 5.0, 1.0  # the low one in the leftmost column of each image


@dataclass(frozen=True)
class World:
    """An empty box-shaped room around the origin, and a camera trajectory in it."""

    half_room: Array  # (3,), half the extent in x, y, z, metres
    cameras: Callable[[list[int]], Array]  # stamps, ns, to room_from_camera (S, 4, 4)

    def depth(self, stamp_ns: int, height: int, width: int) -> Array:
        """Return the depth (H, W) along the optical axis, in metres."""
        return self.cast_rays(stamp_ns, height, width)[0]

    def cast_rays(self, stamp_ns: int, height: int, width: int) -> tuple[Array, Array]:
        """
        Intersect the ray of each pixel with the walls.

        :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
        """
        rows, columns = np.indices((height, width), float)
        return self.cast_rays_at(stamp_ns, np.stack((columns, rows), -1), height, width)

    def cast_rays_at(
        self, stamp_ns: int, pixels: Array, height: int, width: int
    ) -> tuple[Array, Array]:
        """
        Intersect the rays of pixels (..., 2), x and y, of an image of this size with the walls.

        :returns: depth (...) and points (..., 3) in the room's frame, metres.
        """
        camera = self.cameras([stamp_ns])[0]
        homogeneous = np.concatenate((pixels, np.ones_like(pixels[..., :1])), -1)
        rays = homogeneous @ np.linalg.inv(true_intrinsics(height, width)).T @ camera[:3, :3].T
        with np.errstate(divide='ignore', invalid='ignore'):
            to_walls = (np.sign(rays) * self.half_room - camera[:3, 3]) / rays
        depth: Array = np.where(rays == 0, np.inf, to_walls).min(-1)
        return depth, camera[:3, 3] + depth[..., None] * rays

    def render_image(self, stamp_ns: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Return an image (H, W, 3) of the walls, grey sine waves of one to ten metres."""
        waves = 2 * np.random.default_rng(0).normal(size=(8, 3))
        points = self.cast_rays(stamp_ns, height, width)[1]
        grey = np.clip(128 + 20 * np.sin(points @ waves.T).sum(-1), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)


@dataclass(frozen=True)
class PredictionNoise:
    """Standard deviations of the predictions, independent for each pixel and camera."""

    depth: float = 0.0  # relative
    rotation: float = 0.0  # rad, of the angle
    translation: float = 0.0  # of the distance, over the extent of the window's cameras


class TruthNetwork:
    """The ground truth in a random frame and scale; see `vggt_ros.inference.network.Network`."""

    name = 'truth'
    trained = tracks_trained = True
    device = 'cpu'
    precision = 'float64'
    attention = 'none'

    def __init__(
        self,
        world: World,
        noise: PredictionNoise | None = None,
        image_width: int = 56,
        seed: int = 0,
    ) -> None:
        """
        Observe a world.

        :param noise: None: predictions are exact.
        :param image_width: of the network's images, pixels.
        :param seed: of frames, scales and noise.
        """
        self.image_width = image_width
        self._world = world
        self._noise = noise or PredictionNoise()
        self._seed = seed

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """Predict what the cameras of this batch observe."""
        if not set(heads) <= {'camera', 'depth', 'tracks'}:
            raise ValueError(f'heads are {heads}; the truth has camera, depth and tracks')
        height, width = batch.image_size
        stamps = [frame.stamp_ns for frame in batch.frames]
        generator = np.random.default_rng([self._seed, batch.window_id])
        scale, window_from_room = _random_gauge(generator)
        window_from_camera = window_from_room @ self._perturb_poses(
            self._world.cameras(stamps), generator
        )
        window_from_camera[:, :3, 3] *= scale
        depth = scale * np.stack([self._world.depth(stamp, height, width) for stamp in stamps])
        depth *= 1 + self._noise.depth * generator.normal(size=depth.shape)
        depth = depth[list(batch.depth_indices)]
        confidence = torch.full((1, len(depth), height, width), CONFIDENCE)
        confidence[..., 0] = LOW_CONFIDENCE
        intrinsics = torch.from_numpy(true_intrinsics(height, width)).expand(len(stamps), 3, 3)
        camera_from_window = invert_rigid(torch.from_numpy(window_from_camera))
        encodings = encode_pose(camera_from_window, intrinsics, height, width)
        return Prediction(
            **self._track(batch) if 'tracks' in heads else {},
            pose_encodings=[encodings.unsqueeze(0)],
            depth=torch.from_numpy(depth).float().unsqueeze(0),
            depth_confidence=confidence,
            descriptors=torch.from_numpy(_descriptors(self._world.cameras(stamps))).unsqueeze(0),
        )

    def _track(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Project the wall points of the batch's queries into each frame."""
        queries = batch.queries
        if queries is None:
            return {}
        height, width = batch.image_size
        stamps = [frame.stamp_ns for frame in batch.frames]
        points = np.zeros((len(queries.ids), 3))
        for i, stamp in enumerate(stamps):
            in_frame = queries.frames == i
            points[in_frame] = self._world.cast_rays_at(
                stamp, queries.points[in_frame].astype(float), height, width
            )[1]
        camera_from_room = invert_rigid(torch.from_numpy(self._world.cameras(stamps)))
        matrices = torch.from_numpy(true_intrinsics(height, width)).expand(len(stamps), 3, 3)
        tracks, in_camera = project(torch.from_numpy(points), camera_from_room, matrices)
        limit = tracks.new_tensor([width - 0.5, height - 0.5])
        visible = ((tracks >= -0.5) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
        return {
            'tracks': tracks.float()[None],
            'visibility': visible.float()[None],
            'track_confidence': torch.ones(1, *visible.shape),
        }

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """Do nothing: there is no encoder."""

    def prepare(self, settings: Settings) -> Settings:
        """Return the settings unchanged."""
        return settings

    def save_memory(self) -> str:
        """Return '': there is no memory to save."""
        return ''

    def _perturb_poses(self, cameras: Array, generator: np.random.Generator) -> Array:
        """Add noise to poses (S, 4, 4)."""
        noisy = cameras.copy()
        extent = np.linalg.norm(np.ptp(cameras[:, :3, 3], axis=0))
        # three independent components, each with a third of the variance
        rotation = self._noise.rotation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        offset = self._noise.translation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        noisy[:, :3, 3] += extent * offset
        quaternion = np.concatenate([rotation / 2, np.ones((len(cameras), 1))], -1)  # small angles
        noisy[:, :3, :3] @= matrix_from_quaternion(torch.from_numpy(quaternion)).numpy()
        return noisy


def _descriptors(cameras: Array) -> Array:
    """Return view descriptors (S, 32), similar for near views: waves of position and direction."""
    generator = np.random.default_rng(0)
    waves, phases = generator.normal(size=(6, 32)), generator.uniform(0, 2 * np.pi, 32)
    views = np.concatenate([cameras[:, :3, 3], 2 * cameras[:, :3, 2]], -1)
    descriptors: Array = np.cos(views @ waves + phases)
    return descriptors


def true_intrinsics(height: int, width: int) -> Array:
    """Return the camera matrix (3, 3) for an image of this size, in the network's convention."""
    focal = (width / 2) / np.tan(FIELD_OF_VIEW / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def _random_gauge(generator: np.random.Generator) -> tuple[float, Array]:
    """
    Draw the frame and scale of a window's prediction.

    :returns: scale, and `window_from_room` (4, 4), rigid.
    """
    window_from_room = np.eye(4)
    quaternion = torch.from_numpy(generator.normal(size=4))
    window_from_room[:3, :3] = matrix_from_quaternion(quaternion).numpy()
    window_from_room[:3, 3] = generator.normal(size=3)
    return float(np.exp(generator.uniform(-1, 1))), window_from_room
