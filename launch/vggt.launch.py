# SPDX-License-Identifier: Apache-2.0
"""
Start the node, configure and activate it, and start RViz on request.

    ros2 launch vggt_ros vggt.launch.py image_topic:=/camera/image_raw rviz:=true

Event handlers trigger the transitions, the same way on Humble, Jazzy and Kilted; the `autostart`
of newer launch_ros does not exist on Humble. Parameters keep the node's own defaults: those of
`FORWARDED` are set only if the argument is not empty.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from lifecycle_msgs.msg import Transition

from vggt_ros.io import names

CONFIG = os.path.join(get_package_share_directory('vggt_ros'), 'config')
PROFILE_VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
RVIZ_TOPICS = (
    names.POSES,
    names.PATH,
    names.ODOMETRY,
    names.POINTS,
    names.DEPTH,
    names.CONFIDENCE,
)

ARGUMENTS = {
    'namespace': ('', 'namespace of the node and its relative topics'),
    'node_name': (names.NODE, 'name of the node'),
    'image_topic': (names.IMAGE, 'image topic; JPEG or PNG on <image_topic>/compressed'),
    'image_topics': ('', 'image topics of several cameras, separated by spaces'),
    'camera_info_topic': (names.CAMERA_INFO, 'calibration topic'),
    'scale_source': ('', 'none, fixed, tf, odometry or depth; empty: as in params_file'),
    'odometry_topic': (names.ODOMETRY_INPUT, 'robot odometry, for scale_source odometry'),
    'depth_topic': (names.SENSOR_DEPTH, 'registered depth images, for scale_source depth'),
    'checkpoint': ('', 'weights of the network; empty: as in params_file'),
    'device': ('', 'torch device; empty: as in params_file'),
    'params_file': (os.path.join(CONFIG, 'vggt.yaml'), 'parameter file; none: the defaults'),
    'use_sim_time': ('false', 'use the time of /clock'),
    'rviz': ('false', 'start RViz too'),
    'log_level': ('info', 'debug, info, warn, error or fatal'),
    'autostart': ('true', 'configure and activate the node'),
    'fastdds_profile': (
        os.path.join(CONFIG, 'fastdds.xml'),
        'Fast DDS profile for large messages, unless the environment has one; none: no profile',
    ),
}
NONE = ('', 'none')  # the command line cannot pass an empty value
FORWARDED = ('checkpoint', 'device', 'scale_source', 'image_topics')  # to parameters of the node


def generate_launch_description():
    """Declare the arguments; the actions depend on their values."""
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (default, description) in ARGUMENTS.items()
            ),
            OpaqueFunction(function=_start),
        ]
    )


def _start(context):
    values = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    node = _make_node(values)
    actions = [*_set_profile(values['fastdds_profile']), node]
    if _is_true(values['autostart']):
        actions += _bring_up(node)
    if _is_true(values['rviz']):
        actions.append(_make_rviz(values))
    return actions


def _make_node(values):
    parameters = []
    if values['params_file'] not in NONE:
        if not os.path.isfile(values['params_file']):  # launch_ros would only warn
            raise RuntimeError(f"params_file is '{values['params_file']}', expected a file")
        parameters.append(values['params_file'])
    parameters.append({'use_sim_time': _is_true(values['use_sim_time'])})
    parameters += [{name: values[name]} for name in FORWARDED if values[name]]
    return LifecycleNode(
        package='vggt_ros',
        executable='vggt_node',
        name=values['node_name'],
        namespace=values['namespace'],
        parameters=parameters,
        remappings=[
            (names.IMAGE, values['image_topic']),
            (names.compressed_topic(names.IMAGE), names.compressed_topic(values['image_topic'])),
            (names.CAMERA_INFO, values['camera_info_topic']),
            (names.ODOMETRY_INPUT, values['odometry_topic']),
            (names.SENSOR_DEPTH, values['depth_topic']),
        ],
        arguments=['--ros-args', '--log-level', values['log_level']],
        output='screen',
    )


def _bring_up(node):
    """Configure now, activate when configured; after a failure the node stays unconfigured."""

    def change(transition):
        return EmitEvent(
            event=ChangeState(
                lifecycle_node_matcher=matches_action(node), transition_id=transition
            )
        )

    when_configured = OnStateTransition(
        target_lifecycle_node=node,
        start_state='configuring',
        goal_state='inactive',
        entities=[change(Transition.TRANSITION_ACTIVATE)],
    )
    return [RegisterEventHandler(when_configured), change(Transition.TRANSITION_CONFIGURE)]


def _make_rviz(values):
    node = '/'.join(['', *values['namespace'].strip('/').split('/'), values['node_name']])
    node = node.replace('//', '/')
    return Node(
        package='rviz2',
        executable='rviz2',
        arguments=['-d', os.path.join(CONFIG, 'vggt.rviz')],
        parameters=[{'use_sim_time': _is_true(values['use_sim_time'])}],
        remappings=[
            (names.resolve_private(topic), names.resolve_private(topic, node))
            for topic in RVIZ_TOPICS
        ]
        + [(f'/{names.IMAGE}', values['image_topic'])],
        namespace=values['namespace'],
    )


def _set_profile(profile):
    if profile in NONE or any(name in os.environ for name in PROFILE_VARIABLES):
        return []
    return [SetEnvironmentVariable(name, profile) for name in PROFILE_VARIABLES]


def _is_true(text):
    if text.lower() not in ('true', 'false'):
        raise ValueError(f"launch argument is '{text}', expected true or false")
    return text.lower() == 'true'
