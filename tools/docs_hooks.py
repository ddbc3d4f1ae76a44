# SPDX-License-Identifier: Apache-2.0
"""
Make the pages of the documentation site that follow from the code; mkdocs calls the hooks.

- `<!-- table: parameters -->` (`launch`, `messages`) in a page becomes that table.
- README.md, CONTRIBUTING.md and CHANGELOG.rst become pages; files of the repository that a page
  links to become part of the site.
- Every module gets its place in the API reference, one page per stage of the data flow.

The code is parsed, never imported: neither ROS nor torch is needed.
"""

from __future__ import annotations

import ast
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
    'cli',
)
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


# --- What the code says -----------------------------------------------------------------------


def setting_groups() -> list[tuple[str, list[Parameter]]]:
    """List the settings dataclasses of the core, then of the node: docstring and parameters."""
    groups = []
    for path in (PACKAGE / 'settings.py', *sorted((PACKAGE / 'ros').glob('*.py'))):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and (found := list(_parameters(node))):
                groups.append((ast.get_docstring(node) or node.name, found))
    return groups


def _parameters(group: ast.ClassDef) -> Iterator[Parameter]:
    for node in group.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == 'setting'
        ):
            default, description = (ast.literal_eval(value) for value in node.value.args)
            more = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords}
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
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
            return node.value
    raise KeyError(f'{path} assigns nothing to {name}')


def launch_arguments() -> dict[str, tuple[str, str]]:
    """Return the arguments of the launch file: default and description."""
    table = assigned(ROOT / 'launch' / 'vggt.launch.py', 'ARGUMENTS')
    assert isinstance(table, ast.Dict)
    arguments = {}
    for key, value in zip(table.keys, table.values):
        assert key is not None and isinstance(value, ast.Tuple)
        default, description = value.elts
        try:
            text = str(ast.literal_eval(default))
        except ValueError:  # os.path.join(CONFIG, 'vggt.yaml')
            text = ast.literal_eval(default.args[-1])  # type: ignore[attr-defined]
        arguments[ast.literal_eval(key)] = (text, ast.literal_eval(description))
    return arguments


def message_fields(path: Path) -> tuple[str, list[MessageField]]:
    """Return what a message says of itself, and its fields."""
    about, section, comments, fields = '', '', [], []
    for line in path.read_text().splitlines():
        if line.startswith('# SPDX'):
            continue
        if match := re.match(r'# --- (.*) ---', line):
            section = match[1]
        elif line.startswith('#'):
            comments.append(line.lstrip('# '))
        elif line:
            kind, name = line.split()[:2]
            fields.append(MessageField(section, kind, name, ' '.join(comments)))
            comments = []
        elif not fields and not about:
            about, comments = '\n'.join(comments), []
    return about.strip(), fields


# --- Tables -----------------------------------------------------------------------------------


def table(name: str) -> str:
    """
    Write one of the tables.

    :raises KeyError: for another name.
    """
    return {'parameters': _parameter_table, 'launch': _launch_table, 'messages': _message_tables}[
        name
    ]()


def _parameter_table() -> str:
    lines = []
    for title, parameters in setting_groups():
        lines += ['', f'## {title.splitlines()[0].rstrip(".")}', '']
        for each in parameters:
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


def _message_tables() -> str:
    lines = []
    for path in sorted((ROOT / 'msg').glob('*.msg')):
        about, fields = message_fields(path)
        lines += [f'## vggt_ros/{path.stem}', '', _prose(about), '']
        section = None
        for each in fields:
            if each.section != section:
                section = each.section
                lines += ['', f'**{section}**' if section else '', '']
                lines += ['| field | type | meaning |', '|---|---|---|']
            lines.append(f'| `{each.name}` | `{each.type}` | {_prose(each.comment)} |')
        lines.append('')
    return '\n'.join(lines)


def _prose(text: str) -> str:
    """Escape what Markdown would take for markup: placeholders, tables, emphasis."""
    text = re.sub(r'(?<!`)(~?/?<[\w/]+>[\w/]*)', r'`\1`', text)
    return re.sub(r'\bdocs/(\w+)\.md', r'[\1](\1.md)', text).replace('|', '\\|')


def markdown_from_changelog(text: str) -> str:
    """Turn the reStructuredText that catkin writes (titles, lists, literals) into Markdown."""
    lines: list[str] = []
    for line in text.splitlines():
        if line and set(line) <= set('^=-~') and len(line) > 2:
            lines[-1] = {'^': '# ', '=': '# ', '-': '## ', '~': '### '}[line[0]] + lines[-1]
        elif not line.startswith('..'):
            lines.append(line.replace('``', '`'))
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
