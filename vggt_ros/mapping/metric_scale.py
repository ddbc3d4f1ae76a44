# SPDX-License-Identifier: Apache-2.0
"""
The metric scale of the map: metres in one map unit, measured by a metric scale source.

The scale of the network's prediction is unknown. A source compares its measurement of a window
with the map: camera motion (TF, odometry) or depth (a registered sensor). Each window gives one
measurement; the scale is their weighted median over the last windows, which is robust to
outliers, and is held while the source is silent. One factor multiplies depth, points and
translations alike. Each map has a scale of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vggt_ros.frames.batch import Batch, sample_source
from vggt_ros.geometry.poses import Array
from vggt_ros.geometry.sim3 import Sim3
from vggt_ros.mapping.reconstruction import Reconstruction
from vggt_ros.settings import ScaleSettings

# Relative change below which the scale is kept: consumers want a constant unit.
_HYSTERESIS = 0.005
_PIXELS_PER_FRAME = 4096
_MIN_PIXELS = 100  # of a window, to compare depth
_MAX_ASPECT_DIFFERENCE = 0.02  # relative, of depth and the image that it is registered to
_DEVIATION = 1.4826  # standard deviations in the median absolute deviation of a normal variable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MetricScale:
    """The scale of a map."""

    factor: float = 1.0  # metres in one map unit; 1 if unknown
    source: str = 'none'  # one of the choices of `scale_source`
    valid: bool = False  # True: lengths are metres once multiplied by `factor`
    spread: float = np.nan  # relative standard deviation of the measurements; NaN: fewer than two
    age: float = np.nan  # s since the newest measurement, by the images' stamps; NaN: none


@dataclass(frozen=True, slots=True)
class Measurement:
    """The scale as measured in one window."""

    factor: float  # metres in one map unit
    weight: float  # relative to other windows of the same map

    def __truediv__(self, scale: float) -> Measurement:
        """Convert to a map that was scaled by this factor."""
        return replace(self, factor=self.factor / scale)


@dataclass(frozen=True, slots=True)
class WindowMeasurement:
    """A measurement and the window that it belongs to."""

    window_id: int
    measurement: Measurement


class ScaleSource(Protocol):
    """A source of metric measurements."""

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """Compare a registered window with the source; None: no measurement of it."""
        ...


class MotionScale:
    """Camera motion within the window, from TF or odometry."""

    def __init__(self, positions: Callable[[Array, str], Array], min_travel: float) -> None:
        """
        Prepare the source.

        :param positions: returns camera positions (S, 3), m in any fixed frame, NaN where
            unknown, given stamps (S,) in s and the camera's frame.
        :param min_travel: m within a window, below which noise would be measured.
        """
        self._positions = positions
        self._min_travel = min_travel

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """
        Compare distances between cameras.

        The median ratio of the longer half: short ones are noise, and one wrong position spoils
        a quarter of the distances between eight.
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
        if np.median(metres[used]) < self._min_travel:
            return None
        return Measurement(float(np.median(metres[used] / units[used])), longest)


class DepthScale:
    """Depth of a sensor that is registered to the camera."""

    def __init__(
        self,
        depth_at: Callable[[int], npt.NDArray[np.float32] | None],
        report: Callable[[str], None],
    ) -> None:
        """
        Prepare the source.

        :param depth_at: returns the depth (h, w) in m, NaN where unknown, that was measured
            with the image of this stamp, ns; None if it cannot be used; raises LookupError if
            there is none.
        :param report: called with a message about unusable depth, for each image; about missing
            depth only where no image of a window has any, since an old image of the window may
            be older than the buffer.
        """
        self._depth_at = depth_at
        self._report = report

    def measure(
        self, batch: Batch, reconstruction: Reconstruction, map_from_window: Sim3
    ) -> Measurement | None:
        """Compare depth pixel by pixel, where confidence is above the median."""
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
                batch.images[i].source_from_network,
                rows,
                columns,
                batch.images[i].pixel_map,
            )
            confidence = reconstruction.confidence[i][::step, ::step]
            used = (metres > 0) & (confidence >= np.median(confidence))  # NaN compares false
            ratios.append(metres[used] / reconstruction.depth[i][::step, ::step][used])
        if missing and not ratios:
            self._report(missing[-1])
        count = sum(map(len, ratios))
        if count < _MIN_PIXELS:
            return None
        ratio = float(np.median(np.concatenate(ratios)))
        return Measurement(ratio / map_from_window.scale, float(count))

    def _is_registered(self, depth: tuple[int, ...], image: tuple[int, ...]) -> bool:
        fits = abs(depth[1] * image[0] / (depth[0] * image[1]) - 1) <= _MAX_ASPECT_DIFFERENCE
        if not fits:
            self._report(
                f'depth of {depth[1]}x{depth[0]} pixels does not match images of '
                f'{image[1]}x{image[0]}: expected depth registered to the camera, of the same '
                'aspect ratio; it is ignored'
            )
        return fits


@dataclass(frozen=True, slots=True)
class ScaleHistory:
    """The scale measurements of one map."""

    measurements: tuple[WindowMeasurement, ...] = ()  # of the last windows, oldest first
    factor: float | None = None  # metres in one map unit; None: not measured yet
    measured_ns: int = 0  # stamp of the newest measurement
    last_rejected: bool = False  # the newest measurement was implausible

    def measured(
        self, window_id: int, stamp_ns: int, measurement: Measurement, settings: ScaleSettings
    ) -> ScaleHistory:
        """
        Add the measurement of one window; an implausible one is rejected, with a warning.

        The factor is that of before until `updated`.

        :param stamp_ns: of the newest image of the window.
        """
        low, high = settings.min_scale, settings.max_scale
        if not low <= measurement.factor <= high:
            if not self.last_rejected:
                logger.warning(
                    'rejected a scale of %.3g m per map unit (%s): expected %g to %g',
                    *(measurement.factor, settings.scale_source, low, high),
                )
            return replace(self, last_rejected=True)
        newest = WindowMeasurement(window_id, measurement)
        measurements = (*self.measurements, newest)[-settings.scale_windows :]
        return ScaleHistory(measurements, self.factor, stamp_ns)

    def corrected(self, corrections: Mapping[int, Sim3]) -> ScaleHistory:
        """Apply the corrections of a loop closure, by window; see `updated`."""
        measurements = tuple(
            replace(each, measurement=each.measurement / corrections[each.window_id].scale)
            for each in self.measurements
        )
        return replace(self, measurements=measurements)

    def updated(self) -> ScaleHistory:
        """Compute the factor from the measurements."""
        if not self.measurements:
            return self
        middle = _weighted_median(*_logs_and_weights(self.measurements))
        if self.factor is not None and abs(middle - np.log(self.factor)) <= _HYSTERESIS:
            return self
        return replace(self, factor=float(np.exp(middle)))

    def metric_scale(self, settings: ScaleSettings, stamp_ns: int) -> MetricScale:
        """
        Return the scale of the map.

        :param stamp_ns: of the newest image, from which the age of the scale is counted.
        """
        name = settings.scale_source
        if name == 'none':
            return MetricScale()
        if name == 'fixed':
            return MetricScale(settings.scale_factor, name, True, 0.0, 0.0)
        if self.factor is None:
            return MetricScale(source=name)
        logs, weights = _logs_and_weights(self.measurements)
        spread = np.nan
        if len(logs) > 1:
            middle = _weighted_median(logs, weights)
            spread = _DEVIATION * _weighted_median(np.abs(logs - middle), weights)
        return MetricScale(self.factor, name, True, spread, (stamp_ns - self.measured_ns) * 1e-9)


def check_source(settings: ScaleSettings, source: ScaleSource | None) -> None:
    """
    Check that the metric scale source of the settings exists.

    :raises ValueError: if `scale_source` needs a source and there is none.
    """
    if source is None and settings.scale_source not in ('none', 'fixed'):
        raise ValueError(f'scale_source is {settings.scale_source!r}, but nothing provides it')


def _logs_and_weights(measurements: tuple[WindowMeasurement, ...]) -> tuple[Array, Array]:
    logs = np.log([each.measurement.factor for each in measurements])
    return logs, np.array([each.measurement.weight for each in measurements])


def _weighted_median(values: Array, weights: Array) -> float:
    """Return the value with half of the weight on each side."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
