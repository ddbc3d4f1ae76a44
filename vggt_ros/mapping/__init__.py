# SPDX-License-Identifier: Apache-2.0
"""Windows become a map: geometry, registration, scale, covariance, loops."""
