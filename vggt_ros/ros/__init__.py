# SPDX-License-Identifier: Apache-2.0
"""The ROS 2 node around the engine: the only code here that imports rclpy or messages."""
