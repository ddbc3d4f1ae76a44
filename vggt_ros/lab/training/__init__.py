# SPDX-License-Identifier: Apache-2.0
"""Training: what the truth is, losses, samples and the loop."""
