# SPDX-License-Identifier: Apache-2.0
"""
VGGT for ROS 2: camera frames in, camera poses, depth and a map out.

Importing this package does nothing: no ROS, no torch, no files. `extend_path` lets the source
tree find the generated `vggt_ros.msg`, which lies in the folder that colcon installs into.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
__version__ = '0.1.0'
