# SPDX-License-Identifier: Apache-2.0
"""
Baselines: what the network and the registration of its windows are compared with.

For single windows, without a network:

- constant depth: the same depth at every pixel.
- mean motion: the mean pose of each index in a window, over windows of the training split.
- forward motion: no rotation, constant velocity along the optical axis.
- SIFT: features, essential matrix by RANSAC and recovered pose of each pair, from OpenCV, with
  the true intrinsics.

For sequences:

- SIFT odometry: the relative poses of consecutive frames, chained.
- centres: windows registered by their shared camera centres alone, as other packages do. Where
  these are collinear, the roll about their line is arbitrary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose, invert_rigid
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.lab.evaluation.trajectory_errors import fit_sim3
from vggt_ros.lab.training.dataset import Dataset
from vggt_ros.mapping.reconstruction import Reconstruction

Features = tuple[Any, Any]  # key points and descriptors

cv: Any = cv2  # its own annotations refuse plain arrays
_RATIO = 0.8  # Lowe, IJCV 2004, section 7.1
_RANSAC_PIXELS = 1.0
_BATCH = 20  # windows


def forward_motion(frames: int) -> Tensor:
    """Return camera_from_world (1, S, 3, 4) of a camera that moves forward by steps of 1."""
    cameras = torch.eye(4)[:3].repeat(1, frames, 1, 1)
    cameras[0, :, 2, 3] = -torch.arange(frames, dtype=torch.float32)
    return cameras


def mean_motion(dataset: Dataset, windows: int, frames: int) -> Tensor:
    """Return camera_from_world (1, S, 3, 4), means over windows in their normalised frames."""
    total = torch.zeros(frames, 9)
    for first in range(0, windows, _BATCH):
        truth = dataset.batch(first, min(_BATCH, windows - first), frames).truth
        total += truth.pose_encodings().sum(0).cpu()
    cameras, _ = decode_pose(total[None] / windows, *truth.depth.shape[-2:])
    return cameras


def sift_relative_poses(images: Tensor, intrinsics: Tensor) -> Tensor:
    """
    Estimate the relative pose of each pair of frames of one window from SIFT features.

    :param images: (S, 3, H, W) in [0, 1].
    :param intrinsics: (S, 3, 3) pixels, the same for all frames.
    :returns: (pairs, 3, 4) of pairs i < j, with translations of length 1; the identity where
        the estimation fails.
    """
    detector, matcher = cv.SIFT_create(), cv.BFMatcher()
    grey = [
        cv.cvtColor((image.permute(1, 2, 0) * 255).byte().cpu().numpy(), cv.COLOR_RGB2GRAY)
        for image in images
    ]
    features = [detector.detectAndCompute(image, None) for image in grey]
    matrix = intrinsics[0].double().cpu().numpy()
    poses = []
    for first in range(len(grey)):
        for second in range(first + 1, len(grey)):
            poses.append(_relative_pose(matcher, features[first], features[second], matrix))
    return torch.from_numpy(np.stack(poses))


def sift_odometry(images: npt.NDArray[np.uint8], matrix: Array) -> Array:
    """
    Chain the relative poses of consecutive frames, each step of length 1: two views have no scale.

    :param images: (S, H, W, 3), RGB.
    :param matrix: (3, 3), pixels.
    :returns: map_from_camera (S, 4, 4).
    """
    detector, matcher = cv.SIFT_create(), cv.BFMatcher()
    poses = [np.eye(4)]
    previous = None
    for image in images:
        features = detector.detectAndCompute(cv.cvtColor(image, cv.COLOR_RGB2GRAY), None)
        if previous is not None:
            new_from_old = np.eye(4)
            new_from_old[:3] = _relative_pose(matcher, previous, features, matrix)
            old_from_new = invert_rigid(torch.from_numpy(new_from_old)).numpy()
            poses.append(poses[-1] @ old_from_new)
        previous = features
    return np.stack(poses)


def register_by_centres(windows: Sequence[tuple[Sequence[int], Reconstruction]]) -> list[Sim3]:
    """
    Register windows by the similarity between the centres of their shared cameras.

    :param windows: frame ids and geometry; each shares at least three with the previous one.
    :returns: map_from_window of each.
    :raises ValueError: if all shared centres coincide.
    """
    registered: list[Sim3] = []
    previous: dict[int, Array] = {}
    for ids, reconstruction in windows:
        map_from_window = Sim3()
        if previous:
            shared = [i for i, frame_id in enumerate(ids) if frame_id in previous]
            in_map = np.stack([previous[ids[i]][:3, 3] for i in shared])
            map_from_window = fit_sim3(in_map, reconstruction.window_from_camera[shared, :3, 3])
        map_from_camera = map_from_window.transform_poses(reconstruction.window_from_camera)
        previous = dict(zip(ids, map_from_camera, strict=True))
        registered.append(map_from_window)
    return registered


def _relative_pose(matcher: Any, first: Features, second: Features, matrix: Array) -> Array:
    """Return second_from_first (3, 4), the identity if there are too few matches."""
    identity = np.eye(4)[:3]
    if first[1] is None or second[1] is None or min(len(first[0]), len(second[0])) < 2:
        return identity
    pairs = matcher.knnMatch(first[1], second[1], k=2)
    good = [best for best, next_best in pairs if best.distance < _RATIO * next_best.distance]
    if len(good) < 5:
        return identity
    in_first = np.array([first[0][match.queryIdx].pt for match in good])
    in_second = np.array([second[0][match.trainIdx].pt for match in good])
    essential, inliers = cv.findEssentialMat(
        in_first, in_second, matrix, method=cv.RANSAC, prob=0.999, threshold=_RANSAC_PIXELS
    )
    if essential is None or essential.shape != (3, 3):
        return identity
    _, rotation, translation, _ = cv.recoverPose(
        essential, in_first, in_second, matrix, mask=inliers
    )
    return np.hstack([rotation, translation])
