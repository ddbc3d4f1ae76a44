#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Figures of the code: size, structure and language, of this tree or of another one.

    python3 tools/code_figures.py [ROOT]

- modules and lines of the package, lines of functions (median and 90th percentile);
- modules below 60 lines, and modules below 60 lines with exactly one importer;
- public homonyms: a class or function name that two or more modules define for themselves;
- stateful classes of the core: those with a method other than `__init__` that assigns or deletes
  an attribute of `self`, or part of one, or calls a mutating method of one;
- words that are not terms of the field, as whole words of identifiers and texts, in code
  (Python, messages, configuration) and documents.

Standard library only.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

# Words of no technical meaning here that texts and names should avoid; `round` only as a noun.
WORDS = re.findall(
    r'\w+',
    'moment moments way ways place placed places told tell tells said say says turn turns turned '
    'shift shifts shifted stretch stretches rounds tie ties tied joint joints joined foretold '
    'judge judges gain weakness whynot demands thin thinned keeper believed believe believes '
    'unsure sure sureness trusted trust stands standing stood bears bear picture pictures notch '
    'notches beyond complain complains complained asked asks heard hears lives somebody nobody '
    'hangs hang hung offer offers',
)
MUTATORS = {
    *('add', 'append', 'clear', 'discard', 'extend', 'insert', 'pop', 'popleft', 'remove'),
    *('setdefault', 'update'),
}
OUTSIDE_THE_CORE = {'cli', 'evaluation', 'io', 'lab', 'offline', 'ros', 'synthetic', 'training'}
OUTSIDE_THE_CORE |= {'viewer', 'msg'}
SMALL = 60  # lines
SKIPPED = re.compile(r'/(?:\.|__pycache__|build|install|log|site|training_output|demo_output)')


def words(text: str) -> Counter[str]:
    """Count the words of a text; `snake_case` and `CamelCase` names are several."""
    parted = re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', text).replace('_', ' ').lower()
    return Counter(re.findall(r'[a-z]+', parted))


def is_stateful(node: ast.ClassDef) -> bool:
    """Check whether a method other than the constructor changes an attribute of `self`."""
    if any(ast.unparse(base).endswith('Module') for base in node.bases):
        return False  # layers of a network

    def of_self(target: ast.expr) -> bool:
        while isinstance(target, (ast.Attribute, ast.Subscript)):
            if isinstance(target.value, ast.Name) and target.value.id == 'self':
                return True
            target = target.value
        return False

    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name in ('__init__', '__post_init__'):
            continue
        for each in ast.walk(method):
            targets: list[ast.expr] = []
            if isinstance(each, (ast.Assign, ast.Delete)):
                targets = each.targets
            elif isinstance(each, (ast.AugAssign, ast.AnnAssign)):
                targets = [each.target]
            elif isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute):
                targets = [each.func.value] * (each.func.attr in MUTATORS)
            flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
            if any(of_self(target) for target in flat):
                return True
    return False


def main() -> None:
    """Print the figures."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    package = root / 'vggt_ros'
    files = {
        '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__'): path
        for path in sorted(package.rglob('*.py'))
        if not SKIPPED.search(str(path.relative_to(root)))
    }
    importers: dict[str, set[str]] = defaultdict(set)
    definitions: dict[str, set[str]] = defaultdict(set)
    functions, stateful, sizes = [], [], {}
    for name, path in files.items():
        text = path.read_text()
        tree = ast.parse(text)
        sizes[name] = len(text.splitlines())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                importers[node.module].add(name)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f'{node.module}.{alias.name}' in files:
                        importers[f'{node.module}.{alias.name}'].add(name)
            if isinstance(node, ast.FunctionDef):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != '_':
                definitions[node.name].add(name)
            in_core = not OUTSIDE_THE_CORE.intersection(name.split('.')[1:2])
            if isinstance(node, ast.ClassDef) and in_core and is_stateful(node):
                stateful += [f'{name}.{node.name}']
    homonyms = {n: m for n, m in definitions.items() if len(m) > 1 and n not in ('main', 'parse')}
    modules = {name: size for name, size in sizes.items() if files[name].name != '__init__.py'}
    small = [name for name, size in modules.items() if size < SMALL]
    single = [name for name in modules if len(importers[name]) == 1]
    print(f'modules {len(modules)}, lines {sum(sizes.values())}')
    quantiles = statistics.quantiles(functions, n=10)
    print(
        f'functions {len(functions)}, lines: median {statistics.median(functions):g}, '
        f'p90 {quantiles[-1]:g}, longest {max(functions)}'
    )
    print(
        f'modules with one importer {len(single)}; below {SMALL} lines {len(small)}; both '
        f'{len(set(small) & set(single))}'
    )
    print(f'public homonyms {len(homonyms)}: {", ".join(sorted(homonyms)) or "none"}')
    print(f'stateful classes of the core {len(stateful)}: {", ".join(stateful)}')
    for kind, suffixes, folders in (
        ('code', {'.py', '.msg', '.yaml'}, ('vggt_ros', 'launch', 'msg', 'config')),
        ('tests', {'.py'}, ('test',)),
        ('documents', {'.md', '.rst'}, ('docs', 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.rst')),
    ):
        counts: Counter[str] = Counter()
        for folder in folders:
            for path in [root / folder, *sorted((root / folder).rglob('*'))]:
                if not path.is_file() or path.suffix not in suffixes:
                    continue
                if not SKIPPED.search(str(path.relative_to(root))):
                    counts += words(path.read_text())
        found = {word: counts[word] for word in WORDS if counts[word]}
        most = sorted(found.items(), key=lambda item: -item[1])
        print(
            f'words in {kind} {sum(found.values())}: '
            + ', '.join(f'{word} {count}' for word, count in most)
        )


if __name__ == '__main__':
    main()
