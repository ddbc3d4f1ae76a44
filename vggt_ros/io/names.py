# SPDX-License-Identifier: Apache-2.0
"""
Names of the node, its topics, its service and its frames: each is written down here alone.

A topic that begins with `~/` is private to the node, one without a slash is relative to the
node's namespace, as ROS resolves them. Importing this module needs neither ROS nor numpy, so
launch files use it, too.
"""

from __future__ import annotations

NODE = 'vggt'

# Subscribed
IMAGE = 'image_raw'
CAMERA_INFO = 'camera_info'
ODOMETRY_INPUT = 'odometry'  # of the robot, for `scale_source: odometry`
SENSOR_DEPTH = 'sensor_depth'  # for `scale_source: depth`
TF, TF_STATIC = '/tf', '/tf_static'

# Published
POSES = '~/poses'
ODOMETRY = '~/odometry'
PATH = '~/path'
DEPTH = '~/depth/image_rect'
CONFIDENCE = '~/depth/confidence'
DEPTH_CAMERA_INFO = '~/depth/camera_info'
POINTS = '~/points'
WINDOW = '~/window'
TRACKS = '~/tracks'
DIAGNOSTICS = '/diagnostics'

# Services
RESET = '~/reset'

# Published by the synthetic camera beside its images: the true poses
TRUTH = 'truth'

# Default frame ids
WORLD_FRAME = 'vggt_world'
CAMERA_FRAME = 'vggt_camera'
ODOM_FRAME = 'odom'  # REP-105
MAP_FRAME = 'map'  # REP-105


def compressed_topic(image_topic: str) -> str:
    """Name the topic of the CompressedImage, as image_transport does."""
    return f'{image_topic}/compressed'


def camera_info_topic(image_topic: str) -> str:
    """Name the topic of the calibration: beside the images, as image_transport has it."""
    return '/'.join([*image_topic.split('/')[:-1], CAMERA_INFO])


def camera_topic(topic: str, camera: int, cameras: int) -> str:
    """Name the private topic of one camera: each of several cameras has its own."""
    return topic if cameras == 1 else topic.replace('~/', f'~/camera_{camera}/')


def resolve_private(topic: str, node: str = f'/{NODE}') -> str:
    """
    Resolve a private topic.

    :param topic: beginning with `~/`; others are returned unchanged.
    :param node: full name of the node.
    """
    return topic.replace('~', node, 1) if topic.startswith('~/') else topic
