# SPDX-License-Identifier: Apache-2.0
"""
One least-squares problem over cameras and points, solved by COLMAP's bundle adjustment (Ceres).

pycolmap comes from PyPI and is imported only here, by who asks for a refinement.

A pinhole camera does not care where the pixels are counted from as long as its principal point is
counted alike, so this repository's pixels (centres at integers) are handed over as they are; a
model that is written to a file for COLMAP needs half a pixel more in both.
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

from vggt_ros.geometry.camera import invert_rigid, project
from vggt_ros.geometry.poses import Array

Mask = npt.NDArray[np.bool_]

_ITERATIONS = 50
_TOLERANCE = 1e-5  # relative change of the cost at which it is done


@dataclass(frozen=True, slots=True)
class View:
    """Cameras and points, in one frame and unit."""

    world_from_camera: Array  # (S, 4, 4), rigid
    intrinsics: Array  # (S, 3, 3), pixels, without skew
    points: Array  # (K, 3), NaN where not known

    def errors(self, pixels: Array) -> Array:
        """
        Say how far points are seen from where they should be.

        :param pixels: (S, K, 2).
        :returns: (S, K, 2), x and y, pixels; NaN where a point is unknown or behind the camera.
        """
        camera_from_world = invert_rigid(torch.from_numpy(self.world_from_camera))[:, :3]
        seen, in_camera = project(
            torch.from_numpy(self.points), camera_from_world, torch.from_numpy(self.intrinsics)
        )
        in_front = (in_camera[..., 2:] > 0).numpy()
        errors: Array = np.where(in_front, seen.numpy() - pixels, np.nan)
        return errors


class NoSolutionError(Exception):
    """The numbers lead nowhere."""


class ColmapProblem:
    """Pixels of tracks, from which cameras and points are found."""

    def __init__(self, pixels: Array, camera_index: npt.NDArray[np.int64]) -> None:
        """
        Hold what has been observed.

        :param pixels: (S, K, 2).
        :param camera_index: (S,), frames of the same number share their intrinsics.
        :raises ValueError: if pycolmap is not installed.
        """
        self._pycolmap: Any = import_pycolmap()
        self.pixels = pixels
        self._camera_index = camera_index

    def solve(self, start: View, used: Mask, loss: float, cameras: bool, focal: bool) -> View:
        """
        Move points, and cameras if that is wanted, to where the errors are smallest.

        :param start: its first camera stays, and one coordinate of another, for the scale.
        :param used: (S, K), the observations to fit; each point has two or more, or none.
        :param loss: pixels up to which an error counts with its square (Cauchy's loss).
        :param cameras: move them; else only points.
        :param focal: and their focal lengths.
        :raises NoSolutionError: if Ceres finds nothing.
        """
        if not used.any():
            raise NoSolutionError('the tracks contradict each other: no two observations agree')
        pycolmap = self._pycolmap
        model = self._describe(start, used)
        options = pycolmap.BundleAdjustmentOptions()
        options.print_summary = False
        options.refine_rig_from_world = cameras
        options.refine_focal_length = cameras and focal
        options.refine_principal_point = options.refine_extra_params = False
        options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = loss
        options.ceres.solver_options.max_num_iterations = _ITERATIONS
        options.ceres.solver_options.function_tolerance = _TOLERANCE
        config = pycolmap.BundleAdjustmentConfig()
        for image in model.images:
            config.add_image(image)
        config.set_constant_rig_from_world_pose(1)
        if cameras:
            # Left free, a long step can take the scale through zero, where all is behind the
            # cameras and nothing has an error.
            config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
        with _quiet(pycolmap.logging):
            summary = pycolmap.create_default_bundle_adjuster(options, config, model).solve()
        if not summary.is_solution_usable():
            raise NoSolutionError(f'Ceres found no solution: {summary.brief_report()}')
        return self._read(model, start)

    def _describe(self, start: View, used: Mask) -> Any:
        """Write the problem in COLMAP's terms; it counts from 1."""
        pycolmap = self._pycolmap
        model = pycolmap.Reconstruction()
        for index in np.unique(self._camera_index):
            model.add_camera_with_trivial_rig(self._camera(index, start.intrinsics))
        camera_from_world = invert_rigid(torch.from_numpy(start.world_from_camera)).numpy()
        for i, index in enumerate(self._camera_index):
            # Points of an image are numbered like the tracks, so that a track needs no table.
            image = pycolmap.Image(str(i), self.pixels[i], int(index) + 1, i + 1)
            model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(camera_from_world[i, :3]))
        for track in np.flatnonzero(used.any(0)):
            seen = pycolmap.Track()
            for i in np.flatnonzero(used[:, track]):
                seen.add_element(int(i) + 1, int(track))
            point = pycolmap.Point3D()
            point.xyz, point.track = start.points[track], seen
            model.add_point3D_with_id(int(track) + 1, point)
        return model

    def _camera(self, index: int, intrinsics: Array) -> Any:
        """Make one camera of the frames that share it: their mean."""
        mean = intrinsics[self._camera_index == index].mean(0)
        centre = mean[0, 2], mean[1, 2]
        return self._pycolmap.Camera(
            camera_id=int(index) + 1,
            model='PINHOLE',
            width=max(round(2 * centre[0]), 1),
            height=max(round(2 * centre[1]), 1),
            params=[mean[0, 0], mean[1, 1], *centre],
        )

    def _read(self, model: Any, start: View) -> View:
        camera_from_world = np.stack(
            [model.image(i + 1).cam_from_world().matrix() for i in range(len(self._camera_index))]
        )
        intrinsics = np.stack(
            [model.camera(int(i) + 1).calibration_matrix() for i in self._camera_index]
        )
        points = start.points.copy()
        for number in model.point3D_ids():
            points[number - 1] = model.point3D(number).xyz
        world_from_camera = invert_rigid(torch.from_numpy(camera_from_world)).numpy()
        return View(world_from_camera, intrinsics, points)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep warnings, as of each step that Ceres could not take, from the terminal."""
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
    found: ModuleType = pycolmap
    return found
