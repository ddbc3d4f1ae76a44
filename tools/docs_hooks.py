# SPDX-License-Identifier: Apache-2.0
"""
Make the pages of the documentation site that follow from the code; mkdocs calls the hooks.

- `<!-- table: parameters -->` (`commands`, `launch`, `messages`) in a page becomes that table.
- README.md, CONTRIBUTING.md and CHANGELOG.rst become pages; files of the repository that a page
  links to become part of the site.
- Every module is in the API reference, one page per stage of the data flow.

The code is parsed, never imported: neither ROS nor torch is needed.
"""

from __future__ import annotations

import ast
import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'vggt_ros'

# Page of the site -> file of the repository that it is made from.
PAGES = {
    'index.md': 'README.md',
    'contributing.md': 'CONTRIBUTING.md',
    'changelog.md': 'CHANGELOG.rst',
}
# The stages in the order of the data flow: the pages of the API reference.
STAGES = (
    'settings',
    'state_dict',
    'geometry',
    'frames',
    'model',
    'inference',
    'mapping',
    'engine',
    'io',
    'offline',
    'ros',
    'viewer',
    'lab',
    'reconstructor',
    'cli',
)
# What underlines a title of reStructuredText -> its Markdown.
_TITLES = {'^': '#', '=': '#', '-': '##', '~': '###'}
_LINK = re.compile(r'(\]\()(\.\./)?([\w./-]+)((?:#[\w-]*)?\))')


class Parameter(NamedTuple):
    """One setting, as the code declares it."""

    name: str
    default: Any
    description: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]


class MessageField(NamedTuple):
    """One field of a message, with the comment above it and the section that it is in."""

    section: str
    type: str
    name: str
    comment: str


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


# --- What the code declares -------------------------------------------------------------------


class SettingGroup(NamedTuple):
    """The settings that one step of the pipeline reads."""

    name: str
    description: str
    parameters: list[Parameter]


@functools.cache
def setting_groups() -> list[SettingGroup]:
    """List the settings dataclasses, those of the core, then those of the node."""
    groups = []
    for path in (PACKAGE / 'settings.py', *sorted((PACKAGE / 'ros').glob('*.py'))):
        for node in _tree(path).body:
            if isinstance(node, ast.ClassDef) and (found := list(_parameters(node, path))):
                name = node.name.removesuffix('Settings')
                groups.append(SettingGroup(name, ast.get_docstring(node) or '', found))
    return groups


def _parameters(group: ast.ClassDef, path: Path) -> Iterator[Parameter]:
    for node in group.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == 'setting'
        ):
            default, description = (evaluate(value, path) for value in node.value.args)
            more = {word.arg: evaluate(word.value, path) for word in node.value.keywords}
            yield Parameter(
                node.target.id,
                default,
                description,
                more.get('low'),
                more.get('high'),
                more.get('choices', ()),
            )


def assigned(path: Path, name: str) -> ast.expr:
    """
    Return the expression that a module assigns to a name.

    :raises KeyError: if it assigns none.
    """
    for node in _tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
            return node.value
    raise KeyError(f'{path} assigns nothing to {name}')


class _Constants(ast.NodeTransformer):
    """Replaces names by the constants that they stand for, also imported ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('vggt_ros')
            for alias in node.names
        }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        module, name = self._imports.get(node.id, (None, node.id))
        path = self._path if module is None else _file_of(module)
        return ast.Constant(evaluate(assigned(path, name), path))

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        assert isinstance(node.value, ast.Name)
        path = _file_of('.'.join(map(str, self._imports[node.value.id])))
        return ast.Constant(evaluate(assigned(path, node.attr), path))


def _file_of(module: str) -> Path:
    return ROOT.joinpath(*module.split('.')).with_suffix('.py')


def evaluate(expression: ast.expr, path: Path) -> Any:
    """
    Return the value of a literal, which may hold names of constants.

    :param path: of its module.
    """
    return ast.literal_eval(_Constants(path).visit(copy.deepcopy(expression)))


def launch_arguments() -> dict[str, tuple[str, str]]:
    """Return the arguments of the launch file: default and description."""
    path = ROOT / 'launch' / 'vggt.launch.py'
    table = assigned(path, 'ARGUMENTS')
    assert isinstance(table, ast.Dict)
    arguments = {}
    for key, value in zip(table.keys, table.values):
        assert key is not None and isinstance(value, ast.Tuple)
        default, description = value.elts
        if isinstance(default, ast.Call):  # os.path.join(CONFIG, 'vggt.yaml')
            default = default.args[-1]
        arguments[evaluate(key, path)] = (evaluate(default, path), evaluate(description, path))
    return arguments


def message_fields(path: Path) -> tuple[str, list[MessageField]]:
    """Return the description of a message, and its fields."""
    about, section, comments, fields = '', '', [], []
    for line in path.read_text().splitlines():
        if line.startswith('# SPDX'):
            continue
        if match := re.match(r'# --- (.*) ---', line):
            section = match[1]
        elif line.startswith('#'):
            comments.append(line.lstrip('# '))
        elif line:
            declared, _, comment = line.partition('#')
            kind, name = declared.split()[:2]
            comments += [comment.strip()] if comment else []
            fields.append(MessageField(section, kind, name, ' '.join(comments)))
            comments = []
        elif not fields and not about:
            about, comments = '\n'.join(comments), []
    return about.strip(), fields


class ConsoleCommand(NamedTuple):
    """One command of `vggt`: a dataclass in `vggt_ros/cli/`."""

    name: str
    description: str
    options: list[tuple[str, str, str]]
    """Name, default and description of each; no default: required."""


def console_commands() -> list[ConsoleCommand]:
    """List the commands in the order of `COMMANDS`."""
    main = PACKAGE / 'cli' / 'main.py'
    order = [ast.unparse(each) for each in assigned(main, 'COMMANDS').elts]  # type: ignore[attr-defined]
    found = {
        node.name: _console_command(node)
        for path in sorted((PACKAGE / 'cli').glob('*.py'))
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef) and node.name in order
    }
    return [found[name] for name in order]


def _console_command(node: ast.ClassDef) -> ConsoleCommand:
    options = []
    name = ''
    for entry, after in zip(node.body, [*node.body[1:], None]):
        if not isinstance(entry, ast.AnnAssign) or not isinstance(entry.target, ast.Name):
            continue
        kind = ast.unparse(entry.annotation)
        if kind.startswith('ClassVar'):
            if entry.target.id == 'name' and isinstance(entry.value, ast.Constant):
                name = str(entry.value.value)
            continue
        text = ''
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = ' '.join(str(after.value.value).split())
        flag = entry.target.id.replace('_', '-')
        flag = flag.upper() if 'Positional' in kind else f'--{flag}'
        if 'SettingValues' in kind:
            flag, text = '--<setting>', 'Every setting of the core, see docs/parameters.md'
        options.append((flag, _option_default(entry.value), text))
    return ConsoleCommand(name, ast.get_docstring(node) or '', options)


def _option_default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Constant):
        return '' if value.value is None or value.value is False else str(value.value)
    if isinstance(value, ast.Call) and value.args:  # Path('curve.png')
        return _option_default(value.args[0])
    if isinstance(value, ast.Tuple):
        return ' '.join(map(_option_default, value.elts))
    return ''


# --- Tables -----------------------------------------------------------------------------------


def table(name: str) -> str:
    """
    Write one of the tables.

    :raises KeyError: for another name.
    """
    tables = {
        'parameters': _parameter_table,
        'commands': _command_table,
        'launch': _launch_table,
        'messages': _message_tables,
    }
    return tables[name]()


def _parameter_table() -> str:
    lines = []
    for group in setting_groups():
        lines += ['', f'## {group.name}', '', group.description, '']
        for each in group.parameters:
            lines += [
                f'### `{each.name}` {{ #{each.name} }}',
                '',
                f'default `{_yaml(each.default)}`{_range(each)}',
                '',
                _prose(each.description),
                '',
            ]
    return '\n'.join(lines)


def _range(each: Parameter) -> str:
    if each.choices:
        return '; one of ' + ', '.join(f'`{choice}`' for choice in each.choices)
    if each.low is not None and each.high is not None:
        return f'; {each.low} to {each.high}'
    if each.low is not None:
        return f'; at least {each.low}'
    return '' if each.high is None else f'; at most {each.high}'


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    return f"'{value}'" if isinstance(value, str) else repr(value)


def _launch_table() -> str:
    rows = [
        f'| `{name}` | {f"`{default}`" if default else ""} | {_prose(description)} |'
        for name, (default, description) in launch_arguments().items()
    ]
    return '\n'.join(['| argument | default | meaning |', '|---|---|---|', *rows])


def _command_table() -> str:
    lines = []
    for command in console_commands():
        lines += ['', f'## vggt {command.name}', '', command.description, '']
        lines += ['| option | default | meaning |', '|---|---|---|']
        lines += [
            f'| `{flag}` | {f"`{default}`" if default else ""} | {_prose(text)} |'
            for flag, default, text in command.options
        ]
    return '\n'.join(lines)


def _message_tables() -> str:
    lines = []
    for path in sorted((ROOT / 'msg').glob('*.msg')):
        about, fields = message_fields(path)
        lines += [f'## vggt_ros/{path.stem}', '', _prose(about), '']
        section = None
        for each in fields:
            if each.section != section:
                section = each.section
                lines += ['', f'**{_prose(section)}**' if section else '', '']
                lines += ['| field | type | meaning |', '|---|---|---|']
            lines.append(f'| `{each.name}` | `{each.type}` | {_prose(each.comment)} |')
        lines.append('')
    return '\n'.join(lines)


def _prose(text: str) -> str:
    """Escape what Markdown would take for markup: placeholders, tables, emphasis."""
    text = re.sub(r'(?<!`)(~?/?<[\w/]+>[\w/]*)', r'`\1`', text)
    text = re.sub(r'\bdocs/(\w+)\.md', r'[\1](\1.md)', text)
    return re.sub(r'([|*])', r'\\\1', text)


def markdown_from_changelog(text: str) -> str:
    """Turn the reStructuredText that catkin writes (titles, lists, literals) into Markdown."""
    lines: list[str] = []
    for line in text.splitlines():
        if len(line) > 2 and line[0] in _TITLES and set(line) == {line[0]}:
            if lines and lines[-1]:  # not the line above a title
                lines[-1] = f'{_TITLES[line[0]]} {lines[-1]}'
        elif not line.startswith('..'):
            indent = len(line) - len(line.lstrip())
            lines.append(' ' * indent + line.replace('``', '`'))  # lists nest by four spaces
    return '\n'.join(lines)


# --- What mkdocs calls ------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Append the API reference to the navigation."""
    config.nav.append({'API reference': [f'api/{stage}.md' for stage in STAGES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and files of the repository that pages link to."""
    from mkdocs.structure.files import File

    def add(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    for uri, source in PAGES.items():
        add(uri, page_from_repository(source))
    for stage in STAGES:
        add(f'api/{stage}.md', api_page(stage))
    for page in list(files.documentation_pages()):
        for target in repository_links(page.content_string):
            if files.get_file_from_path(target) is None:
                path = str(ROOT / target)
                files.append(File.generated(config, target, abs_src_path=path))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables in, and let links to files of the repository point into the site."""
    made = re.sub(r'<!-- table: (\w+) -->', lambda match: table(match[1]), markdown)
    return _LINK.sub(lambda match: match[1] + match[3] + match[4], made)


def repository_links(markdown: str) -> set[str]:
    """Find the files of the repository, outside of docs/, that a page links to."""
    return {match[3] for match in _LINK.finditer(markdown) if match[2]}


def page_from_repository(source: str) -> str:
    """Read a text of the repository as a page: its links start at the repository's root."""
    text = (ROOT / source).read_text()
    if source.endswith('.rst'):
        return markdown_from_changelog(text)
    made = {file: page for page, file in PAGES.items()}

    def moved(match: re.Match[str]) -> str:
        target = match[3]
        if target in made:
            target = made[target]
        elif target.startswith('docs/'):
            target = target.removeprefix('docs/')
        else:
            target = f'../{target}'
        return match[1] + target + match[4]

    return _LINK.sub(moved, text)


def api_page(stage: str) -> str:
    """Write the page of one stage: its own docstring, then its modules in order of name."""
    folder = PACKAGE / stage
    if not folder.is_dir():
        return f'# {stage}\n\n::: vggt_ros.{stage}\n'
    docstring = ast.get_docstring(ast.parse((folder / '__init__.py').read_text())) or ''
    lines = [f'# {stage}', '', docstring, '']
    for path in sorted(folder.rglob('*.py')):
        module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        if path.name == '__init__.py' or path.name == '__main__.py':
            continue
        lines += [f'::: {module}', '']
    return '\n'.join(lines)
