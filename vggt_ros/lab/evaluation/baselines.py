# SPDX-License-Identifier: Apache-2.0
"""
What anybody could say about a window without a network; a network has to be better than these.

- constant depth: every pixel at the same distance.
- mean motion: the mean pose of each place in a window, learnt from windows of the training split.
- straight ahead: no rotation, the camera drives forward by equal steps.
- SIFT: features, essential matrix by RANSAC and recovered pose of each pair, from OpenCV, with
  the true intrinsics.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vggt_ros.geometry.camera import decode_pose, invert_rigid
from vggt_ros.geometry.poses import Array
from vggt_ros.lab.training.samples import Source

Features = tuple[Any, Any]  # key points and descriptors

cv: Any = cv2  # its own annotations refuse plain arrays
_RATIO = 0.8  # Lowe, IJCV 2004, section 7.1
_RANSAC_PIXELS = 1.0
_BATCH = 20  # windows at once


def straight_ahead(frames: int) -> Tensor:
    """Return camera_from_world (1, S, 3, 4) of a camera that drives forward by steps of 1."""
    cameras = torch.eye(4)[:3].repeat(1, frames, 1, 1)
    cameras[0, :, 2, 3] = -torch.arange(frames, dtype=torch.float32)
    return cameras


def mean_motion(source: Source, windows: int, frames: int) -> Tensor:
    """Return camera_from_world (1, S, 3, 4): means over windows in their normalised frames."""
    total = torch.zeros(frames, 9)
    for first in range(0, windows, _BATCH):
        truth = source.windows(first, min(_BATCH, windows - first), frames).truth
        total += truth.pose_encodings().sum(0).cpu()
    cameras, _ = decode_pose(total[None] / windows, *truth.depth.shape[-2:])
    return cameras


def sift_motion(images: Tensor, intrinsics: Tensor) -> Tensor:
    """
    Find the motion of each pair of frames of one window from features.

    :param images: (S, 3, H, W) in [0, 1].
    :param intrinsics: (S, 3, 3) pixels, the same for all frames.
    :returns: (pairs, 3, 4) of pairs i < j; the identity where it cannot be found. Translations
        have length 1.
    """
    detector, matcher = cv.SIFT_create(), cv.BFMatcher()
    grey = [
        cv.cvtColor((image.permute(1, 2, 0) * 255).byte().cpu().numpy(), cv.COLOR_RGB2GRAY)
        for image in images
    ]
    found = [detector.detectAndCompute(image, None) for image in grey]
    matrix = intrinsics[0].double().cpu().numpy()
    motions = []
    for first in range(len(grey)):
        for second in range(first + 1, len(grey)):
            motions.append(_pair_motion(matcher, found[first], found[second], matrix))
    return torch.from_numpy(np.stack(motions))


def sift_odometry(images: npt.NDArray[np.uint8], matrix: Array) -> Array:
    """
    Chain the motions of neighbouring frames, each step of length 1: two views tell no scale.

    :param images: (S, H, W, 3), RGB.
    :param matrix: (3, 3), pixels.
    :returns: map_from_camera (S, 4, 4).
    """
    detector, matcher = cv.SIFT_create(), cv.BFMatcher()
    poses = [np.eye(4)]
    before = None
    for image in images:
        found = detector.detectAndCompute(cv.cvtColor(image, cv.COLOR_RGB2GRAY), None)
        if before is not None:
            new_from_old = np.eye(4)
            new_from_old[:3] = _pair_motion(matcher, before, found, matrix)
            old_from_new = invert_rigid(torch.from_numpy(new_from_old)).numpy()
            poses.append(poses[-1] @ old_from_new)
        before = found
    return np.stack(poses)


def _pair_motion(matcher: Any, one: Features, other: Features, matrix: Array) -> Array:
    nothing = np.eye(4)[:3]
    if one[1] is None or other[1] is None or min(len(one[0]), len(other[0])) < 2:
        return nothing
    pairs = matcher.knnMatch(one[1], other[1], k=2)
    good = [best for best, next_best in pairs if best.distance < _RATIO * next_best.distance]
    if len(good) < 5:
        return nothing
    here = np.array([one[0][match.queryIdx].pt for match in good])
    there = np.array([other[0][match.trainIdx].pt for match in good])
    essential, inliers = cv.findEssentialMat(
        here, there, matrix, method=cv.RANSAC, prob=0.999, threshold=_RANSAC_PIXELS
    )
    if essential is None or essential.shape != (3, 3):
        return nothing
    _, rotation, translation, _ = cv.recoverPose(essential, here, there, matrix, mask=inliers)
    return np.hstack([rotation, translation])
