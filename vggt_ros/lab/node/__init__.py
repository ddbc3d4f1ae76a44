# SPDX-License-Identifier: Apache-2.0
"""Processes around the node: a synthetic camera, a recorder, a benchmark."""
