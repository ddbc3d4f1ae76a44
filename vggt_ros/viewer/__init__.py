# SPDX-License-Identifier: Apache-2.0
"""A map in the browser: finished, growing, or that of a running node."""
