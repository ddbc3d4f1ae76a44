# SPDX-License-Identifier: Apache-2.0
"""Without a robot at hand: recordings become folders, and scenes can be looked at."""
