# SPDX-License-Identifier: Apache-2.0
"""
How many metres one unit of the map is, measured by something that knows metres.

The network's unit is its own. A source compares what it knows of a window with the same in the
map: the camera's way (TF, odometry) or depth (a registered sensor). Each window gives one
measurement; their weighted median over the last windows is the factor, so that outliers do not
move it, and it is held when the source goes silent. One factor multiplies depth, points and
translations alike. A new map has a new unit, and is measured anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.preprocessor import Batch, sample_source
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.settings import ScaleSettings

# A factor is replaced only by one that differs more: consumers want a unit that stands still.
_STEADY = 0.005
_PIXELS_PER_FRAME = 4096
_FEWEST_PIXELS = 100  # of a window, to compare depth by
_SHAPE = 0.02  # relative difference of aspect ratios up to which depth is registered to an image
_DEVIATION = 1.4826  # standard deviations in the median absolute deviation of a normal variable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MetricScale:
    """What is known of the map's unit."""

    factor: float = 1.0  # metres in one map unit; 1 where that is not known
    source: str = 'none'  # one of the choices of `scale_source`
    valid: bool = False  # True: lengths are metres once multiplied by `factor`
    spread: float = np.nan  # relative standard deviation of the measurements; NaN: fewer than two
    age: float = np.nan  # s since the newest measurement, by the images' stamps; NaN: none


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one window says."""

    factor: float  # metres in one map unit
    weight: float  # how much it counts beside others of the same map


class ScaleSource(Protocol):
    """Something that knows metres."""

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """Compare a window, placed in the map, with what is known; None: nothing is known."""
        ...


class MotionScale:
    """The camera's way through the window, from TF or odometry."""

    def __init__(self, positions: Callable[[Array, str], Array], smallest_travel: float) -> None:
        """
        Prepare the source.

        :param positions: says where the camera was, (S, 3) m in any fixed frame, NaN where
            unknown, given stamps (S,) in s and the camera's frame.
        :param smallest_travel: m within a window below which noise would be measured.
        """
        self._positions = positions
        self._smallest_travel = smallest_travel

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """
        Compare distances between cameras.

        The longer half of them is used, each as one vote: short ones are noise, and one wrong
        position spoils a quarter of the distances between eight.
        """
        stamps = np.array([frame.stamp_ns for frame in batch.frames]) * 1e-9
        metric = np.empty((len(stamps), 3))
        cameras = np.array([frame.camera_frame for frame in batch.frames])
        for camera in np.unique(cameras):
            own = cameras == camera
            metric[own] = self._positions(stamps[own], str(camera))
        mapped = map_from_window.apply(reconstruction.window_from_camera[:, :3, 3])
        one, other = np.triu_indices(len(stamps), 1)
        metres = np.linalg.norm(metric[one] - metric[other], axis=1)
        units = np.linalg.norm(mapped[one] - mapped[other], axis=1)
        known = np.isfinite(metres) & (units > 0)
        if not known.any():
            return None
        longest = float(units[known].max())
        used = known & (units >= longest / 2)
        if np.median(metres[used]) < self._smallest_travel:
            return None
        return Measurement(float(np.median(metres[used] / units[used])), longest)


class DepthScale:
    """Depth that a sensor measured, registered to the camera's images."""

    def __init__(
        self,
        depth_at: Callable[[int], npt.NDArray[np.float32] | None],
        complain: Callable[[str], None],
    ) -> None:
        """
        Prepare the source.

        :param depth_at: gives the depth (h, w) in m, NaN where unknown, that was measured
            together with the image of this stamp, ns; None where that cannot be used;
            raises LookupError where there is none.
        :param complain: takes a sentence about depth that cannot be used, for each image; about
            depth that is missing only where no image of a window has any, since an old image of
            the window may be older than what is remembered of the sensor.
        """
        self._depth_at = depth_at
        self._complain = complain

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """Compare depth pixel by pixel, where the network is rather confident."""
        ratios = []
        missing = []
        height, width = reconstruction.image_size
        for i, frame in enumerate(batch.frames):
            if frame.camera or i not in reconstruction.depth:
                continue  # the sensor is registered to the first camera
            try:
                measured = self._depth_at(frame.stamp_ns)
            except LookupError as error:
                missing.append(str(error))
                continue
            if measured is None or not self._is_registered(measured.shape, frame.image.shape):
                continue
            step = max(round((height * width / _PIXELS_PER_FRAME) ** 0.5), 1)
            rows, columns = np.mgrid[0:height:step, 0:width:step]
            metres = sample_source(
                measured,
                frame.image.shape[:2],
                batch.fitted[i].source_from_network,
                rows,
                columns,
                batch.fitted[i].place,
            )
            confidence = reconstruction.confidence[i][::step, ::step]
            used = (metres > 0) & (confidence >= np.median(confidence))  # NaN compares false
            ratios.append(metres[used] / reconstruction.depth[i][::step, ::step][used])
        if missing and not ratios:
            self._complain(missing[-1])
        count = sum(map(len, ratios))
        if count < _FEWEST_PIXELS:
            return None
        ratio = float(np.median(np.concatenate(ratios)))
        return Measurement(ratio / map_from_window.scale, float(count))

    def _is_registered(self, depth: tuple[int, ...], image: tuple[int, ...]) -> bool:
        fits = abs(depth[1] * image[0] / (depth[0] * image[1]) - 1) <= _SHAPE
        if not fits:
            self._complain(
                f'depth of {depth[1]}x{depth[0]} pixels does not show the same as images of '
                f'{image[1]}x{image[0]}: expected depth registered to the camera, of the same '
                'shape; it is left out of account'
            )
        return fits


class ScaleEstimator:
    """The factor of the map that is being made, from all its measurements."""

    def __init__(self, settings: ScaleSettings, source: ScaleSource | None) -> None:
        """
        Begin with a map of unknown scale.

        :param source: None if `scale_source` is 'none' or 'fixed'.
        :raises ValueError: if `scale_source` asks for a source and there is none.
        """
        if source is None and settings.scale_source not in ('none', 'fixed'):
            raise ValueError(f'scale_source is {settings.scale_source!r}, but nothing provides it')
        self._settings = settings
        self._source = source
        # by window
        self._measurements: deque[tuple[int, Measurement]] = deque(maxlen=settings.scale_windows)
        self._factor: float | None = None
        self._measured_ns = 0
        self._refusing = False
        self.refused = 0  # measurements out of the plausible band

    def start_map(self) -> None:
        """Forget what was measured in another unit."""
        self._measurements.clear()
        self._factor = None

    def correct(self, corrections: Mapping[int, Sim3]) -> None:
        """Go on in a map whose windows, by number, were moved and scaled."""
        for i, (window, measured) in enumerate(self._measurements):
            factor = measured.factor / corrections[window].scale
            self._measurements[i] = window, replace(measured, factor=factor)

    def update(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> MetricScale:
        """Measure a window that has its place in the map, and say what is known then."""
        name = self._settings.scale_source
        if name == 'none':
            return MetricScale()
        if self._source is None:
            return MetricScale(self._settings.scale_factor, name, True, 0.0, 0.0)
        now_ns = batch.frames[-1].stamp_ns
        measured = self._source.measure(batch, reconstruction, map_from_window)
        if measured is not None and self._is_plausible(measured.factor):
            self._measurements.append((batch.window_id, measured))
            self._measured_ns = now_ns
        if not self._measurements:
            return MetricScale(source=name)
        logs = np.log([each.factor for _, each in self._measurements])
        weights = np.array([each.weight for _, each in self._measurements])
        middle = _weighted_median(logs, weights)
        if self._factor is None or abs(middle - np.log(self._factor)) > _STEADY:
            self._factor = float(np.exp(middle))
        spread = _DEVIATION * _weighted_median(np.abs(logs - middle), weights)
        return MetricScale(
            self._factor,
            name,
            True,
            spread if len(logs) > 1 else np.nan,
            (now_ns - self._measured_ns) * 1e-9,
        )

    def _is_plausible(self, factor: float) -> bool:
        low, high = self._settings.min_scale, self._settings.max_scale
        plausible = low <= factor <= high
        if not plausible:
            self.refused += 1
            if not self._refusing:
                logger.warning(
                    'a scale of %.3g m per unit of the map is refused (%s): expected %g to %g',
                    *(factor, self._settings.scale_source, low, high),
                )
        self._refusing = not plausible
        return plausible


def _weighted_median(values: Array, weights: Array) -> float:
    """Find the value with half of the weight on each side."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
