# SPDX-License-Identifier: Apache-2.0
"""
Cameras and points are refined by bundle adjustment over tracks, if the tracks determine them.

A refinement is rejected where tracks are few or of low confidence, where the configuration is
degenerate, and where held-out observations have no smaller reprojection error than with the given
cameras. The gauge is kept: the first camera is constant, to the bit, and so is the median distance
of the points from it.

Focal lengths are refined only if that fits clearly better, and held-out observations no worse. A
camera that does not rotate does not determine them, and would fit any.

On one CPU core 8 frames with 500 tracks take about 1 s, 50 frames with 2000 tracks about 12 s.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.batch import Mask
from vggt_ros.geometry.poses import Array
from vggt_ros.offline.colmap_problem import ColmapProblem, NoSolutionError, SparseModel
from vggt_ros.offline.degeneracy import (
    collinear_degeneracy,
    count_degeneracy,
    measure_parallax,
    triangulate,
)
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks

_MAX_PASSES = 6  # of outlier rejection
_OUTLIER = 4.0  # standard deviations
_MIN_DEVIATION = 0.25  # pixels; no track is more accurate
_EXACT = 1e-3  # pixels; smaller errors are regarded as zero
_CAUCHY = 2.4  # standard deviations: 95 % efficiency where errors are normal
_MEDIAN = 1.1774  # of the length of an error, in standard deviations of its two components
_HELD_OUT_SHARE = 0.5  # of the tracks with three observations or more lose one for validation
_MIN_HELD_OUT = 30  # observations that are sufficient for validation
_FITS_FOCAL = 0.99  # largest ratio of rms errors with which refined focal lengths are accepted
_NO_WORSE = 1.01  # largest ratio of held-out errors by which focal lengths may be worse: chance
_BETTER = 0.98  # largest ratio of held-out errors with which refined cameras are accepted
_CONVERGED = 0.001  # share of the observations that may still change between inlier and outlier
_MIN_SIGNAL = 3.0  # ratio of parallax to noise; 1 px of noise by itself causes 1.7


def refine_cameras(
    world_from_camera: Array,
    intrinsics: Array,
    camera_index: npt.NDArray[np.int64],
    tracks: Tracks,
    points: Array | None = None,
    criteria: Criteria | None = None,
) -> Refinement:
    """
    Refine the cameras of a window or a map.

    :param world_from_camera: (S, 4, 4), rigid, any scale.
    :param intrinsics: (S, 3, 3), pixels of the network's images, without skew.
    :param camera_index: (S,), 0 and more: frames of one camera share their intrinsics.
    :param tracks: over the same S frames.
    :param points: (K, 3), initial points in the world frame; None, or NaN for one: triangulated.
    :param criteria: None: the defaults.
    :raises ValueError: if shapes do not match, or pycolmap is not installed.
    """
    criteria = criteria or Criteria()
    _check(world_from_camera, intrinsics, camera_index, tracks, points)
    problem = ColmapProblem(tracks.pixels, camera_index)
    confident = tracks.observed & (tracks.confidence >= criteria.min_confidence)
    cameras = world_from_camera.astype(np.float64), intrinsics.astype(np.float64)
    given = SparseModel(*cameras, _initial_points(*cameras, tracks.pixels, confident, points))
    parallax = measure_parallax(tracks.pixels, cameras[1], confident, criteria.min_per_frame)
    unchanged = Refinement(*cameras, given.points, confident, parallax=parallax)
    reason = _find_degeneracy(tracks, given, confident, parallax, criteria)
    if reason:
        return replace(unchanged, rejection_reason=reason)
    fitted, held_out = _hold_out(confident)
    try:
        result = _solve(problem, given, fitted, held_out, criteria)
    except NoSolutionError as error:
        return replace(unchanged, rejection_reason=str(error))
    result = replace(result, parallax=parallax)
    reason = _validate(result, int(fitted.sum()), criteria)
    if not reason:
        return _keep_scale(result, given)
    return replace(
        result,
        world_from_camera=given.world_from_camera,
        intrinsics=given.intrinsics,
        points=given.points,
        focal_refined=False,
        rejection_reason=reason,
    )


def _solve(
    problem: ColmapProblem, given: SparseModel, fitted: Mask, held_out: Mask, criteria: Criteria
) -> Refinement:
    pixels = problem.pixels
    loss = _CAUCHY * _deviation(given, pixels, fitted)
    # Points alone first. A point behind a camera has no error, so outliers would move cameras to
    # where they see nothing.
    visible = _visible(given, pixels, fitted)
    initial = problem.solve(given, visible, loss, cameras=False, focal=False)
    model, inliers = _reject_outliers(problem, initial, fitted, focal=False)
    threshold = _OUTLIER * _deviation(model, pixels, fitted)
    result = _compare(problem, given, model, inliers, held_out, threshold)
    if not (criteria.refine_focal and result.held_out):
        return result
    model, inliers = _reject_outliers(problem, model, fitted, focal=True)
    with_focal = _compare(problem, given, model, inliers, held_out, threshold)
    fits = with_focal.rms_after < _FITS_FOCAL * result.rms_after
    if fits and 1 - with_focal.improvement <= _NO_WORSE * (1 - result.improvement):
        return replace(with_focal, focal_refined=True)
    return result


def _check(
    world_from_camera: Array,
    intrinsics: Array,
    camera_index: npt.NDArray[np.int64],
    tracks: Tracks,
    points: Array | None,
) -> None:
    frames, count = tracks.observed.shape
    expected = {
        'world_from_camera': (world_from_camera, (frames, 4, 4)),
        'intrinsics': (intrinsics, (frames, 3, 3)),
        'camera_index': (camera_index, (frames,)),
        'points': (np.zeros((count, 3)) if points is None else points, (count, 3)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f'{name} is {array.shape}; expected {shape} as the tracks')
        if name != 'points' and not np.isfinite(array).all():
            raise ValueError(f'{name} has values that are not finite')
    if camera_index.min(initial=0) < 0:
        raise ValueError(f'camera_index has {camera_index.min()}; expected 0 and more')


def _initial_points(
    world_from_camera: Array, intrinsics: Array, pixels: Array, used: Mask, points: Array | None
) -> Array:
    """Triangulate the points (K, 3) that are not given; NaN where that fails."""
    triangulated = triangulate(world_from_camera, intrinsics, pixels, used)
    if points is None:
        return triangulated
    known = np.isfinite(points).all(-1, keepdims=True)
    return np.where(known, points, triangulated)


def _find_degeneracy(
    tracks: Tracks, given: SparseModel, confident: Mask, parallax: float, criteria: Criteria
) -> str:
    """Return the reason why the tracks do not determine the cameras, '' if they do."""
    missing = count_degeneracy(confident, criteria.min_tracks, criteria.min_per_frame)
    if missing:
        confidence = tracks.confidence[tracks.observed]
        median = np.median(confidence) if len(confidence) else 0.0
        return (
            f'{missing} (with a confidence of {criteria.min_confidence:.2f} or more; the median '
            f'is {median:.2f})'
        )
    collinear = collinear_degeneracy(tracks.pixels, given.intrinsics, confident)
    if collinear:
        return collinear
    if not parallax >= criteria.min_parallax:
        return (
            f'too little parallax: {parallax:.2f} px beside rotation, '
            f'{criteria.min_parallax:.2f} are needed'
        )
    visible = confident & np.isfinite(given.errors(tracks.pixels))
    missing = count_degeneracy(visible, criteria.min_tracks, criteria.min_per_frame)
    return missing and f'few points are in front of the given cameras: {missing}'


def _hold_out(confident: Mask) -> tuple[Mask, Mask]:
    """
    Split observations into those that are fitted and those that are held out.

    :returns: (S, K) twice; a held-out observation leaves two others of its track.
    """
    random = np.random.default_rng(0)
    drawn = np.where(confident, random.random(confident.shape), -1).argmax(0)
    chosen = (confident.sum(0) >= 3) & (random.random(confident.shape[1]) < _HELD_OUT_SHARE)
    held_out = np.zeros_like(confident)
    held_out[drawn[chosen], np.flatnonzero(chosen)] = True
    return confident & ~held_out, held_out


def _reject_outliers(
    problem: ColmapProblem, initial: SparseModel, fitted: Mask, focal: bool
) -> tuple[SparseModel, Mask]:
    """
    Solve and reject outliers alternately until the inliers remain the same.

    :returns: the model and its inliers (S, K).
    """
    model, pixels = initial, problem.pixels
    used = _inliers(initial, pixels, fitted)
    for _ in range(_MAX_PASSES):
        loss = _CAUCHY * _deviation(model, pixels, fitted)
        model = problem.solve(model, used, loss, cameras=True, focal=focal)
        before, used = used, _inliers(model, pixels, fitted)
        if np.count_nonzero(used != before) <= _CONVERGED * used.sum():
            break
    return model, used


def _inliers(model: SparseModel, pixels: Array, fitted: Mask) -> Mask:
    threshold = _OUTLIER * _deviation(model, pixels, fitted)
    return _in_pairs(fitted & (model.errors(pixels) <= threshold))  # NaN compares false


def _visible(model: SparseModel, pixels: Array, used: Mask) -> Mask:
    """Keep the observations of points in front of the camera."""
    return _in_pairs(used & np.isfinite(model.errors(pixels)))


def _in_pairs(used: Mask) -> Mask:
    """Drop the only observation of a track."""
    kept: Mask = used & (used.sum(0) >= 2)
    return kept


def _deviation(model: SparseModel, pixels: Array, observed: Mask) -> float:
    """
    Estimate the standard deviation of residuals in x and in y, robust to 50 % of outliers.

    From all observations, not from the inliers: a track of two observations always fits, so the
    threshold would shrink in each pass until only such tracks are left.
    """
    errors = np.nan_to_num(model.errors(pixels)[observed], nan=np.inf)
    median = float(np.median(errors))
    if not np.isfinite(median):
        raise NoSolutionError(
            'most points are behind the cameras that observe them: the tracks are inconsistent, '
            'or have too little parallax for their errors'
        )
    return max(median / _MEDIAN, _MIN_DEVIATION)


def _compare(
    problem: ColmapProblem,
    given: SparseModel,
    model: SparseModel,
    inliers: Mask,
    held_out: Mask,
    threshold: float,
) -> Refinement:
    """Compare with the given cameras and the points that fit those best."""
    pixels = problem.pixels
    deviation = _deviation(model, pixels, inliers)
    visible = _visible(given, pixels, inliers)
    before = problem.solve(given, visible, _CAUCHY * deviation, cameras=False, focal=False)
    errors_before, errors_after = before.errors(pixels), model.errors(pixels)
    known: Mask = np.isfinite(errors_before + errors_after)
    compared: Mask = held_out & inliers.any(0) & known
    count = int(compared.sum())
    if count < _MIN_HELD_OUT:
        count, compared = 0, inliers & known
    mean_before, mean_after = (
        float(np.minimum(errors[compared], threshold).mean())
        for errors in (errors_before, errors_after)
    )
    return Refinement(
        model.world_from_camera,
        model.intrinsics,
        np.where(np.any(inliers, 0)[:, None], model.points, np.nan),
        inliers,
        rms_before=float(np.sqrt(np.mean(errors_before[inliers & known] ** 2) / 2)),
        rms_after=float(np.sqrt(np.mean(errors_after[inliers & known] ** 2) / 2)),
        held_out_before=float(np.median(errors_before[compared])),
        held_out_after=float(np.median(errors_after[compared])),
        improvement=1 - mean_after / max(mean_before, _EXACT),
        held_out=count,
    )


def _validate(result: Refinement, fitted: int, criteria: Criteria) -> str:
    """Return the reason to reject a result, '' if there is none."""
    share = result.observations / fitted
    if share < criteria.min_inliers:
        return (
            f'the tracks are inconsistent: {share:.0%} of the observations are inliers, '
            f'{criteria.min_inliers:.0%} are needed'
        )
    if result.rms_after > criteria.max_error:
        return (
            f'the tracks are inconsistent: the rms error is {result.rms_after:.2f} px, up to '
            f'{criteria.max_error:.2f} are accepted'
        )
    needed = _MIN_SIGNAL * result.rms_after
    if result.parallax < needed:
        return (
            f'too little parallax: {result.parallax:.2f} px beside rotation, {needed:.2f} are '
            f'needed with an rms error of {result.rms_after:.2f} px'
        )
    if result.held_out_after > criteria.max_error:
        return (
            f'the tracks are inconsistent: the held-out error is {result.held_out_after:.2f} px, '
            f'up to {criteria.max_error:.2f} are accepted'
        )
    if not 1 - result.improvement < _BETTER:
        return (
            f'no improvement: the held-out error is {result.held_out_after:.2f} px, before '
            f'{result.held_out_before:.2f} px'
        )
    missing = count_degeneracy(result.inliers, criteria.min_tracks, criteria.min_per_frame)
    return missing and f'without outliers, {missing}'


def _keep_scale(result: Refinement, given: SparseModel) -> Refinement:
    """Scale about the first camera to keep the median distance of the points from it."""
    origin = given.world_from_camera[0, :3, 3]
    seen = result.inliers.any(0)
    distance_before = np.linalg.norm(given.points[seen] - origin, axis=-1)
    distance_after = np.linalg.norm(result.points[seen] - origin, axis=-1)
    scale = float(np.nanmedian(distance_before / distance_after))
    cameras = result.world_from_camera.copy()
    cameras[:, :3, 3] = origin + scale * (cameras[:, :3, 3] - origin)
    cameras[0] = given.world_from_camera[0]
    points = origin + scale * (result.points - origin)
    return replace(result, world_from_camera=cameras, points=points)
