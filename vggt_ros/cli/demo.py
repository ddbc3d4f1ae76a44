# SPDX-License-Identifier: Apache-2.0
"""`vggt demo`: synthetic camera, node and recorder, live over DDS."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from vggt_ros.cli.command import COMPLETE, Command, CommandError
from vggt_ros.lab.demo import DemoError, DemoOptions, run_demo


@dataclass(frozen=True)
class Demo(DemoOptions, Command):
    """
    Run the demo: synthetic camera, node and recorder as three processes; needs ROS.

        vggt demo --frames 60 --output demo_output/demo.png

    Prints a table, and writes a plot and a bag of the camera's topics.
    """

    name: ClassVar[str] = 'demo'

    def run(self) -> int:
        """Run it."""
        try:
            run_demo(self)
        except DemoError as error:
            raise CommandError(str(error)) from error
        return COMPLETE


if __name__ == '__main__':
    sys.exit(Demo.main())
