# SPDX-License-Identifier: Apache-2.0
"""
Settings become ROS parameters, with their descriptions and ranges.

The settings of the core are in `vggt_ros/settings.py`, those that only a ROS node has are here;
parameters and `config/vggt.yaml` are made from both, and nothing is described twice:

    python3 -m vggt_ros.ros.parameters > config/vggt.yaml

A parameter can be changed while the node is unconfigured; afterwards the change is refused, since
it would have no effect. A bad value given at start (command line, file) does not end the process:
it is remembered, and *configure* fails with it until the parameter is set.
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

from vggt_ros.settings import Settings, all_settings, check_range, setting

_LARGEST_INTEGER = 2**63 - 1  # an open range must be closed to be put into a descriptor


@dataclass(frozen=True)
class NodeSettings:
    """How the node takes images in and gives results out."""

    world_frame: str = setting(
        'vggt_world',
        'Frame of everything published: the optical frame of the first camera of the map.',
    )
    camera_frame_prefix: str = setting(
        'vggt_camera',
        'Name of the camera frames published on /tf, and child frame of ~/odometry. Choose a name '
        'that no frame of the robot has.',
    )
    tf_mode: str = setting(
        'cameras',
        'Transforms on /tf. cameras: <camera_frame_prefix>_0, _1, ... for the frames of the '
        'window, oldest first; newest: <camera_frame_prefix> for the newest; map_to_odom: '
        "map_frame to odom_frame, for navigation (REP-105), from the robot's own odom_frame to "
        'camera chain, beside map_frame to world_frame: it needs a scale_source; off: none (in '
        'quotes in YAML and on the command line, where off alone means false).',
        choices=('cameras', 'newest', 'map_to_odom', 'off'),
    )
    odom_frame: str = setting(
        'odom',
        "Fixed frame in which /tf tells the camera's way, for scale_source 'tf' and tf_mode "
        "'map_to_odom'.",
    )
    map_frame: str = setting('map', "Parent of odom_frame with tf_mode 'map_to_odom'.")
    image_topics: str = setting(
        '',
        'Image topics of several cameras, separated by spaces, for joint windows; their '
        'camera_info is expected beside each. Empty: one camera, on image_raw and camera_info.',
    )
    sync_slop: float = setting(
        0.02,
        'Images of several cameras belong together if their stamps differ by no more than this, '
        'seconds.',
        low=0.0,
        high=10.0,
    )
    camera_timeout: float = setting(
        1.0,
        'The other cameras go on without one that has been silent for so many seconds.',
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
        'QoS of the image subscription; best_effort receives from every publisher.',
        choices=('best_effort', 'reliable'),
    )
    image_depth: int = setting(
        5, 'Images kept by the subscription until the node takes them.', low=1, high=100
    )
    publish_reliability: str = setting(
        'reliable',
        'QoS of everything published; RViz shows nothing of a best_effort publisher by default.',
        choices=('reliable', 'best_effort'),
    )
    publish_depth: int = setting(
        10,
        'Messages kept for slow subscribers; a window publishes as many images as it has new '
        'frames, in one go.',
        low=1,
        high=1000,
    )
    max_path: int = setting(
        10000, 'Poses in ~/path at most; the oldest are left out first.', low=1, high=1000000
    )
    diagnostics_period: float = setting(
        1.0, 'Seconds between two messages on /diagnostics.', low=0.05, high=60.0
    )

    @property
    def camera_topics(self) -> list[tuple[str, str]]:
        """For each camera the topics of its images and of its calibration."""
        topics = self.image_topics.split()
        if not topics:
            return [('image_raw', 'camera_info')]
        # beside the images, as image_transport has it
        return [(topic, '/'.join([*topic.split('/')[:-1], 'camera_info'])) for topic in topics]

    def __post_init__(self) -> None:
        check_range(self)
        topics = self.image_topics.split()
        if len(set(topics)) < len(topics):
            raise ValueError(f"image_topics is '{self.image_topics}', expected different topics")
        names = ('world_frame', 'camera_frame_prefix', 'odom_frame', 'map_frame')
        for name in names:
            value = getattr(self, name)
            if not value or value.startswith('/'):
                raise ValueError(f"{name} is '{value}', expected a name without a leading slash")
        for name, other in itertools.combinations(names, 2):
            if getattr(self, name) == getattr(self, other):
                raise ValueError(
                    f"{other} is '{getattr(self, other)}', expected another name than that of "
                    f'{name}'
                )


def declared_settings() -> list[Field[Any]]:
    """List the settings that are ROS parameters, in the order in which a person reads them."""
    return [*all_settings(), *fields(NodeSettings)]


class Parameters:
    """The declared parameters of one node."""

    def __init__(self, node: Any) -> None:
        self.locked = False  # True while the node is configured
        self._node = node
        self._refused: dict[str, str] = {}  # values given at start that are not legal
        self._settings = {entry.name: entry for entry in declared_settings()}
        for entry in self._settings.values():
            self._declare(entry)
        node.add_on_set_parameters_callback(self._check_change)

    def read(self) -> tuple[Settings, NodeSettings]:
        """
        Build the settings from the parameters' values.

        :raises ValueError: with one sentence that names the parameter, the value found and what
            was expected.
        """
        if self._refused:
            raise ValueError('; '.join(self._refused.values()))
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
            self._refused[entry.name] = f'{entry.name} cannot be used: {error}'

    def _check_change(self, parameters: list[Any]) -> SetParametersResult:
        ours = [parameter for parameter in parameters if parameter.name in self._settings]
        for parameter in ours:
            reason = self._find_fault(parameter.name, parameter.value)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        for parameter in ours:
            self._refused.pop(parameter.name, None)
        return SetParametersResult(successful=True)

    def _find_fault(self, name: str, value: object) -> str:
        """Say what is wrong with a new value; type and range were checked by rclpy."""
        if self.locked:
            return f'{name} can be changed only while the node is unconfigured: clean it up first'
        choices = self._settings[name].metadata['choices']
        if choices and value not in choices:
            return f'{name} is {value!r}, expected one of {", ".join(choices)}'
        if isinstance(value, float) and not math.isfinite(value):
            return f'{name} is {value}, expected a finite number'
        return ''


def parameter_descriptor(entry: Field[Any]) -> ParameterDescriptor:
    """Turn a setting into the descriptor of its parameter."""
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
                from_value=-_LARGEST_INTEGER if low is None else int(low),
                to_value=_LARGEST_INTEGER if high is None else int(high),
            )
        ]
    return descriptor


def format_yaml() -> str:
    """Write every parameter with its default as a parameter file, described by comments."""
    lines = [
        '# SPDX-License-Identifier: Apache-2.0',
        '# Every parameter of the node with its default. Made from the settings in the code by',
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
