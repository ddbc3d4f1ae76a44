# SPDX-License-Identifier: Apache-2.0
"""Recordings become maps on disk: the engine without a robot, and what is made of its results."""
