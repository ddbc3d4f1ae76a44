# SPDX-License-Identifier: Apache-2.0
"""The network against golden vectors of the reference implementation."""
