# SPDX-License-Identifier: Apache-2.0
"""A network at work: loaded, on a device, within its memory."""
