# SPDX-License-Identifier: Apache-2.0
"""The command `vggt`: one help, the options of before, exit codes, quick start-up."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_args

import pytest

from vggt_ros.cli.command import Command, CommandError, execute
from vggt_ros.cli.main import COMMANDS, main
from vggt_ros.cli.parity import FullCase
from vggt_ros.cli.reconstruct import Reconstruct
from vggt_ros.cli.train import Recipe
from vggt_ros.lab.demo import DemoError, Processes
from vggt_ros.model.checkpoint import CheckpointError
from vggt_ros.settings import Settings, all_settings

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = {command.name: command for command in COMMANDS}
INPUT = ['drive.mcap', '--output', 'drive_map']

# Command lines of scripts and docs, as the argparse commands accepted them.
ACCEPTED = [
    'reconstruct drive.mcap --output drive_map --checkpoint facebook/VGGT-1B',
    "reconstruct 'shots/*.jpg' --output room --all-at-once",
    'reconstruct a.mcap b.mcap c.mp4 --output maps --jobs 2',
    'reconstruct --output maps --no-images --voxel 0.02 --cloud-points 1000 a.mcap',
    'reconstruct a --output b --topic /image --rate 5 --every 2 --refine --to-bag c.mcap',
    'reconstruct a --output b --restart --overwrite --no-rectify --loop-closure --rate=2.5',
    'view drive_map --follow --host 0.0.0.0 --port 9000',
    'view --node /vggt --image-topic /camera/image_raw',
    'evaluate --synthetic --seed 1 --windows 200 --frames 8 --width 112 --json out.json',
    'evaluate --recording rgbd_dataset --output figures --step 2 --loop-closure',
    'evaluate --sequence all --model truth --noise 1,0.3,1 --anchor-windows 2 --drop-window 3',
    'evaluate --sequence all --model embedded --device cpu',
    'train --folder out --recipe fine_tune --checkpoint facebook/VGGT-1B --width 518 --data a b',
    'train --folder out --windows 1000 --until 10 --batch 2 --frames 2 4 --learning-rate 1e-4',
    'train --folder out --size 84 112 --seed 3 --device cuda:1',
    'bench --size vggt_1b --frames 4 8 --stride 1 4 --resolution 112x84 392x294 --windows 2',
    'bench --device cpu --precision float32 --compile --json out.json --plot out.png',
    'bench-node --seconds 6 --only own --json out.json',
    'parity --golden DIR --full DIR --full-cases F140x182 F294x518 --json out.json --threads 2',
    'demo --frames 60 --size 320x240 --rate 10 --seed 1 --output a.png --quiet 5 --timeout 600',
    'demo --checkpoint untrained',
    "embed-weights best.pt --image-width 112 --training 'one run' --trained-on rooms --folder a",
    'plot-training curve.csv --output curve.png',
    'contact-sheet a.png --windows 4 --frames 2 --split test --seed 1 --height 84 --width 112',
    'ablate --model embedded --device cpu --seed 2 --windows 10 --frames 4 --int8',
]


@pytest.mark.parametrize('line', ACCEPTED)
def test_options_of_before_are_accepted(line: str) -> None:
    name, *arguments = shlex.split(line)
    assert isinstance(BY_NAME[name].parse(arguments), BY_NAME[name])


def test_every_command_has_an_accepted_line() -> None:
    assert {line.split()[0] for line in ACCEPTED} == set(BY_NAME)


def test_the_last_of_repeated_options_counts() -> None:
    """`make train-small ARGS='--folder ...'` relies on it."""
    parsed = Reconstruct.parse([*INPUT, '--voxel', '1', '--voxel', '2'])
    assert parsed.voxel == 2


def test_one_help_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert [name for name in BY_NAME if f'• {name}' not in text] == []


def test_the_help_of_a_command_has_examples_and_settings(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(['reconstruct', '--help'])
    text = capsys.readouterr().out
    assert 'vggt reconstruct a.mcap b.mcap c.mp4 --output maps --jobs 2' in text
    for entry in all_settings():
        assert f'--{entry.name.replace("_", "-")}' in text, entry.name


def test_help_imports_neither_torch_nor_ros() -> None:
    lines = [['--help'], *([name, '--help'] for name in BY_NAME)]
    code = f"""
import sys
from vggt_ros.cli.main import main
for line in {lines}:
    try:
        main(line)
    except SystemExit as ended:
        assert ended.code == 0, line
slow = {{'torch', 'cv2', 'rclpy', 'matplotlib', 'rich'}} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.DEVNULL)


def test_help_into_a_closed_pipe_is_no_error() -> None:
    line = [sys.executable, '-m', 'vggt_ros', 'reconstruct', '--help']
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.close()  # as `head` does
    assert child.stderr is not None and child.stderr.read() == ''
    assert child.wait() == 0


def test_commands_are_there_without_ros() -> None:
    """As where pip installs: without the parts that need ROS."""
    code = """
import sys

class WithoutRos:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(('vggt_ros.ros', 'vggt_ros.lab.node', 'vggt_ros.msg', 'rclpy')):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, WithoutRos())
from vggt_ros.cli.main import main
assert main(['bench-node']) == 1
main(['--help'])
"""
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ended.returncode == 0
    assert ended.stderr == 'bench-node: the package is not built with ROS 2\n'


def other_value(entry) -> tuple[list[str], object]:
    """Return the option and the value of a setting that is not its default."""
    flag = '--' + entry.name.replace('_', '-')
    if isinstance(entry.default, bool):
        return [flag.replace('--', '--no-' if entry.default else '--', 1)], not entry.default
    if entry.metadata['choices']:
        value = next(each for each in entry.metadata['choices'] if each != entry.default)
        return [flag, value], value
    if isinstance(entry.default, str):
        return [flag, 'another'], 'another'
    value = entry.default + 14 if isinstance(entry.default, int) else entry.default + 0.5
    return [flag, str(value)], value


@pytest.mark.parametrize('entry', all_settings(), ids=lambda entry: entry.name)
def test_every_setting_is_an_option_of_reconstruct(entry) -> None:
    option, value = other_value(entry)
    parsed = Reconstruct.parse([*INPUT, *option]).settings
    assert parsed == {**{each.name: each.default for each in all_settings()}, entry.name: value}


def test_settings_that_are_not_given_keep_their_defaults() -> None:
    assert Settings.from_flat(Reconstruct.parse(INPUT).settings) == Settings()


@pytest.mark.parametrize(
    ('line', 'error'),
    [
        ('reconstruct a --output b --window-size 1', 'window_size is 1, expected at least 2'),
        ('reconstruct a --output b --window-size 3', 'window_stride is 4, expected less than'),
        ('reconstruct --output b', 'no input is given; expected a bag'),
        ('reconstruct a b --output c --to-bag d.mcap', '--to-bag is for a single input'),
        ('reconstruct a --output b --every 0', '--every is 0'),
        ('reconstruct a --output b --rate 0', '--rate 0; expected more than 0'),
        ('evaluate --synthetic --model truth', '--model truth is for --sequence'),
        ('train --folder a --width 112', '--width is for --data'),
        ('bench --resolution 640x480', "found '640x480', expected WIDTHxHEIGHT"),
        ('demo --size large', "--size is 'large', expected WIDTHxHEIGHT"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    line: str, error: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(shlex.split(line)) == 2
    text = capsys.readouterr().err
    assert text.startswith(f'{line.split()[0]}: ') and error in text and text.count('\n') == 1


@pytest.mark.parametrize(
    'line',
    [
        '',
        'nothing',
        'reconstruct a',
        'reconstruct a --output b --window-sise 8',
        'reconstruct a --output b --fit wide',
        'reconstruct a --output b --window-size many',
        'evaluate',
        'evaluate --synthetic --sequence loop',
        'evaluate --sequence nowhere',
    ],
)
def test_what_cannot_be_parsed_is_exit_code_2(line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.err and not output.out


class Failing(Command):
    """Fails as it is told to."""

    name: ClassVar[str] = 'failing'

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self) -> int:
        raise self.error


@pytest.mark.parametrize(
    ('error', 'code'),
    [
        (ValueError('the reason'), 2),
        (CheckpointError('the reason'), 2),
        (CommandError('the reason'), 1),
        (OSError('the reason'), 1),
        (ModuleNotFoundError('the reason', name='rclpy'), 1),
    ],
)
def test_failures_are_one_sentence_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture
) -> None:
    assert execute(Failing(error)) == code
    assert capsys.readouterr().err == 'failing: the reason\n'


def test_an_interruption_is_exit_code_130() -> None:
    assert execute(Failing(KeyboardInterrupt())) == 130


@pytest.mark.parametrize(
    'error', [RuntimeError(), ModuleNotFoundError('gone', name='vggt_ros.gone')]
)
def test_errors_of_the_program_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        execute(Failing(error))


@pytest.mark.parametrize(
    'module', ['vggt_ros reconstruct', 'vggt_ros.cli.main reconstruct', 'vggt_ros.cli.reconstruct']
)
def test_modules_are_commands(module: str) -> None:
    line = f'-m {module} nothing --output map --window-size 1'
    ended = subprocess.run(
        [sys.executable, *line.split()], stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith('reconstruct: ') and ended.stderr.count('\n') == 1


def test_other_modules_keep_their_options() -> None:
    for module in ('evaluate', 'benchmark', 'view', 'train', 'parity', 'demo'):
        ended = subprocess.run(
            [sys.executable, '-m', f'vggt_ros.cli.{module}', '--help'],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert '--' in ended.stdout


def test_choices_are_those_of_the_laboratory() -> None:
    from vggt_ros.cli.evaluate import SequenceName
    from vggt_ros.cli.train import Split
    from vggt_ros.lab.synthetic.trajectories import SEQUENCES
    from vggt_ros.lab.synthetic.windows import SPLITS
    from vggt_ros.lab.training.recipes import HEIGHT, RECIPES, WIDTH

    assert set(get_args(Recipe)) == set(RECIPES)
    assert set(get_args(SequenceName)) == {*SEQUENCES, 'all'}
    assert set(get_args(Split)) == set(SPLITS)
    assert len(get_args(FullCase)) == 3
    assert f'{HEIGHT} {WIDTH} if not given' in (ROOT / 'vggt_ros/cli/train.py').read_text()


def test_installed_programs_exist_and_can_be_executed() -> None:
    text = (ROOT / 'CMakeLists.txt').read_text()
    programs = {
        name: path
        for path, name in re.findall(r'PROGRAMS (\S+)\s+DESTINATION \S+ RENAME (\w+)', text)
    }
    assert {'vggt', 'reconstruct', 'view'} <= set(programs)
    for path in programs.values():
        assert os.access(ROOT / path, os.X_OK), path
        assert (ROOT / path).read_text().startswith('#!/usr/bin/env python3\n'), path


def test_the_demo_reports_a_process_that_fails() -> None:
    processes = Processes()
    processes.start('camera', 'vggt_ros.no_such_module')
    processes.start('recorder', 'timeit', '-n', '1', '-r', '1', 'import time; time.sleep(60)')
    try:
        with pytest.raises(DemoError, match='the camera ended with code 1'):
            processes.wait_for('recorder', 30.0)
    finally:
        processes.stop()
    assert processes.returncode('recorder') != 0
