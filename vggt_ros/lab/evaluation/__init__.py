# SPDX-License-Identifier: Apache-2.0
"""Measurements: parity with the reference, trajectories, depth, timing."""
