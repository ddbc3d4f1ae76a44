# SPDX-License-Identifier: Apache-2.0
"""Reading and writing files: one module a format, no ROS."""
