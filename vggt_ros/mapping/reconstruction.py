# SPDX-License-Identifier: Apache-2.0
"""A prediction becomes geometry: cameras, intrinsics and depth in the window's own frame.

The window's frame is the optical frame of its first camera, and its unit of length is the
prediction's own: both change from window to window, `registration.py` relates them. Points are not
kept, since depth unprojected with the predicted cameras is more accurate than the point head
(VGGT, section 4.4 and table 3), and is computed on demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vggt_ros.frames.batch import Batch
from vggt_ros.geometry.camera import decode_pose, invert_rigid
from vggt_ros.model.prediction import Prediction

_FIELD_OF_VIEW = (0.02, 3.1)  # radians, of a pinhole camera
_MAX_LENGTH = 1e6  # training normalises lengths to about 1; more is a numerical failure


class PredictionError(Exception):
    """The network's output is not valid geometry; its window is rejected."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The geometry of one window, in its own frame and scale."""

    window_from_camera: npt.NDArray[np.float64]  # (S, 4, 4), rigid; the first is the identity
    intrinsics: npt.NDArray[np.float64]  # (S, 3, 3), pixels of the depth image
    # By index in the window, of the frames whose depth was predicted:
    depth: dict[int, npt.NDArray[np.float32]]  # (H, W), along the optical axis, > 0
    confidence: dict[int, npt.NDArray[np.float32]]  # (H, W), 1 and more, unitless

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the depth images, pixels."""
        height, width = next(iter(self.depth.values())).shape
        return height, width


def reconstruct(prediction: Prediction, batch: Batch) -> Reconstruction:
    """
    Decode the network's output for one window into geometry.

    :param prediction: of one scene (B = 1), tensors on the CPU, with the depth of
        `batch.depth_indices`.
    :raises PredictionError: if a value is not finite, a field of view is not that of a pinhole
        camera, or a length is out of range.
    """
    if (
        prediction.pose_encodings is None
        or prediction.depth is None
        or prediction.depth_confidence is None
    ):
        raise ValueError('a reconstruction needs the camera and the depth head')
    encoding = prediction.pose_encodings[-1][0].double()
    depth = prediction.depth[0].float().numpy()
    confidence = prediction.depth_confidence[0].float().numpy()
    _check(encoding.numpy(), depth, confidence)
    height, width = batch.image_size
    camera_from_world, intrinsics = decode_pose(encoding, height, width)
    world_from_camera = invert_rigid(camera_from_world)
    window_from_camera = invert_rigid(world_from_camera[0]) @ world_from_camera
    window_from_camera[0] = torch.eye(4)
    indices = batch.depth_indices
    return Reconstruction(
        window_from_camera.numpy(),
        intrinsics.numpy(),
        dict(zip(indices, depth, strict=True)),
        dict(zip(indices, confidence, strict=True)),
    )


def _check(
    encoding: npt.NDArray[np.float64],
    depth: npt.NDArray[np.float32],
    confidence: npt.NDArray[np.float32],
) -> None:
    for name, values in (('poses', encoding), ('depth', depth), ('confidence', confidence)):
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            raise PredictionError(f'{bad} of {values.size} values of the {name} are not finite')
    if np.linalg.norm(encoding[:, 3:7], axis=-1).min() < 1e-6:
        raise PredictionError('a predicted quaternion is zero, expected a rotation')
    low, high = _FIELD_OF_VIEW
    narrow, wide = encoding[:, 7:].min(), encoding[:, 7:].max()
    if narrow < low or wide > high:
        raise PredictionError(
            f'predicted fields of view are {narrow:.3g} to {wide:.3g} rad, '
            f'expected {low} to {high}'
        )
    farthest = max(np.abs(encoding[:, :3]).max(), float(depth.max()))
    if farthest > _MAX_LENGTH:
        raise PredictionError(f'a predicted length is {farthest:.3g}, expected less than 1e6')
    if depth.min() <= 0:
        raise PredictionError(f'a predicted depth is {depth.min():.3g}, expected more than 0')
