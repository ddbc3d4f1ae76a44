# SPDX-License-Identifier: Apache-2.0
"""
README and docs keep their promises: snippets run, names exist, links lead somewhere.

Snippets of `RUN` are run, each in a folder of its own that holds `drive.mcap`, a bag of the demo's
camera; `frames` is a list of images. One with `<!-- not run: reason -->` above it is only checked,
like those of all other pages: syntax, options, launch arguments, targets of make.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import recordings_made as made

from vggt_ros.settings import all_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import docs_hooks  # noqa: E402

RUN = ('README.md', 'docs/quick_start.md')
PAGES = (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')))
BLOCK = re.compile(
    r'(?:^ *<!-- not run: (?P<reason>.+) -->\n)?'
    r'^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$',
    re.M | re.S,
)


class Snippet(NamedTuple):
    page: str
    number: int
    language: str
    code: str
    reason: str  # why it cannot run here; '' if it can

    def __str__(self) -> str:
        return f'{self.page}-{self.number}-{self.language}'


@functools.cache
def snippets() -> tuple[Snippet, ...]:
    return tuple(
        Snippet(
            name_of(path),
            number,
            match['language'],
            re.sub(rf'^{match["indent"]}', '', match['code'], flags=re.M),
            match['reason'] or '',
        )
        for path in PAGES
        for number, match in enumerate(BLOCK.finditer(path.read_text()), 1)
    )


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(first: str) -> Iterator[tuple[str, list[str]]]:
    """Give the words of every command of the shell snippets that begins with a word."""
    for snippet in snippets():
        if snippet.language == 'bash':
            for line in re.split(r'\n|&&|;', snippet.code.replace('\\\n', '')):
                words = shlex.split(line, comments=True)
                if words[:1] == [first]:
                    yield str(snippet), words[1:]


# --- Snippets run -----------------------------------------------------------------------------


FRAMES, HEIGHT, WIDTH, FOCAL = 16, 84, 112, 90.0  # frames, pixels


@pytest.fixture(scope='module')
def images() -> list[np.ndarray]:
    """Render what the demo's camera sends, smaller."""
    torch = pytest.importorskip('torch')
    from vggt_ros.lab.synthetic.render import render
    from vggt_ros.lab.synthetic.scene import SyntheticScene
    from vggt_ros.lab.synthetic.trajectories import smooth_trajectory

    scene, poses = SyntheticScene.room(0), smooth_trajectory(FRAMES, 0)
    matrix = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return [render(scene, pose[None], matrix[None], HEIGHT, WIDTH)[0][0].numpy() for pose in poses]


@pytest.fixture
def folder(tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    bag = made.write_bag(
        tmp_path / 'bag',
        {
            '/image_raw': [made.image_message(i, image) for i, image in enumerate(images)],
            '/camera_info': [made.info_message(i, image, FOCAL) for i, image in enumerate(images)],
        },
    )
    next(bag.glob('*.mcap')).rename(tmp_path / 'drive.mcap')
    command = tmp_path / 'bin' / 'vggt'  # as pip installs it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vggt_ros "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv('PATH', str(command.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The same code on two pages runs once.
RUNNING = list(
    {
        each.code: each for each in reversed(snippets()) if each.page in RUN and not each.reason
    }.values()
)


@pytest.mark.parametrize(
    'snippet', [each for each in RUNNING if each.language == 'python'], ids=str
)
def test_python_snippet_runs(
    snippet: Snippet, folder: Path, images: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(snippet.code, str(snippet), 'exec'), {'frames': images})
    if 'scene.save' in snippet.code:
        assert (folder / 'drive_map' / 'trajectory.tum').stat().st_size
    if 'print' in snippet.code:
        assert capsys.readouterr().out


@pytest.mark.parametrize('snippet', [each for each in RUNNING if each.language == 'bash'], ids=str)
def test_shell_snippet_runs(snippet: Snippet, folder: Path) -> None:
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', snippet.code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for _, words in commands('vggt'):
        if words[0] == 'reconstruct' and str(snippet) == _:
            output = folder / words[words.index('--output') + 1]
            assert (output / 'trajectory.tum').stat().st_size


def test_readme_shows_both_front_doors_and_they_run() -> None:
    ran = [each for each in RUNNING if each.page == 'README.md']
    assert any('from vggt_ros import Reconstructor' in each.code for each in ran)
    assert any(each.code.startswith('vggt reconstruct') for each in ran)


# --- Snippets are checked ---------------------------------------------------------------------


def test_every_snippet_names_its_language() -> None:
    known = {'bash', 'python', 'yaml', 'bibtex', 'text'}
    assert not [str(each) for each in snippets() if each.language not in known]


def test_syntax_of_every_snippet() -> None:
    for snippet in snippets():
        if snippet.language == 'python':
            compile(snippet.code, str(snippet), 'exec')
        if snippet.language == 'bash':
            done = subprocess.run(['bash', '-n', '-c', snippet.code], capture_output=True)
            assert done.returncode == 0, (str(snippet), done.stderr)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M))
    mentioned = {words[0] for _, words in commands('make')}
    for path in PAGES:
        mentioned |= set(re.findall(r'`make ([\w-]+)', path.read_text()))
    assert mentioned
    assert mentioned <= targets


def test_launch_files_and_their_arguments_exist() -> None:
    known = docs_hooks.launch_arguments()
    seen = 0
    for page, (verb, *words) in commands('ros2'):
        if verb == 'launch' and words[0] == 'vggt_ros':
            assert (ROOT / 'launch' / words[1]).is_file(), page
            given = {word.partition(':=')[0] for word in words[2:] if ':=' in word}
            assert given <= set(known), page
            seen += 1
    assert seen


def test_ros_executables_exist() -> None:
    installed = set(re.findall(r'RENAME (\w+)', (ROOT / 'CMakeLists.txt').read_text()))
    text = ''.join(path.read_text() for path in PAGES)
    assert set(re.findall(r'ros2 run vggt_ros (\w+)', text)) <= installed


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, '-m', *command, '--help'], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_commands_and_their_options_exist() -> None:
    seen = 0
    for page, words in commands('vggt'):
        check_options(page, ('vggt_ros', words[0]), words[1:])
        seen += 1
    for page, words in commands('python'):
        modules = [word for word in words if word.startswith('vggt_ros.')]
        for module in modules:
            check_options(page, (module,), words[words.index(module) + 1 :])
    assert seen


def check_options(page: str, command: tuple[str, ...], words: list[str]) -> None:
    known = set(re.findall(r'--[\w-]+', help_of(command)))
    given = {word for word in words if word.startswith('--')}
    assert given <= known, (page, command, given - known)


# --- Names and links --------------------------------------------------------------------------


def test_files_that_pages_name_exist() -> None:
    pattern = re.compile(r'`((?:vggt_ros|test|tools|config|launch|msg|docs)/[\w./-]*)`')
    missing = {
        f'{name_of(path)}: {name}'
        for path in PAGES
        for name in pattern.findall(path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_pages_that_the_code_names_exist() -> None:
    sources = [
        *(ROOT / 'vggt_ros').rglob('*.py'),
        *(ROOT / 'msg').glob('*.msg'),
        *(ROOT / 'config').glob('*.yaml'),
    ]
    missing = {
        f'{name_of(path)}: {name}'
        for path in sources
        for name in re.findall(r'\bdocs/[\w/]+\.\w+', path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def anchors(path: Path) -> set[str]:
    text = docs_hooks.on_page_markdown(path.read_text()) if path.suffix == '.md' else ''
    titles = re.findall(r'^#+ (.*)$', text, re.M)
    return {
        re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', title.lower())).strip('-')
        for title in titles
    }


def test_links_lead_to_files_and_titles() -> None:
    broken = []
    for path in PAGES:
        for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
            if link.startswith(('https://', 'api/')):  # the API reference is made by mkdocs
                continue
            file, _, anchor = link.partition('#')
            target = (path.parent / file).resolve() if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f'{name_of(path)}: {link}')
    assert not broken


def test_navigation_of_the_site_has_every_page() -> None:
    nav = (ROOT / 'mkdocs.yml').read_text().partition('nav:')[2].partition('hooks:')[0]
    listed = set(re.findall(r'([\w/]+\.md)', nav))
    written = {path.name for path in (ROOT / 'docs').glob('*.md')}
    assert listed == written | set(docs_hooks.PAGES)


def test_api_reference_has_every_module() -> None:
    pages = ''.join(docs_hooks.api_page(stage) for stage in docs_hooks.STAGES)
    listed = set(re.findall(r'^::: (.*)$', pages, re.M))
    modules = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in (ROOT / 'vggt_ros').rglob('*.py')
        if not path.name.startswith('__')
    }
    assert listed - {'vggt_ros'} == modules


def test_docstrings_name_parameters_that_exist() -> None:
    """The site cannot be built otherwise: a warning of the API reference is an error."""
    wrong = []
    for path in (ROOT / 'vggt_ros').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given += [each for each in (node.args.vararg, node.args.kwarg) if each]
                documented = re.findall(r':param (\w+):', ast.get_docstring(node) or '')
                unknown = set(documented) - {each.arg for each in given}
                wrong += [f'{name_of(path)}: {node.name}: {name}' for name in unknown]
    assert not wrong


# --- Tables follow from the code --------------------------------------------------------------


def documented() -> dict[str, docs_hooks.Parameter]:
    return {each.name: each for group in docs_hooks.setting_groups() for each in group.parameters}


def test_parameter_table_is_what_the_core_declares() -> None:
    table = documented()
    for entry in all_settings():
        row = table[entry.name]
        assert (row.default, row.description) == (entry.default, entry.metadata['description'])
        ranges = (row.low, row.high, row.choices)
        assert ranges == tuple(entry.metadata[key] for key in ('low', 'high', 'choices'))


def test_parameter_table_is_what_the_node_declares() -> None:
    pytest.importorskip('rclpy', reason='parameters are described with ROS messages')
    from vggt_ros.ros.parameters import declared_settings

    assert list(documented()) == [entry.name for entry in declared_settings()]
    for entry in declared_settings():
        assert documented()[entry.name].default == entry.default


def test_key_parameters_of_the_readme_have_their_defaults() -> None:
    table = (ROOT / 'README.md').read_text().partition('## Ten key parameters')[2]
    rows = re.findall(r'^\| `(\w+)` \| `(.*?)` \|', table.partition('\n## ')[0], re.M)
    assert len(rows) == 10
    for name, default in rows:
        value = documented()[name].default
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        assert shown == default, name


def interface_rows() -> dict[str, str]:
    """Return the type of each topic and service that the page of the ROS interface lists."""
    page = (ROOT / 'docs' / 'ros_interface.md').read_text().partition('\n## Frames')[0]
    rows = re.findall(r'^\| (`[^|]+) \| ([^|]+) \|', page, re.M)
    return {topic: kind for cell, kind in rows for topic in re.findall(r'`([^`]+)`', cell)}


def test_interface_lists_every_topic_and_service() -> None:
    from vggt_ros.io import names

    other = {'NODE', 'TRUTH'}  # of the synthetic camera
    named = {
        value
        for key, value in vars(names).items()
        if key.isupper() and not key.endswith('_FRAME') and key not in other
    }
    assert set(interface_rows()) == named | {names.compressed_topic(names.IMAGE)}


def test_interface_has_the_types_that_are_published() -> None:
    path = ROOT / 'vggt_ros' / 'ros' / 'publish.py'
    table: Any = docs_hooks.assigned(path, 'TOPICS')
    for key, kind in zip(table.keys, table.values):
        topic = docs_hooks.evaluate(key, path)
        assert interface_rows()[topic].rpartition('/')[2] == kind.id, topic


def test_readme_topics_exist() -> None:
    text = (ROOT / 'README.md').read_text().partition('## Topics')[2].partition('\n## ')[0]
    cells = re.findall(r'^\| (`[^|]+) \|', text, re.M)
    assert cells
    assert {topic for cell in cells for topic in re.findall(r'`([^`]+)`', cell)} <= set(
        interface_rows()
    )


def test_command_table_is_what_the_help_says() -> None:
    for command in docs_hooks.console_commands():
        flags = {flag for flag, _, _ in command.options if re.fullmatch(r'--[\w-]+', flag)}
        assert flags <= set(re.findall(r'--[\w-]+', help_of(('vggt_ros', command.name))))
        assert command.description


def test_message_tables_have_every_field() -> None:
    pytest.importorskip('rclpy', reason='messages are built with ROS')
    messages: Any = pytest.importorskip('vggt_ros.msg', reason='messages are not built')
    paths = sorted((ROOT / 'msg').glob('*.msg'))
    assert paths
    for path in paths:
        _, fields = docs_hooks.message_fields(path)
        declared = getattr(messages, path.stem).get_fields_and_field_types()
        assert [each.name for each in fields] == list(declared)


def test_changelog_becomes_a_page() -> None:
    page = docs_hooks.page_from_repository('CHANGELOG.rst')
    assert page.lstrip().startswith('# Changelog for package vggt_ros\n')
    assert '\n## Forthcoming\n' in page
    assert '``' not in page
    assert not re.search(r'^[\^~=-]{3,}$', page, re.M)
