# SPDX-License-Identifier: Apache-2.0
"""Rotations, cameras and similarity transforms: pure functions and values, no state."""
