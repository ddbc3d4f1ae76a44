# SPDX-License-Identifier: Apache-2.0
"""Recordings to finished maps, without a robot and without ROS."""
