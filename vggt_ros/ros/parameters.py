# SPDX-License-Identifier: Apache-2.0
"""
Settings become ROS parameters, with their descriptions and ranges.

The settings of the core are in `vggt_ros/settings.py`, those of the node alone are here. The
parameters and `config/vggt.yaml` are made from both:

    python3 -m vggt_ros.ros.parameters > config/vggt.yaml

Parameters can be changed while the node is unconfigured; later changes are rejected, since they
would have no effect. A bad value given at start (command line, file) does not end the process:
*configure* fails with it until the parameter is set.
"""

from __future__ import annotations

import itertools
import math
import sys
import textwrap
from dataclasses import Field, dataclass, fields
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from vggt_ros.io import names
from vggt_ros.settings import Settings, all_settings, check_range, setting

_MAX_INTEGER = 2**63 - 1  # descriptors have no open ranges


@dataclass(frozen=True)
class NodeSettings:
    """Topics, frames and QoS of the node."""

    world_frame: str = setting(
        names.WORLD_FRAME,
        'Frame of everything published: the optical frame of the first camera of the map.',
    )
    camera_frame_prefix: str = setting(
        names.CAMERA_FRAME,
        'Name of the camera frames published on /tf, and child frame of ~/odometry. No frame of '
        'the robot may have this name.',
    )
    tf_mode: str = setting(
        'cameras',
        'Transforms on /tf. cameras: world_frame to <camera_frame_prefix>_0, _1, ... for the '
        'frames of the window, oldest first; newest: world_frame to <camera_frame_prefix>, the '
        'newest frame; map_to_odom: map_frame to odom_frame, for navigation (REP-105), and '
        "map_frame to world_frame: needs the robot's transforms from odom_frame to the camera and "
        'a scale_source; off: none (in quotes in YAML and on the command line, where off alone '
        'means false).',
        choices=('cameras', 'newest', 'map_to_odom', 'off'),
    )
    odom_frame: str = setting(
        names.ODOM_FRAME,
        "Fixed frame in which /tf gives the camera motion, for scale_source 'tf' and tf_mode "
        "'map_to_odom'.",
    )
    map_frame: str = setting(
        names.MAP_FRAME, "Parent of odom_frame and world_frame with tf_mode 'map_to_odom'."
    )
    image_topics: str = setting(
        '',
        'Image topics of several synchronized cameras, separated by spaces; each camera_info is '
        'expected beside its images. Empty: one camera, on image_raw and camera_info.',
    )
    sync_slop: float = setting(
        0.02,
        'Largest difference of the stamps in a synchronized set of images of several cameras, '
        'seconds.',
        low=0.0,
        high=10.0,
    )
    camera_timeout: float = setting(
        1.0,
        'Without an image for so many seconds, a camera is left out of the synchronized sets '
        'until its next image.',
        low=0.01,
        high=3600.0,
    )
    image_transport: str = setting(
        'raw',
        'raw: sensor_msgs/Image on image_raw; compressed: sensor_msgs/CompressedImage (JPEG or '
        'PNG) on image_raw/compressed.',
        choices=('raw', 'compressed'),
    )
    image_reliability: str = setting(
        'best_effort',
        'QoS reliability of the image subscription; best_effort matches every publisher.',
        choices=('best_effort', 'reliable'),
    )
    image_depth: int = setting(5, 'QoS history depth of the image subscription.', low=1, high=100)
    publish_reliability: str = setting(
        'reliable',
        'QoS reliability of all publishers of the map; by default RViz receives only reliable '
        'ones.',
        choices=('reliable', 'best_effort'),
    )
    publish_depth: int = setting(
        10,
        'QoS history depth of all publishers of the map; a window publishes one message for each '
        'new frame at once.',
        low=1,
        high=1000,
    )
    max_path: int = setting(
        10000, 'Most poses in ~/path; the oldest are removed first.', low=1, high=1000000
    )
    diagnostics_period: float = setting(
        1.0, 'Seconds between two messages on /diagnostics.', low=0.05, high=60.0
    )

    @property
    def camera_topics(self) -> list[tuple[str, str]]:
        """For each camera the topics of its images and of its calibration."""
        topics = self.image_topics.split()
        if not topics:
            return [(names.IMAGE, names.CAMERA_INFO)]
        return [(topic, names.camera_info_topic(topic)) for topic in topics]

    def __post_init__(self) -> None:
        check_range(self)
        topics = self.image_topics.split()
        if len(set(topics)) < len(topics):
            raise ValueError(f"image_topics is '{self.image_topics}', expected different topics")
        frames = ('world_frame', 'camera_frame_prefix', 'odom_frame', 'map_frame')
        for name in frames:
            value = getattr(self, name)
            if not value or value.startswith('/'):
                raise ValueError(f"{name} is '{value}', expected a name without a leading slash")
        for name, other in itertools.combinations(frames, 2):
            if getattr(self, name) == getattr(self, other):
                raise ValueError(
                    f"{other} is '{getattr(self, other)}', expected another name than that of "
                    f'{name}'
                )


def declared_settings() -> list[Field[Any]]:
    """List the settings that are ROS parameters, in the order of the parameter file."""
    return [*all_settings(), *fields(NodeSettings)]


class Parameters:
    """The declared parameters of one node."""

    def __init__(self, node: Node) -> None:
        self.locked = False  # True while the node is configured
        self._node = node
        self._invalid: dict[str, str] = {}  # errors of values given at start, by parameter
        self._settings = {entry.name: entry for entry in declared_settings()}
        for entry in self._settings.values():
            self._declare(entry)
        node.add_on_set_parameters_callback(self._check_change)

    def read(self) -> tuple[Settings, NodeSettings]:
        """
        Build the settings from the values of the parameters.

        :raises ValueError: naming the parameter, its value and what was expected.
        """
        if self._invalid:
            raise ValueError('; '.join(self._invalid.values()))
        values = {name: self._node.get_parameter(name).value for name in self._settings}
        own = {entry.name: values.pop(entry.name) for entry in fields(NodeSettings)}
        return Settings.from_flat(values), NodeSettings(**own)

    def _declare(self, entry: Field[Any]) -> None:
        descriptor = parameter_descriptor(entry)
        try:
            self._node.declare_parameter(entry.name, entry.default, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            self._node.declare_parameter(
                entry.name, entry.default, descriptor, ignore_override=True
            )
            self._invalid[entry.name] = f'{entry.name} is invalid: {error}'

    def _check_change(self, parameters: list[Parameter]) -> SetParametersResult:
        own = [parameter for parameter in parameters if parameter.name in self._settings]
        for parameter in own:
            reason = self._rejection_reason(parameter.name, parameter.value)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        for parameter in own:
            self._invalid.pop(parameter.name, None)
        return SetParametersResult(successful=True)

    def _rejection_reason(self, name: str, value: object) -> str:
        """Return why a new value is rejected, '' if it is not; rclpy checked type and range."""
        if self.locked:
            return f'{name} can be changed only while the node is unconfigured'
        choices = self._settings[name].metadata['choices']
        if choices and value not in choices:
            return f'{name} is {value!r}, expected one of {", ".join(choices)}'
        if isinstance(value, float) and not math.isfinite(value):
            return f'{name} is {value}, expected a finite number'
        return ''


def parameter_descriptor(entry: Field[Any]) -> ParameterDescriptor:
    """Build the descriptor of a setting's parameter."""
    descriptor = ParameterDescriptor(description=entry.metadata['description'])
    low, high = entry.metadata['low'], entry.metadata['high']
    if entry.metadata['choices']:
        descriptor.additional_constraints = f'one of {", ".join(entry.metadata["choices"])}'
    if low is None and high is None:
        return descriptor
    if isinstance(entry.default, float):
        descriptor.floating_point_range = [
            FloatingPointRange(
                from_value=-sys.float_info.max if low is None else float(low),
                to_value=sys.float_info.max if high is None else float(high),
            )
        ]
    else:
        descriptor.integer_range = [
            IntegerRange(
                from_value=-_MAX_INTEGER if low is None else int(low),
                to_value=_MAX_INTEGER if high is None else int(high),
            )
        ]
    return descriptor


def format_yaml() -> str:
    """Format a parameter file with every default, described in comments."""
    lines = [
        '# SPDX-License-Identifier: Apache-2.0',
        '# Every parameter of the node with its default. Generated by',
        '#   python3 -m vggt_ros.ros.parameters > config/vggt.yaml',
        '/**:',
        '  ros__parameters:',
    ]
    for entry in declared_settings():
        lines += textwrap.wrap(
            entry.metadata['description'] + _range_text(entry),
            width=97,
            initial_indent='    # ',
            subsequent_indent='    # ',
            break_on_hyphens=False,
        )
        lines.append(f'    {entry.name}: {_yaml_value(entry.default)}')
    return '\n'.join(lines) + '\n'


def _range_text(entry: Field[Any]) -> str:
    low, high = entry.metadata['low'], entry.metadata['high']
    if entry.metadata['choices']:
        return f' One of {", ".join(entry.metadata["choices"])}.'
    if low is not None and high is not None:
        return f' From {low} to {high}.'
    if low is not None:
        return f' At least {low}.'
    return '' if high is None else f' At most {high}.'


def _yaml_value(value: object) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    return f"'{value}'" if isinstance(value, str) else repr(value)


if __name__ == '__main__':
    sys.stdout.write(format_yaml())
