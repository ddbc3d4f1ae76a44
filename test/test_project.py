# SPDX-License-Identifier: Apache-2.0
"""
Rules of the project: layout, import direction, names, declared dependencies, texts.

The files are read, not imported, except for the ROS parameters.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vggt_ros

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'vggt_ros'

# The data flow, first to last: a module imports only from its own part and from rows above.
FLOW = (
    {'settings', 'geometry', 'state_dict'},
    {'frames'},
    {'model'},
    {'inference'},
    {'mapping'},
    {'engine'},
    {'io'},
    {'offline', 'ros'},
    {'reconstructor'},
    {'viewer'},
    {'lab'},
    {'cli'},
)
WITH_ROS = {'ros', 'lab', 'viewer', 'cli'}

# Package names of modules, where they differ.
PACKAGE_NAMES = {
    'PIL': 'python3-pil',
    'cv2': 'python3-opencv',
    'matplotlib': 'python3-matplotlib',
    'numpy': 'python3-numpy',
    'tqdm': 'python3-tqdm',
    'yaml': 'python3-yaml',
}
GENERATED_FOLDERS = {
    'build',
    'install',
    'log',
    'dist',
    'demo_output',
    'bench_output',
    'training_output',
    'site',
    '__pycache__',
}
# Words for which robotics and vision have a term: image, frame set, trajectory, pose, index,
# predicted, measured, report, request, rotation, scale, layer, factor, held-out, criteria,
# degeneracy, subsample, estimator, valid, confident, stationary, candidate, improvement.
HOMESPUN_WORDS = frozenset(
    re.findall(
        r'\w+',
        'ask asked asks bear bears believe believed believes beyond complain complained complains '
        'demands foretold hang hangs heard hears judge judges keeper lives moment moments nobody '
        'notch notches offer offers picture pictures place placed places rounds said say says '
        'somebody standing stands stood stretch stretches sure sureness tell tells thin thinned '
        'tie tied ties told trust trusted turn turned turns unsure way ways weakness',
    )
)
SPDX_KINDS = {
    '.py',
    '.msg',
    '.yaml',
    '.yml',
    '.txt',
    '.toml',
    '.xml',
    '.rviz',
    '.svg',
    '.rst',
    '.cff',
}


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """List the files of the repository, without generated ones."""
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in GENERATED_FOLDERS
            and not name.endswith('.egg-info')
            and (name[0] != '.' or name == '.ci')
        ]
        found += (Path(folder) / name for name in files if name != '.git')  # of a worktree
    return tuple(sorted(found))


def python_files(*folders: Path) -> list[Path]:
    return [
        path
        for path in repository_files()
        if path.suffix == '.py' and (not folders or any(f in path.parents for f in folders))
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Return the dotted names of all imports of a file, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names.update(f'{module}.{alias.name}' for alias in node.names)
    return names


def part_of(path: Path) -> str:
    """Return the folder or module directly below the package that contains a file."""
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def parts_imported(path: Path) -> set[str]:
    dotted = (name.split('.') for name in imported_modules(path))
    return {words[1] for words in dotted if words[0] == 'vggt_ros' and len(words) > 1} - {
        '__version__'
    }


def package_dependencies() -> set[str]:
    root = ElementTree.parse(ROOT / 'package.xml').getroot()
    tags = {'depend', 'exec_depend'}
    return {element.text or '' for element in root if element.tag in tags}


def pip_dependencies() -> set[str]:
    """Return the dependencies, including those of the extras that the package imports."""
    text = (ROOT / 'pyproject.toml').read_text()
    names = 'dependencies|loops|int8|offline'
    blocks = re.findall(rf'^(?:{names}) = \[(.*?)\]', text, re.M | re.S)
    assert len(blocks) == 4
    return set(re.findall(r'"([\w-]+)', ''.join(blocks)))


def is_ros(module: str) -> bool:
    return module in package_dependencies() or module == 'tf2_ros'


def test_imports_follow_the_data_flow() -> None:
    rank = {part: row for row, parts in enumerate(FLOW) for part in parts}
    wrong = []
    for path in python_files(PACKAGE):
        part = part_of(path)
        if part in ('__init__', '__main__'):
            continue  # test_reconstructor checks that importing the former loads nothing
        assert part in rank, f'{name_of(path)}: vggt_ros/{part} is not in the data flow'
        for other in parts_imported(path) - {part}:
            if other == 'msg':
                if part not in WITH_ROS:
                    wrong.append(f'{name_of(path)} imports messages')
                continue
            assert other in rank, f'{name_of(path)} imports the unknown vggt_ros.{other}'
            if rank[other] >= rank[part]:
                wrong.append(f'{name_of(path)} imports vggt_ros.{other}')
    assert not wrong


def test_only_ros_lab_viewer_and_cli_import_ros() -> None:
    wrong = {
        f'{name_of(path)} imports {module}'
        for path in python_files(PACKAGE)
        if part_of(path) not in WITH_ROS
        for module in imported_modules(path)
        if is_ros(module.split('.')[0])
    }
    assert not wrong


def test_every_import_is_declared() -> None:
    declared = package_dependencies() | pip_dependencies()
    undeclared = {
        f'{name_of(path)} imports {module}'
        for path in python_files(PACKAGE, ROOT / 'launch')
        for module in (name.split('.')[0] for name in imported_modules(path))
        if module not in sys.stdlib_module_names
        and module != 'vggt_ros'
        and PACKAGE_NAMES.get(module, module) not in declared
    }
    assert not undeclared


def test_public_names_are_unique() -> None:
    modules: dict[str, list[str]] = {}
    for path in python_files(PACKAGE):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != '_':
                modules.setdefault(node.name, []).append(name_of(path))
    homonyms = {name: paths for name, paths in modules.items() if len(paths) > 1}
    assert homonyms.keys() <= {'main', 'parse'}, homonyms


def identifiers(path: Path) -> set[str]:
    """Return the names of a module, its classes, functions, parameters, attributes, variables."""
    names = set(path.relative_to(ROOT).with_suffix('').parts)
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case (
                ast.ClassDef(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.arg(arg=name)
                | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.Name(id=name, ctx=ast.Store())
            ):
                names.add(name)
    return names


def words_of(identifier: str) -> list[str]:
    """Split `snake_case` and `CamelCase`."""
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', identifier).lower().strip('_').split('_')


@pytest.mark.parametrize('path', python_files(PACKAGE), ids=name_of)
def test_identifiers_use_the_terms_of_the_field(path: Path) -> None:
    homespun = {name for name in identifiers(path) if HOMESPUN_WORDS.intersection(words_of(name))}
    assert not homespun


def test_no_module_mentions_pickle() -> None:
    modules = python_files(PACKAGE)
    assert not [name_of(path) for path in modules if 'pickle' in path.read_text().lower()]


def test_messages_declare_the_packages_they_use() -> None:
    for path in (ROOT / 'msg').glob('*.msg'):
        used = set(re.findall(r'^(\w+)/\w+', path.read_text(), re.M))
        assert used <= package_dependencies(), name_of(path)
        built = (ROOT / 'CMakeLists.txt').read_text()
        assert f'"msg/{path.name}"' in built
        assert all(f'find_package({name} REQUIRED)' in built for name in used)


@pytest.mark.parametrize('path', python_files(), ids=name_of)
def test_a_python_file_has_a_licence_and_a_docstring(path: Path) -> None:
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.startswith('#!')]
    assert lines and lines[0] == '# SPDX-License-Identifier: Apache-2.0'
    assert ast.get_docstring(ast.parse(text))


def test_files_name_the_licence() -> None:
    without = [
        name_of(path)
        for path in repository_files()
        if (path.suffix in SPDX_KINDS or path.name in ('Makefile', 'run', '.gitignore'))
        and 'SPDX-License-Identifier: Apache-2.0' not in path.read_text()[:300]
    ]
    assert not without


def test_no_file_contains_a_path_of_a_machine() -> None:
    pattern = re.compile(
        r'(?<![\w.~/-])/(?:wo' + r'rk|root|ho' + r'me|Users|opt/pyp' + r'i)/[\w.]'
    )
    named = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image or an array
        named += [f'{name_of(path)}: {match[0]}' for match in pattern.finditer(text)]
    assert not named


def test_the_version_agrees_with_package_xml() -> None:
    root = ElementTree.parse(ROOT / 'package.xml').getroot()
    assert root.findtext('version') == vggt_ros.__version__


def test_the_yaml_file_contains_every_parameter_with_its_default() -> None:
    pytest.importorskip('rclpy', reason='parameters are described with ROS messages')
    yaml = pytest.importorskip('yaml')
    from vggt_ros.ros.parameters import declared_settings, format_yaml

    text = (ROOT / 'config' / 'vggt.yaml').read_text()
    values = yaml.safe_load(text)['/**']['ros__parameters']
    assert values == {entry.name: entry.default for entry in declared_settings()}
    assert text == format_yaml(), 'run: python3 -m vggt_ros.ros.parameters > config/vggt.yaml'


def test_other_parameter_files_name_existing_parameters() -> None:
    pytest.importorskip('rclpy', reason='parameters are described with ROS messages')
    yaml = pytest.importorskip('yaml')
    from vggt_ros.ros.parameters import declared_settings

    known = {entry.name for entry in declared_settings()}
    for path in (ROOT / 'config').glob('*.yaml'):
        for node in yaml.safe_load(path.read_text()).values():
            assert set(node['ros__parameters']) <= known, name_of(path)
