# SPDX-License-Identifier: Apache-2.0
"""
How the node is doing, once a second on /diagnostics.

The report comes from a timer of the executor, never from the worker: it keeps coming while the
network computes, and its figures then show that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from vggt_ros.inference.network import Network
from vggt_ros.mapping.map_update import MapUpdate

_SILENCE = 5.0  # seconds without an image, or without output, that deserve a warning
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Output:
    """What is kept of the last update of the map."""

    published: float  # time.monotonic()
    latency: float  # seconds from the arrival of the newest image to the end of publishing
    update: MapUpdate


class Diagnostics:
    """Publishes the state of a node with a network."""

    def __init__(self, node: Any, network: Network) -> None:
        self._node = node
        self._network = network
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._output: Output | None = None
        self._last_error: tuple[float, str] | None = None
        self._received = 0
        self._last_image = time.monotonic()

    def record_output(self, update: MapUpdate, arrived: float) -> None:
        """Remember an update that was published; called in the worker's thread."""
        now = time.monotonic()
        self._output = Output(now, now - arrived, update)

    def record_error(self, sentence: str) -> None:
        """Remember a failure; called in the worker's thread."""
        self._last_error = (time.monotonic(), sentence)

    def publish(self, counts: Mapping[str, int], publishers: int, window_size: int) -> None:
        """
        Publish one report.

        :param counts: images and windows by fate, `waiting` those that have none yet.
        :param publishers: of the image topic.
        :param window_size: at present.
        """
        output, error = self._output, self._last_error  # the worker may replace them meanwhile
        level, message = self._judge(counts.get('received', 0), publishers, output, error)
        values = {
            'model': self._network.name,
            'model_trained': self._network.trained,
            'device': self._network.device,
            'precision': self._network.precision,
            'attention': self._network.attention,
            'device_memory': measure_memory(self._network.device),
            'window_size': window_size,
            'image_publishers': publishers,
            **dict(sorted(counts.items())),
            'last_error': '' if error is None else error[1],
            **_describe_output(output),
        }
        status = DiagnosticStatus(
            level=level,
            name=f'{self._node.get_name()}: pipeline',
            message=message,
            hardware_id=self._network.device,
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        report = DiagnosticArray(status=[status])
        report.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(report)

    def destroy(self) -> None:
        """Take the publisher off the graph."""
        self._node.destroy_publisher(self._publisher)

    def _judge(
        self,
        received: int,
        publishers: int,
        output: Output | None,
        error: tuple[float, str] | None,
    ) -> tuple[bytes, str]:
        """Find the level and the sentence that a person should read first."""
        now = time.monotonic()
        if received != self._received:
            self._received, self._last_image = received, now
        if error and (output is None or error[0] > output.published):
            return DiagnosticStatus.ERROR, error[1]
        warnings = []
        if now - self._last_image > _SILENCE:
            warnings.append(f'no image for {now - self._last_image:.0f} s')
        if publishers > 1:
            warnings.append(f'{publishers} publishers of images, expected one')
        if not self._network.trained:
            warnings.append('the network is untrained: the geometry means nothing')
        if output and not output.update.metric.valid:
            warnings.append('the scale is unknown: lengths are not metres')
        if output and output.update.metric.age > _SILENCE:
            age = output.update.metric.age
            warnings.append(f'the scale is held: nothing has measured it for {age:.0f} s')
        if warnings:
            return DiagnosticStatus.WARN, '; '.join(warnings)
        return DiagnosticStatus.OK, 'mapping' if output else 'waiting for the first window'


def measure_memory(device: str) -> str:
    """Say how much memory the network's device has given to this process."""
    if device.startswith('cuda'):
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return f'{used / _MEBIBYTE:.0f} MiB used, {reserved / _MEBIBYTE:.0f} MiB reserved'
    with open('/proc/self/status', encoding='ascii') as status:
        resident = next(line.split()[1] for line in status if line.startswith('VmRSS'))
    return f'{int(resident) / 1024:.0f} MiB resident'


def _describe_output(output: Output | None) -> dict[str, object]:
    if output is None:
        return {'map_id': 'none'}
    update = output.update
    return {
        'map_id': update.map_id,
        'map_start_reason': update.map_start_reason,
        'scale': update.metric.factor,
        'scale_source': update.metric.source,
        'scale_valid': update.metric.valid,
        'scale_spread': update.metric.spread,
        'scale_age_seconds': update.metric.age,
        'registration_residual': update.registration.residual,
        'registration_parallax': update.registration.parallax,
        'latency_seconds': output.latency,
        'output_age_seconds': time.monotonic() - output.published,
        **{f'{step}_seconds': seconds for step, seconds in update.seconds.items()},
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:.6g}' if isinstance(value, float) else str(value)
