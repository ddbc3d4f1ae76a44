# SPDX-License-Identifier: Apache-2.0
"""Camera images become windows at the size that the network reads."""
