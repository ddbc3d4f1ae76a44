# SPDX-License-Identifier: Apache-2.0
"""Training: datasets, losses, the trainer and its recipes."""
