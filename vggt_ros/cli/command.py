# SPDX-License-Identifier: Apache-2.0
"""
A command is a dataclass: its fields are the options, its docstring is the help.

Nothing here or at the top of a command's module imports torch or ROS, so that help and errors in
options are immediate; `run` imports what it needs. Parsing is tyro's (brentyi/tyro, MIT).
"""

from __future__ import annotations

import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from vggt_ros.settings import all_settings

COMPLETE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes

ROS_PARTS = ('vggt_ros.ros', 'vggt_ros.lab.node', 'vggt_ros.msg')  # missing where pip installs

Flag = Annotated[bool, FlagCreatePairsOff]  # --name, or --no-name if the default is True

OPTION_TYPES = ConstructorRegistry()
PARSING = (DisallowNone,)  # an option that is not given is None; the word None is no value


class CommandError(Exception):
    """A failure other than bad input; the message is one sentence."""


class SettingValues(dict[str, Any]):
    """The settings of the core, named as the node's parameters."""


@OPTION_TYPES.struct_rule
def _make_setting_options(info: StructTypeInfo) -> StructConstructorSpec | None:
    if info.type is not SettingValues:
        return None
    options = []
    for entry in all_settings():
        choices = entry.metadata['choices']
        kind: Any = Literal[choices] if choices else type(entry.default)
        options.append(
            StructFieldSpec(
                entry.name, kind, entry.default, helptext=entry.metadata['description']
            )
        )
    return StructConstructorSpec(SettingValues, tuple(options))


C = TypeVar('C', bound='Command')
T = TypeVar('T')


class Command(ABC):
    """One command of `vggt`; subclasses are frozen dataclasses."""

    name: ClassVar[str]  # of the command, in lower case

    @abstractmethod
    def run(self) -> int:
        """
        Run with these options.

        :returns: the exit code.
        :raises ValueError: for bad input.
        :raises CommandError: for any other failure that one sentence explains.
        """

    @classmethod
    def parse(cls: type[C], arguments: Sequence[str] | None = None, prog: str = '') -> C:
        """
        Parse the options.

        :param arguments: None: those of the process.
        :raises SystemExit: with 2, if they cannot be parsed; with 0 after `--help`.
        """
        return parse_options(cls, prog or cls.name, inspect.getdoc(cls) or '', arguments)

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None, prog: str = '') -> int:
        """
        Parse and run; see `parse`.

        :returns: the exit code: 0 complete, 2 bad input, 1 another failure, 130 interrupted.
        """
        return execute(cls.parse(arguments, prog))


def parse_options(
    kind: type[T], prog: str, description: str, arguments: Sequence[str] | None
) -> T:
    """
    Parse options into a dataclass, or one of a union; see `Command.parse`.

    :param prog: name of the program, for the help, as the description.
    """
    try:
        return tyro.cli(
            kind,
            prog=prog,
            description=description,
            args=arguments,
            registry=OPTION_TYPES,
            config=PARSING,
        )
    except BrokenPipeError:  # of `vggt --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(COMPLETE)


def execute(command: Command) -> int:
    """Run a command; an error becomes a sentence on stderr and an exit code."""
    try:
        return command.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        return _report(command, error, BAD_INPUT)
    except (CommandError, OSError) as error:
        return _report(command, error, FAILED)
    except ModuleNotFoundError as error:
        name = error.name or ''
        if name.startswith(ROS_PARTS):
            return _report(command, CommandError('the package is not built with ROS 2'), FAILED)
        if name.startswith('vggt_ros.'):
            raise
        return _report(command, error, FAILED)
    except Exception as error:
        from vggt_ros.model.checkpoint import CheckpointError

        if not isinstance(error, CheckpointError):
            raise
        return _report(command, error, BAD_INPUT)


def _report(command: Command, error: Exception, code: int) -> int:
    sys.stderr.write(f'{command.name}: {error}\n')
    return code
