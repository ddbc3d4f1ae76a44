# SPDX-License-Identifier: Apache-2.0
"""
A reconstruction as Python objects: trajectory, point cloud and frames.

The world frame is the optical frame of the map's first camera (x right, y down, z forward); poses
are camera-to-world. Lengths are in `Scene.unit`: metres only if `Scene.scale_valid`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array
from vggt_ros.io.trajectory_file import write_trajectory
from vggt_ros.offline.assembled_map import MapFrame
from vggt_ros.offline.export import Export
from vggt_ros.offline.folder_files import check_folder, remove_folder
from vggt_ros.offline.frame_images import read_frame_depth, read_frame_image
from vggt_ros.offline.voxel_grid import VoxelCloud


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The poses of S frames in time order."""

    stamps_ns: npt.NDArray[np.int64]  # (S,), acquisition times
    world_from_camera: Array  # (S, 4, 4), rigid

    def __len__(self) -> int:
        return len(self.stamps_ns)

    def save(self, path: str | Path) -> None:
        """Write a TUM file: lines of stamp, tx ty tz, qx qy qz qw."""
        write_trajectory(Path(path), list(self.stamps_ns * 1e-9), self.world_from_camera)


class TemporaryFolder:
    """A folder that is removed when this object is closed or no longer referenced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remove = weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder now."""
        self._remove()

    def check_open(self) -> None:
        """:raises ValueError: if the folder was removed."""
        if not self._remove.alive:
            raise ValueError('the scene is closed; expected an open one')


class SceneFrame:
    """One frame; image and depth are read from the scene's files at each access."""

    def __init__(self, frame: MapFrame, folder: Path, temporary: TemporaryFolder) -> None:
        """
        Refer to the files of a frame.

        :param folder: of the reconstruction.
        :param temporary: which is kept as long as this frame is referenced.
        """
        self.stamp_ns = frame.stamp_ns  # acquisition time
        self.world_from_camera = frame.world_from_camera  # (4, 4), rigid
        self.intrinsics = frame.intrinsics  # (3, 3), pixels of `image`
        self.depth_intrinsics = frame.depth_intrinsics  # (3, 3), pixels of `depth`
        self._frame, self._folder, self._temporary = frame, folder, temporary

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """
        RGB image (H, W, 3), as compressed by JPEG; rectified if the calibration has distortion.

        :raises ValueError: if the scene is closed.
        """
        self._temporary.check_open()
        return read_frame_image(self._folder, self._frame.frame_id)

    @property
    def depth(self) -> npt.NDArray[np.float32]:
        """
        Depth (h, w) along the optical axis, in the scene's unit; NaN where not confident.

        It has the resolution of the network's images; `depth_intrinsics` belong to it.

        :raises ValueError: if the scene is closed.
        """
        self._temporary.check_open()
        frame = self._frame
        if not frame.depth_step:  # its depth belongs to another map
            return np.full(frame.depth_size, np.nan, np.float32)
        return read_frame_depth(self._folder, frame.frame_id, frame.depth_step, frame.depth_size)


class Scene:
    """
    The largest map of a recording.

    Its files are in a temporary folder, which is removed when the scene is closed, or when neither
    the scene nor one of its frames is referenced. `save` copies them.
    """

    def __init__(
        self, export: Export, folder: Path, temporary: TemporaryFolder, warning: str = ''
    ) -> None:
        """
        Take over a finished reconstruction.

        :param folder: of the reconstruction, inside of the temporary one.
        :param warning: what a user must know of the network.
        """
        map_frames = export.map.frames
        self.trajectory = Trajectory(
            np.array([frame.stamp_ns for frame in map_frames], np.int64),
            np.stack([frame.world_from_camera for frame in map_frames]),
        )
        self.point_cloud: VoxelCloud = export.cloud  # its `frame` is an index into `frames`
        self.frames = tuple(SceneFrame(frame, folder, temporary) for frame in map_frames)
        self.unit = export.map.unit  # of all lengths: 'm' or 'units of the network'
        self.scale_valid = self.unit == 'm'  # lengths are in metres
        # Why the result may be wrong or incomplete, such as untrained weights; '' if nothing.
        self.warning = _describe_problems(export, warning)
        self._title = str(export.description['title'])
        self._folder, self._temporary = folder, temporary

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """
        Copy the files to a folder, as the command `vggt reconstruct` writes it.

        It has cloud.ply, trajectory.tum, images, depth, a COLMAP model, scene.glb, report.html and
        reconstruction.json; `vggt view` displays it. It appears when all of it is written.

        :param overwrite: replace an existing folder.
        :returns: the folder.
        :raises ValueError: if it exists, or the scene is closed.
        :raises OSError: if it cannot be written.
        """
        output = Path(folder)
        check_folder(output)
        if output.exists() and not overwrite:
            raise ValueError(f'{output} exists; expected a new folder, or overwrite=True')
        self._temporary.check_open()
        output.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: `<output>.partial` may be an interrupted run
        beside = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
        try:
            shutil.copytree(self._folder, beside / 'scene')
            remove_folder(output)
            os.replace(beside / 'scene', output)
        finally:
            shutil.rmtree(beside)
        return output

    def close(self) -> None:
        """Remove the temporary files; images and depth can no longer be read."""
        self._temporary.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        warning = f', WARNING: {self.warning}' if self.warning else ''
        return f'<Scene {self._title}, unit: {self.unit}{warning}>'


def _describe_problems(export: Export, warning: str) -> str:
    problems = [str(export.description['warning']), warning]
    if export.other_maps:
        problems.append(f'{len(export.other_maps)} smaller, unconnected maps are left out')
    if export.description['unreadable']:
        problems.append(f'{len(export.description["unreadable"])} images could not be read')
    return '; '.join(problem for problem in problems if problem)
