# SPDX-License-Identifier: Apache-2.0
"""
What a network would say that knows the truth, but for errors of a known size.

Like a real network it tells each window in a frame and a unit of its own; both follow from the
window's number, so that runs can be repeated. It errs as much as it is told to, in each window
anew. Everything behind the network can be measured with it.
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
CONFIDENCE, LOW_CONFIDENCE = 5.0, 1.0  # the leftmost column of each image is not to be trusted


@dataclass(frozen=True)
class World:
    """An empty box-shaped room around the origin, and a camera's way through it."""

    half_room: Array  # (3,), half the extent in x, y, z, metres
    cameras: Callable[[list[int]], Array]  # stamps, ns, to room_from_camera (S, 4, 4)

    def depth(self, stamp_ns: int, height: int, width: int) -> Array:
        """Measure the depth (H, W) along the optical axis, in metres."""
        return self.meet_walls(stamp_ns, height, width)[0]

    def meet_walls(self, stamp_ns: int, height: int, width: int) -> tuple[Array, Array]:
        """
        Follow the ray of each pixel to a wall.

        :returns: depth (H, W) and points (H, W, 3) in the room's frame, metres.
        """
        rows, columns = np.indices((height, width), float)
        return self.meet_walls_at(stamp_ns, np.stack((columns, rows), -1), height, width)

    def meet_walls_at(
        self, stamp_ns: int, places: Array, height: int, width: int
    ) -> tuple[Array, Array]:
        """
        Follow the rays of some places (..., 2), as (x, y), of an image of this size to a wall.

        :returns: depth (...) and points (..., 3), as `meet_walls`.
        """
        camera = self.cameras([stamp_ns])[0]
        pixels = np.concatenate((places, np.ones_like(places[..., :1])), -1)
        rays = pixels @ np.linalg.inv(true_intrinsics(height, width)).T @ camera[:3, :3].T
        with np.errstate(divide='ignore', invalid='ignore'):
            to_walls = (np.sign(rays) * self.half_room - camera[:3, 3]) / rays
        depth: Array = np.where(rays == 0, np.inf, to_walls).min(-1)
        return depth, camera[:3, 3] + depth[..., None] * rays

    def paint(self, stamp_ns: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Show the walls (H, W, 3), with a grey pattern of waves of one to ten metres."""
        waves = 2 * np.random.default_rng(0).normal(size=(8, 3))
        points = self.meet_walls(stamp_ns, height, width)[1]
        grey = np.clip(128 + 20 * np.sin(points @ waves.T).sum(-1), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Errors:
    """Standard deviations of what is told, independent for each pixel and camera."""

    depth: float = 0.0  # relative
    rotation: float = 0.0  # rad, of the angle
    translation: float = 0.0  # of the distance, over the extent of the window's cameras


class TruthNetwork:
    """The truth in a random frame and scale; see `vggt_ros.inference.network.Network`."""

    name = 'truth'
    trained = tracks_trained = True
    device = 'cpu'
    precision = 'float64'
    attention = 'none'

    def __init__(
        self, world: World, errors: Errors | None = None, image_width: int = 56, seed: int = 0
    ) -> None:
        """
        Look at a world.

        :param errors: what is not known exactly; None: all is.
        :param image_width: of the images that it wants, pixels.
        :param seed: of frames, scales and errors.
        """
        self.image_width = image_width
        self._world = world
        self._errors = errors or Errors()
        self._seed = seed

    def __call__(self, batch: Batch, heads: tuple[str, ...]) -> Prediction:
        """Say what the cameras of this batch really see."""
        if not set(heads) <= {'camera', 'depth', 'tracks'}:
            raise ValueError(f'the truth is asked for {heads}, it has camera, depth and tracks')
        height, width = batch.image_size
        stamps = [frame.stamp_ns for frame in batch.frames]
        generator = np.random.default_rng([self._seed, batch.window_id])
        scale, window_from_room = _random_frame(generator)
        window_from_camera = window_from_room @ self._err_in_poses(
            self._world.cameras(stamps), generator
        )
        window_from_camera[:, :3, 3] *= scale
        depth = scale * np.stack([self._world.depth(stamp, height, width) for stamp in stamps])
        depth *= 1 + self._errors.depth * generator.normal(size=depth.shape)
        depth = depth[list(batch.depth_indices)]
        confidence = torch.full((1, len(depth), height, width), CONFIDENCE)
        confidence[..., 0] = LOW_CONFIDENCE
        intrinsics = torch.from_numpy(true_intrinsics(height, width)).expand(len(stamps), 3, 3)
        camera_from_window = invert_rigid(torch.from_numpy(window_from_camera))
        encodings = encode_pose(camera_from_window, intrinsics, height, width)
        return Prediction(
            **self._follow(batch) if 'tracks' in heads else {},
            pose_encodings=[encodings.unsqueeze(0)],
            depth=torch.from_numpy(depth).float().unsqueeze(0),
            depth_confidence=confidence,
            descriptors=torch.from_numpy(_describe(self._world.cameras(stamps))).unsqueeze(0),
        )

    def _follow(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Say where the points of the walls that were asked for are in each frame."""
        queries = batch.queries
        if queries is None:
            return {}
        height, width = batch.image_size
        stamps = [frame.stamp_ns for frame in batch.frames]
        points = np.zeros((len(queries.ids), 3))
        for i, stamp in enumerate(stamps):
            mine = queries.frames == i
            points[mine] = self._world.meet_walls_at(
                stamp, queries.points[mine].astype(float), height, width
            )[1]
        camera_from_room = invert_rigid(torch.from_numpy(self._world.cameras(stamps)))
        matrices = torch.from_numpy(true_intrinsics(height, width)).expand(len(stamps), 3, 3)
        tracks, in_camera = project(torch.from_numpy(points), camera_from_room, matrices)
        limit = tracks.new_tensor([width - 0.5, height - 0.5])
        seen = ((tracks >= -0.5) & (tracks <= limit)).all(-1) & (in_camera[..., 2] > 0)
        return {
            'tracks': tracks.float()[None],
            'visibility': seen.float()[None],
            'track_confidence': torch.ones(1, *seen.shape),
        }

    def encode_ahead(self, images: Mapping[int, PreprocessedImage]) -> None:
        """Need no time for it anyway."""

    def prepare(self, settings: Settings) -> Settings:
        """Need nothing; the settings stay."""
        return settings

    def save_memory(self) -> str:
        """Take next to none; there is nothing to save."""
        return ''

    def _err_in_poses(self, cameras: Array, generator: np.random.Generator) -> Array:
        """Turn and move each camera by chance."""
        moved = cameras.copy()
        extent = np.linalg.norm(np.ptp(cameras[:, :3, 3], axis=0))
        # three components that are independent make a third of the variance each
        turn = self._errors.rotation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        step = self._errors.translation / np.sqrt(3) * generator.normal(size=(len(cameras), 3))
        moved[:, :3, 3] += extent * step
        half = np.concatenate([turn / 2, np.ones((len(cameras), 1))], -1)  # of small angles
        moved[:, :3, :3] @= matrix_from_quaternion(torch.from_numpy(half)).numpy()
        return moved


def _describe(cameras: Array) -> Array:
    """Describe views (S, 32) so that near ones are alike: waves over place and direction."""
    generator = np.random.default_rng(0)
    waves, phases = generator.normal(size=(6, 32)), generator.uniform(0, 2 * np.pi, 32)
    places = np.concatenate([cameras[:, :3, 3], 2 * cameras[:, :3, 2]], -1)
    described: Array = np.cos(places @ waves + phases)
    return described


def true_intrinsics(height: int, width: int) -> Array:
    """Return the camera matrix (3, 3) for an image of this size, in the network's convention."""
    focal = (width / 2) / np.tan(FIELD_OF_VIEW / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def _random_frame(generator: np.random.Generator) -> tuple[float, Array]:
    """
    Choose how the network tells the truth about a window.

    :returns: scale, and `window_from_room` (4, 4), rigid.
    """
    window_from_room = np.eye(4)
    quaternion = torch.from_numpy(generator.normal(size=4))
    window_from_room[:3, :3] = matrix_from_quaternion(quaternion).numpy()
    window_from_room[:3, 3] = generator.normal(size=3)
    return float(np.exp(generator.uniform(-1, 1))), window_from_room
