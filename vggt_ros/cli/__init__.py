# SPDX-License-Identifier: Apache-2.0
"""Command lines: a short main each, no logic."""
