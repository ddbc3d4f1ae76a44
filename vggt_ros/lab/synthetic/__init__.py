# SPDX-License-Identifier: Apache-2.0
"""Ray-cast rooms with exact depth, cameras and poses, for the demo, the tests and training."""
