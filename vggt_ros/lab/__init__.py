# SPDX-License-Identifier: Apache-2.0
"""What measures and trains: nothing that serves imports it."""
