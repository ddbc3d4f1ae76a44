# SPDX-License-Identifier: Apache-2.0
"""
The state of the node, once a second on /diagnostics.

Published from a timer of the executor, never from the worker: messages continue while the network
computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from vggt_ros.inference.network import Network
from vggt_ros.io.names import DIAGNOSTICS
from vggt_ros.mapping.map_update import MapUpdate
from vggt_ros.ros.faults import Fault, Faults
from vggt_ros.settings import UNTRAINED_WARNING

_MAX_AGE = 5.0  # s without an image or a measurement of the scale, until a warning
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Output:
    """The last published map update."""

    time: float  # of the clock, when it was published, s
    latency: float  # s from the arrival of the newest image to the end of publication
    update: MapUpdate


class Diagnostics:
    """Publishes the state of a node with a network."""

    def __init__(
        self,
        node: Node,
        network: Network,
        faults: Faults,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Create the publisher.

        :param clock: that of the faults and of arrivals.
        """
        self._node = node
        self._network = network
        self._faults = faults
        self._clock = clock
        self._publisher = node.create_publisher(DiagnosticArray, DIAGNOSTICS, 10)
        self._started = clock()
        self._output: Output | None = None
        self._received = 0
        self._last_image = self._started

    def record_output(self, update: MapUpdate, arrived: float) -> None:
        """
        Record an update that was published; called in the worker's thread.

        :param arrived: arrival of its newest image.
        """
        now = self._clock()
        self._output = Output(now, now - arrived, update)

    def publish(self, counts: Mapping[str, int], publishers: int, window_size: int) -> None:
        """
        Publish one message.

        :param counts: images and windows by outcome, faults by kind; `waiting` images have no
            outcome yet.
        :param publishers: on the image topic.
        :param window_size: at present.
        """
        output, fault = self._output, self._faults.latest  # the worker may replace them meanwhile
        level, summary = self._summarize(counts.get('received', 0), publishers, output, fault)
        values = {
            'model': self._network.name,
            'model_trained': self._network.trained,
            'device': self._network.device,
            'precision': self._network.precision,
            'attention': self._network.attention,
            'device_memory': describe_memory(self._network.device),
            'window_size': window_size,
            'image_publishers': publishers,
            **dict(sorted(counts.items())),
            'last_error': '' if fault is None else fault.text,
            **self._describe(output),
        }
        status = DiagnosticStatus(
            level=level,
            name=f'{self._node.get_name()}: pipeline',
            message=summary,
            hardware_id=self._network.device,
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)

    def destroy(self) -> None:
        """Destroy the publisher."""
        self._node.destroy_publisher(self._publisher)

    def _summarize(
        self, received: int, publishers: int, output: Output | None, fault: Fault | None
    ) -> tuple[bytes, str]:
        """Choose the level and the message: a fault since the last output, or warnings."""
        now = self._clock()
        if received != self._received:
            self._received, self._last_image = received, now
        if fault and fault.time > (self._started if output is None else output.time):
            return DiagnosticStatus.ERROR, fault.text
        warnings = []
        if now - self._last_image > _MAX_AGE:
            warnings.append(f'no image for {now - self._last_image:.0f} s')
        if publishers > 1:
            warnings.append(f'{publishers} publishers of images, expected one')
        if not self._network.trained:
            warnings.append(UNTRAINED_WARNING)
        if output and not output.update.metric.valid:
            warnings.append('the metric scale is unknown: lengths are not metres')
        if output and output.update.metric.age > _MAX_AGE:
            age = output.update.metric.age
            warnings.append(f'the metric scale was last measured {age:.0f} s ago')
        if warnings:
            return DiagnosticStatus.WARN, '; '.join(warnings)
        return DiagnosticStatus.OK, 'mapping' if output else 'waiting for the first window'

    def _describe(self, output: Output | None) -> dict[str, object]:
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
            'output_age_seconds': self._clock() - output.time,
            **{f'{step}_seconds': seconds for step, seconds in update.seconds.items()},
        }


def describe_memory(device: str) -> str:
    """Describe how much memory of the network's device this process uses."""
    if device.startswith('cuda'):
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return f'{used / _MEBIBYTE:.0f} MiB used, {reserved / _MEBIBYTE:.0f} MiB reserved'
    with open('/proc/self/status', encoding='ascii') as status:
        resident = next(line.split()[1] for line in status if line.startswith('VmRSS'))
    return f'{int(resident) / 1024:.0f} MiB resident'


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:.6g}' if isinstance(value, float) else str(value)
