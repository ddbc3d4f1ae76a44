# SPDX-License-Identifier: Apache-2.0
"""Ray-cast rooms with exact depth, poses, intrinsics and tracks."""
