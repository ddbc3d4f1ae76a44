# SPDX-License-Identifier: Apache-2.0
"""Rotations, poses, cameras, similarity transforms, and the tree of coordinate frames."""
