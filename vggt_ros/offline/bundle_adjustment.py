# SPDX-License-Identifier: Apache-2.0
"""
Cameras and points are moved to where tracks say they are, if the tracks can say it.

A refinement is refused rather than forced: where tracks are few or weak, where the geometry leaves
the cameras open, and where the result does not foretell observations that it was not made from
better than the cameras that were there before. The first camera stays where it is, to the bit, and
the unit is kept: the median distance of points from it does not change.

Focal lengths are moved only if that fits clearly better and foretells no worse. A camera that
moves without turning says nothing of them, and would find any.

On one CPU core 8 frames with 500 tracks take about 1 s, 50 frames with 2000 tracks about 12 s.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vggt_ros.geometry.poses import Array
from vggt_ros.offline.colmap_problem import ColmapProblem, Mask, NoSolutionError, View
from vggt_ros.offline.refinement import Criteria, Refinement, Tracks
from vggt_ros.offline.triangulation import triangulate
from vggt_ros.offline.weakness import collinear_degeneracy, count_degeneracy, measure_parallax

_ROUNDS = 6  # at most, of leaving outliers out
_OUTLIER = 4.0  # deviations
_SHARPEST = 0.25  # pixels; no track is known better
_EXACT = 1e-3  # pixels; errors below are none
_CAUCHY = 2.4  # deviations: 95 % as good as least squares where errors are normal
_MEDIAN = 1.1774  # of the length of an error, in deviations of each of its two components
_HELD_OUT = 0.5  # of the tracks with three observations or more lose one, to judge by
_JUDGES = 30  # held out observations that are enough to judge by
_FITS_FOCAL = 0.99  # of the rms may be left, to believe in another focal length
_NO_WORSE = 1.01  # times the foretold errors; what chance does to them
_BETTER = 0.98  # of the foretold errors may be left, to believe in another camera
_SETTLED = 0.001  # share of the observations that may still change sides
_SIGNAL = 3.0  # parallax over noise: what 1 px of noise leaves by itself is 1.7


def refine(
    world_from_camera: Array,
    intrinsics: Array,
    camera_index: npt.NDArray[np.int64],
    tracks: Tracks,
    points: Array | None = None,
    criteria: Criteria | None = None,
) -> Refinement:
    """
    Refine the cameras of a window or a map.

    :param world_from_camera: (S, 4, 4), rigid, any unit.
    :param intrinsics: (S, 3, 3), pixels of the network's images, without skew.
    :param camera_index: (S,), 0 and more: frames of one camera share their intrinsics.
    :param tracks: over the same S frames.
    :param points: (K, 3) to begin with, in the world's frame and unit; None, or NaN for one:
        triangulated.
    :param criteria: None: the defaults.
    :raises ValueError: if arrays do not fit each other, or pycolmap is not installed.
    """
    criteria = criteria or Criteria()
    _check(world_from_camera, intrinsics, camera_index, tracks, points)
    problem = ColmapProblem(tracks.pixels, camera_index)
    believed = tracks.observed & (tracks.confidence >= criteria.min_confidence)
    cameras = world_from_camera.astype(np.float64), intrinsics.astype(np.float64)
    given = View(*cameras, _begin(*cameras, tracks.pixels, believed, points))
    parallax = measure_parallax(tracks.pixels, cameras[1], believed, criteria.min_per_frame)
    untouched = Refinement(*cameras, given.points, believed, parallax=parallax)
    why_not = _find_weakness(tracks, given, believed, parallax, criteria)
    if why_not:
        return replace(untouched, why_not=why_not)
    fitted, judges = _hold_out(believed)
    try:
        result = _attempt(problem, given, fitted, judges, criteria)
    except NoSolutionError as error:
        return replace(untouched, why_not=str(error))
    result = replace(result, parallax=parallax)
    why_not = _find_fault(result, int(fitted.sum()), criteria)
    if not why_not:
        return _keep_unit(result, given)
    return replace(
        result,
        world_from_camera=given.world_from_camera,
        intrinsics=given.intrinsics,
        points=given.points,
        focal_refined=False,
        why_not=why_not,
    )


def _attempt(
    problem: ColmapProblem, given: View, fitted: Mask, judges: Mask, criteria: Criteria
) -> Refinement:
    pixels = problem.pixels
    loss = _CAUCHY * _deviation(given, pixels, fitted)
    # Points alone first. A point behind a camera costs nothing there, so outliers would draw the
    # cameras to where they see nothing.
    placed = problem.solve(given, _placed(given, pixels, fitted), loss, cameras=False, focal=False)
    found, kept = _settle(problem, placed, fitted, focal=False)
    limit = _OUTLIER * _deviation(found, pixels, fitted)
    result = _judge(problem, given, found, kept, judges, limit)
    if not (criteria.refine_focal and result.judges):
        return result
    found, kept = _settle(problem, found, fitted, focal=True)
    freed = _judge(problem, given, found, kept, judges, limit)
    fits = freed.rms_after < _FITS_FOCAL * result.rms_after
    if fits and 1 - freed.gain <= _NO_WORSE * (1 - result.gain):
        return replace(freed, focal_refined=True)
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
            raise ValueError(f'{name} is {array.shape}; the tracks are for {shape}')
        if name != 'points' and not np.isfinite(array).all():
            raise ValueError(f'{name} has values that are not finite')
    if camera_index.min(initial=0) < 0:
        raise ValueError(f'camera_index has {camera_index.min()}; expected 0 and more')


def _begin(
    world_from_camera: Array, intrinsics: Array, pixels: Array, used: Mask, points: Array | None
) -> Array:
    """Give points (K, 3) to begin with; NaN where there is none."""
    found = triangulate(world_from_camera, intrinsics, pixels, used)
    if points is None:
        return found
    known = np.isfinite(points).all(-1, keepdims=True)
    return np.where(known, points, found)


def _find_weakness(
    tracks: Tracks, given: View, believed: Mask, parallax: float, criteria: Criteria
) -> str:
    """Say why it is not worth trying, '' if it is."""
    few = count_degeneracy(believed, criteria.min_tracks, criteria.min_per_frame)
    if few:
        confidence = tracks.confidence[tracks.observed]
        middle = np.median(confidence) if len(confidence) else 0.0
        return (
            f'{few} (of confidence {criteria.min_confidence:.2f} and more; the median of all is '
            f'{middle:.2f})'
        )
    line = collinear_degeneracy(tracks.pixels, given.intrinsics, believed)
    if line:
        return line
    if not parallax >= criteria.min_parallax:
        return (
            f'too little parallax: but for a rotation the points move by {parallax:.2f} px, '
            f'{criteria.min_parallax:.2f} are needed'
        )
    placed = believed & np.isfinite(_lengths(given, tracks.pixels))
    few = count_degeneracy(placed, criteria.min_tracks, criteria.min_per_frame)
    return few and f'seen from these cameras, few points lie before them: {few}'


def _hold_out(believed: Mask) -> tuple[Mask, Mask]:
    """
    Part observations into those that are fitted and those that judge.

    :returns: (S, K) twice; a judge leaves two others of its track.
    """
    random = np.random.default_rng(0)
    drawn = np.where(believed, random.random(believed.shape), -1).argmax(0)
    chosen = (believed.sum(0) >= 3) & (random.random(believed.shape[1]) < _HELD_OUT)
    judges = np.zeros_like(believed)
    judges[drawn[chosen], np.flatnonzero(chosen)] = True
    return believed & ~judges, judges


def _settle(problem: ColmapProblem, start: View, fitted: Mask, focal: bool) -> tuple[View, Mask]:
    """
    Solve, leave outliers out, and so on until the same observations stay.

    :returns: what was found and the observations (S, K) that it is made from.
    """
    view, pixels = start, problem.pixels
    used = _agreeing(start, pixels, fitted)
    for _ in range(_ROUNDS):
        loss = _CAUCHY * _deviation(view, pixels, fitted)
        view = problem.solve(view, used, loss, cameras=True, focal=focal)
        before, used = used, _agreeing(view, pixels, fitted)
        if np.count_nonzero(used != before) <= _SETTLED * used.sum():
            break
    return view, used


def _agreeing(view: View, pixels: Array, fitted: Mask) -> Mask:
    """Find the observations that are no outliers."""
    limit = _OUTLIER * _deviation(view, pixels, fitted)
    return _of_two(fitted & (_lengths(view, pixels) <= limit))  # NaN compares false


def _placed(view: View, pixels: Array, used: Mask) -> Mask:
    """Keep the observations of points that lie before the camera."""
    return _of_two(used & np.isfinite(_lengths(view, pixels)))


def _of_two(used: Mask) -> Mask:
    """Leave out the observations whose track has no other."""
    kept: Mask = used & (used.sum(0) >= 2)
    return kept


def _lengths(view: View, pixels: Array) -> Array:
    lengths: Array = np.linalg.norm(view.errors(pixels), axis=-1)
    return lengths


def _deviation(view: View, pixels: Array, observed: Mask) -> float:
    """
    Estimate the deviation of errors in x and in y, whatever half of them do.

    Of all observations, not of those that agree: tracks of two observations fit always, so the
    limit would shrink from round to round until only such tracks are left.
    """
    lengths = np.nan_to_num(_lengths(view, pixels)[observed], nan=np.inf)
    middle = float(np.median(lengths))
    if not np.isfinite(middle):
        raise NoSolutionError(
            'most points came to lie behind the cameras that see them: the tracks contradict each '
            'other, or have too little parallax for their errors'
        )
    return max(middle / _MEDIAN, _SHARPEST)


def _judge(
    problem: ColmapProblem, given: View, found: View, kept: Mask, judges: Mask, limit: float
) -> Refinement:
    """Compare with the cameras as they were and the points that fit those best."""
    pixels = problem.pixels
    deviation = _deviation(found, pixels, kept)
    placed = _placed(given, pixels, kept)
    before = problem.solve(given, placed, _CAUCHY * deviation, cameras=False, focal=False)
    was, now = _lengths(before, pixels), _lengths(found, pixels)
    known: Mask = np.isfinite(was + now)
    jury: Mask = judges & kept.any(0) & known
    count = int(jury.sum())
    if count < _JUDGES:
        count, jury = 0, kept & known
    bounded = [float(np.minimum(each[jury], limit).mean()) for each in (was, now)]
    return Refinement(
        found.world_from_camera,
        found.intrinsics,
        np.where(np.any(kept, 0)[:, None], found.points, np.nan),
        kept,
        rms_before=float(np.sqrt(np.mean(was[kept & known] ** 2) / 2)),
        rms_after=float(np.sqrt(np.mean(now[kept & known] ** 2) / 2)),
        foretold_before=float(np.median(was[jury])),
        foretold_after=float(np.median(now[jury])),
        gain=1 - bounded[1] / max(bounded[0], _EXACT),
        judges=count,
    )


def _find_fault(result: Refinement, fitted: int, criteria: Criteria) -> str:
    """Say why the result is not to be kept, '' if it is."""
    share = result.observations / fitted
    if share < criteria.min_agreeing:
        return (
            f'the tracks contradict each other: {share:.0%} of the observations agree, '
            f'{criteria.min_agreeing:.0%} are needed'
        )
    if result.rms_after > criteria.max_error:
        return (
            f'the tracks contradict each other: errors of {result.rms_after:.2f} px are left, up '
            f'to {criteria.max_error:.2f} are accepted'
        )
    needed = _SIGNAL * result.rms_after
    if result.parallax < needed:
        return (
            f'too little parallax: but for a rotation the points move by {result.parallax:.2f} '
            f'px, {needed:.2f} are needed where errors are {result.rms_after:.2f} px'
        )
    if result.foretold_after > criteria.max_error:
        return (
            f'the tracks contradict each other: what is foretold is off by '
            f'{result.foretold_after:.2f} px, up to {criteria.max_error:.2f} are accepted'
        )
    if not 1 - result.gain < _BETTER:
        return (
            f'it foretells no better: off by {result.foretold_after:.2f} px, before '
            f'{result.foretold_before:.2f} px'
        )
    few = count_degeneracy(result.kept, criteria.min_tracks, criteria.min_per_frame)
    return few and f'without outliers, {few}'


def _keep_unit(result: Refinement, given: View) -> Refinement:
    """Scale about the first camera until points are as far from it as they were, in the median."""
    origin = given.world_from_camera[0, :3, 3]
    seen = result.kept.any(0)
    were = np.linalg.norm(given.points[seen] - origin, axis=-1)
    are = np.linalg.norm(result.points[seen] - origin, axis=-1)
    scale = float(np.nanmedian(were / are))
    cameras = result.world_from_camera.copy()
    cameras[:, :3, 3] = origin + scale * (cameras[:, :3, 3] - origin)
    cameras[0] = given.world_from_camera[0]
    points = origin + scale * (result.points - origin)
    return replace(result, world_from_camera=cameras, points=points)
