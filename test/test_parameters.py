# SPDX-License-Identifier: Apache-2.0
"""The parameters are the settings: names, defaults, ranges, descriptions, rejections."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip('rclpy', reason='needs ROS')
import rclpy
from rcl_interfaces.msg import ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_domain import Use, own_domain

from vggt_ros.lab.node.recorder import Recorder
from vggt_ros.lab.node.synthetic_camera import SyntheticCamera
from vggt_ros.ros.node import VggtNode
from vggt_ros.ros.parameters import NodeSettings, Parameters, declared_settings, format_yaml
from vggt_ros.settings import Settings

YAML = Path(__file__).resolve().parents[1] / 'config' / 'vggt.yaml'


@pytest.fixture(scope='module')
def context():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=own_domain(Use.PARAMETERS))
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def make(context):
    nodes = []

    def make_node(**overrides):
        overrides = [Parameter(name, value=value) for name, value in overrides.items()]
        node = Node('parameters', context=context, parameter_overrides=overrides)
        nodes.append(node)
        return node, Parameters(node)

    yield make_node
    for node in nodes:
        node.destroy_node()


def change(node, **values):
    parameters = [Parameter(name, value=value) for name, value in values.items()]
    return node.set_parameters_atomically(parameters)


def test_the_yaml_file_is_generated_from_the_settings():
    assert YAML.read_text() == format_yaml()
    values = yaml.safe_load(YAML.read_text())['/**']['ros__parameters']
    assert values == {entry.name: entry.default for entry in declared_settings()}
    assert {name: type(value) for name, value in values.items()} == {
        entry.name: type(entry.default) for entry in declared_settings()
    }


def test_the_yaml_file_has_short_lines():
    assert max(len(line) for line in YAML.read_text().splitlines()) <= 99


def test_untouched_parameters_are_the_default_settings(make):
    _, parameters = make()
    assert parameters.read() == (Settings(), NodeSettings())


def test_every_parameter_is_described_with_its_range(make):
    node, _ = make()
    kinds = {
        bool: ParameterType.PARAMETER_BOOL,
        int: ParameterType.PARAMETER_INTEGER,
        float: ParameterType.PARAMETER_DOUBLE,
        str: ParameterType.PARAMETER_STRING,
    }
    for entry in declared_settings():
        descriptor = node.describe_parameter(entry.name)
        assert descriptor.description == entry.metadata['description']
        assert descriptor.type == kinds[type(entry.default)]
        ranges = [*descriptor.integer_range, *descriptor.floating_point_range]
        limits = (entry.metadata['low'], entry.metadata['high'])
        assert len(ranges) == (limits != (None, None))
        for found in ranges:
            assert limits[0] in (None, found.from_value)
            assert limits[1] in (None, found.to_value)


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'window_size': 1}, 'window_size'),
        ({'window_size': 8.0}, 'Wrong parameter type'),  # rclpy's error
        ({'min_parallax': 2.0}, 'min_parallax'),
        ({'min_parallax': math.nan}, 'min_parallax'),
        ({'max_stamp_gap': math.inf}, 'max_stamp_gap'),
        ({'tf_mode': 'all'}, 'cameras, newest, map_to_odom, off'),
        ({'checkpoint': True}, 'Wrong parameter type'),
    ],
)
def test_an_invalid_change_is_rejected_with_the_reason(make, values, words):
    node, parameters = make()
    result = change(node, **values)
    assert not result.successful
    assert words in result.reason
    assert parameters.read() == (Settings(), NodeSettings())


def test_a_valid_change_is_read(make):
    node, parameters = make()
    assert change(node, window_size=12, tf_mode='off').successful
    settings, node_settings = parameters.read()
    assert settings.window.window_size == 12
    assert node_settings.tf_mode == 'off'


def test_a_configured_node_rejects_changes(make):
    node, parameters = make()
    parameters.locked = True
    result = change(node, window_size=12)
    assert not result.successful
    assert 'unconfigured' in result.reason
    parameters.locked = False
    assert change(node, window_size=12).successful


@pytest.mark.parametrize(
    'overrides',
    [
        {'window_size': 1},
        {'window_size': 'eight'},
        {'window_size': 4, 'window_stride': 4},
        {'min_parallax': math.nan},
        {'image_transport': 'theora'},
        {'resolution': 500},
        {'world_frame': ''},
        {'camera_frame_prefix': 'vggt_world'},
    ],
)
def test_an_invalid_start_value_fails_when_read_not_before(make, overrides):
    node, parameters = make(**overrides)
    with pytest.raises(ValueError, match=list(overrides)[-1]):
        parameters.read()
    defaults = {entry.name: entry.default for entry in declared_settings()}
    assert change(node, **{name: defaults[name] for name in overrides}).successful
    assert parameters.read() == (Settings(), NodeSettings())


def test_the_error_of_an_invalid_start_value_is_one_line(make):
    _, parameters = make(window_size='eight')
    with pytest.raises(ValueError, match='window_size') as caught:
        parameters.read()
    assert re.fullmatch(r'.{20,250}', str(caught.value))


@pytest.mark.parametrize('kind', [VggtNode, SyntheticCamera, Recorder])
def test_no_attribute_of_ours_has_the_name_of_one_of_rclpys(context, kind):
    base = kind.__base__('bare', context=context)
    inherited = set(dir(base))
    base.destroy_node()
    assigned = set(re.findall(r'self\.(\w+)(?:: .+)? = ', inspect.getsource(kind)))
    assert assigned and not assigned & inherited
