# SPDX-License-Identifier: Apache-2.0
"""`python -m vggt_ros`: the command `vggt`."""

import sys

from vggt_ros.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
