# SPDX-License-Identifier: Apache-2.0
"""
One least-squares problem over cameras and points, solved by COLMAP's bundle adjustment (Ceres).

pycolmap is an optional dependency and imported when a refinement is requested.

A pinhole camera does not depend on the origin of pixel coordinates as long as its principal point
has the same one, so this package's pixels (centres at integers) are used as they are. A model
written to a file for COLMAP needs an offset of half a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.frames.batch import Mask
from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.geometry.poses import Array

_MAX_ITERATIONS = 50
_TOLERANCE = 1e-5  # relative change of the cost at which the solver stops


@dataclass(frozen=True, slots=True)
class SparseModel:
    """Cameras and points in one frame and scale."""

    world_from_camera: Array  # (S, 4, 4), rigid
    intrinsics: Array  # (S, 3, 3), pixels, without skew
    points: Array  # (K, 3), NaN where unknown

    def residuals(self, pixels: Array) -> Array:
        """
        Compute projected minus observed pixels.

        :param pixels: (S, K, 2).
        :returns: (S, K, 2), x and y, pixels; NaN where a point is unknown or behind the camera.
        """
        camera_from_world = invert_rigid(torch.from_numpy(self.world_from_camera))[:, :3]
        projected, in_camera = project(
            torch.from_numpy(self.points), camera_from_world, torch.from_numpy(self.intrinsics)
        )
        in_front = (in_camera[..., 2:] > 0).numpy()
        residuals: Array = np.where(in_front, projected.numpy() - pixels, np.nan)
        return residuals

    def errors(self, pixels: Array) -> Array:
        """
        Compute reprojection errors, the lengths of the residuals.

        :param pixels: (S, K, 2).
        :returns: (S, K), pixels; NaN as in `residuals`.
        """
        errors: Array = np.linalg.norm(self.residuals(pixels), axis=-1)
        return errors


class NoSolutionError(Exception):
    """The problem has no solution."""


class ColmapProblem:
    """Tracks, to which cameras and points are fitted."""

    def __init__(self, pixels: Array, camera_index: npt.NDArray[np.int64]) -> None:
        """
        Prepare a problem.

        :param pixels: (S, K, 2).
        :param camera_index: (S,), frames with the same index share their intrinsics.
        :raises ValueError: if pycolmap is not installed.
        """
        self._pycolmap: Any = import_pycolmap()
        self.pixels = pixels
        self._camera_index = camera_index

    def solve(
        self, initial: SparseModel, used: Mask, loss: float, cameras: bool, focal: bool
    ) -> SparseModel:
        """
        Minimise the reprojection errors.

        :param initial: its first camera is constant, and one coordinate of another, for the scale.
        :param used: (S, K), the observations to fit; each point has two or more, or none.
        :param loss: scale of Cauchy's loss, pixels.
        :param cameras: refine poses, too; otherwise points alone.
        :param focal: refine focal lengths, too, with the poses.
        :raises NoSolutionError: if Ceres fails.
        """
        if not used.any():
            raise NoSolutionError('the tracks are inconsistent: no two observations agree')
        pycolmap = self._pycolmap
        model = self._make_reconstruction(initial, used)
        options = pycolmap.BundleAdjustmentOptions()
        options.print_summary = False
        options.refine_rig_from_world = cameras
        options.refine_focal_length = cameras and focal
        options.refine_principal_point = options.refine_extra_params = False
        options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = loss
        options.ceres.solver_options.max_num_iterations = _MAX_ITERATIONS
        options.ceres.solver_options.function_tolerance = _TOLERANCE
        config = pycolmap.BundleAdjustmentConfig()
        for image in model.images:
            config.add_image(image)
        config.set_constant_rig_from_world_pose(1)
        if cameras:
            # Without a fixed scale, a long step can take it through zero, where all points are
            # behind the cameras and have no error.
            config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
        with _only_errors_logged(pycolmap.logging):
            summary = pycolmap.create_default_bundle_adjuster(options, config, model).solve()
        if not summary.is_solution_usable():
            raise NoSolutionError(f'Ceres found no solution: {summary.brief_report()}')
        return self._read(model, initial)

    def _make_reconstruction(self, initial: SparseModel, used: Mask) -> Any:
        """Make COLMAP's objects; its ids begin at 1."""
        pycolmap = self._pycolmap
        model = pycolmap.Reconstruction()
        for index in np.unique(self._camera_index):
            model.add_camera_with_trivial_rig(self._make_camera(index, initial.intrinsics))
        camera_from_world = invert_rigid(torch.from_numpy(initial.world_from_camera)).numpy()
        for i, index in enumerate(self._camera_index):
            # The points of an image have the indices of the tracks, so no table is needed.
            image = pycolmap.Image(str(i), self.pixels[i], int(index) + 1, i + 1)
            model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(camera_from_world[i, :3]))
        for track in np.flatnonzero(used.any(0)):
            observations = pycolmap.Track()
            for i in np.flatnonzero(used[:, track]):
                observations.add_element(int(i) + 1, int(track))
            point = pycolmap.Point3D()
            point.xyz, point.track = initial.points[track], observations
            model.add_point3D_with_id(int(track) + 1, point)
        return model

    def _make_camera(self, index: int, intrinsics: Array) -> Any:
        """Make the camera that frames share, from their mean intrinsics."""
        mean = intrinsics[self._camera_index == index].mean(0)
        centre = mean[0, 2], mean[1, 2]
        return self._pycolmap.Camera(
            camera_id=int(index) + 1,
            model='PINHOLE',
            width=max(round(2 * centre[0]), 1),
            height=max(round(2 * centre[1]), 1),
            params=[mean[0, 0], mean[1, 1], *centre],
        )

    def _read(self, model: Any, initial: SparseModel) -> SparseModel:
        camera_from_world = np.stack(
            [model.image(i + 1).cam_from_world().matrix() for i in range(len(self._camera_index))]
        )
        intrinsics = np.stack(
            [model.camera(int(i) + 1).calibration_matrix() for i in self._camera_index]
        )
        points = initial.points.copy()
        for point_id in model.point3D_ids():
            points[point_id - 1] = model.point3D(point_id).xyz
        world_from_camera = invert_rigid(torch.from_numpy(camera_from_world)).numpy()
        return SparseModel(world_from_camera, intrinsics, points)


@contextmanager
def _only_errors_logged(logging: Any) -> Iterator[None]:
    """Suppress warnings, such as those of each step that Ceres rejects."""
    before, logging.minloglevel = logging.minloglevel, int(logging.ERROR)
    try:
        yield
    finally:
        logging.minloglevel = before


def import_pycolmap() -> ModuleType:
    """:raises ValueError: if it is not installed."""
    try:
        import pycolmap
    except ImportError as error:
        raise ValueError(
            f'bundle adjustment needs pycolmap, which cannot be imported ({error}): '
            'pip install pycolmap'
        ) from error
    module: ModuleType = pycolmap
    return module
