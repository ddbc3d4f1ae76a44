#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
The command `vggt`, also `python -m vggt_ros` and `ros2 run vggt_ros vggt`.

    vggt --help
    vggt reconstruct drive.mcap --output drive_map
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from vggt_ros.cli.benchmark import Ablate, Bench, BenchNode
from vggt_ros.cli.command import Command, execute, parse_options
from vggt_ros.cli.demo import Demo
from vggt_ros.cli.evaluate import Evaluate
from vggt_ros.cli.parity import Parity
from vggt_ros.cli.reconstruct import Reconstruct
from vggt_ros.cli.train import ContactSheet, EmbedWeights, PlotTraining, Train
from vggt_ros.cli.view import View

COMMANDS: tuple[type[Command], ...] = (
    Reconstruct,
    View,
    Evaluate,
    Train,
    PlotTraining,
    ContactSheet,
    EmbedWeights,
    Bench,
    BenchNode,
    Ablate,
    Parity,
    Demo,
)
DESCRIPTION = """\
VGGT: camera frames in, camera poses, depth and a map out.

    vggt reconstruct drive.mcap --output drive_map
    vggt COMMAND --help"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; see `Command.main`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for command in COMMANDS:
        if arguments[:1] == [command.name]:
            # its own parser: the help shows all of its docstring, not only the summary
            return command.main(arguments[1:], prog=f'vggt {command.name}')
    parsed: Command = parse_options(_any_command(), 'vggt', DESCRIPTION, arguments)
    return execute(parsed)


def _any_command() -> Any:
    """Return the union of the commands, each with the first line of its docstring."""
    return Union[  # noqa: UP007  # of a tuple that is made here
        tuple(
            Annotated[
                command,
                tyro.conf.subcommand(
                    command.name, description=(inspect.getdoc(command) or '').partition('\n')[0]
                ),
            ]
            for command in COMMANDS
        )
    ]


if __name__ == '__main__':
    sys.exit(main())
