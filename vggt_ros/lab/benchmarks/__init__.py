# SPDX-License-Identifier: Apache-2.0
"""Speed of the network, and the accuracy of approximations."""
