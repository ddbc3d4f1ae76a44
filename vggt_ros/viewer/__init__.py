# SPDX-License-Identifier: Apache-2.0
"""Maps in the browser: of a finished or running reconstruction, or of a running node."""
