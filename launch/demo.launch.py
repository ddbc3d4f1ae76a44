# SPDX-License-Identifier: Apache-2.0
"""
Synthetic camera, node and RViz: a demonstration without a camera.

Takes the arguments of vggt.launch.py, too.
"""

from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare


def generate_launch_description():
    """Start the three processes."""
    node = PathJoinSubstitution([FindPackageShare('vggt_ros'), 'launch', 'vggt.launch.py'])
    return LaunchDescription(
        [
            # first, since it also sets the DDS profile, which the camera needs for large images
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(node), launch_arguments={'rviz': 'true'}.items()
            ),
            Node(
                package='vggt_ros',
                executable='synthetic_camera',
                output='screen',
                parameters=[{'loop': True}],
            ),
        ]
    )
