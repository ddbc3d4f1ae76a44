# SPDX-License-Identifier: Apache-2.0
"""
Compile every Python file with each supported Python version on this machine.

It detects syntax of newer versions, which tests on those versions cannot. Interpreters are
searched on PATH and among pyenv's versions. Files are compiled in memory; nothing is written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ('3.10', '3.11', '3.12', '3.13')
FOLDERS = ('vggt_ros', 'test', 'tools', 'launch')
PROGRAM = """
import sys
print('%d.%d' % sys.version_info[:2])
for path in sys.stdin.read().splitlines():
    with open(path, 'rb') as file:
        compile(file.read(), path, 'exec', dont_inherit=True)
"""


def candidates(version: str) -> list[Path]:
    """List the possible paths of an interpreter of this version."""
    folders = [Path(folder) for folder in os.environ.get('PATH', '').split(os.pathsep) if folder]
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    folders += sorted(pyenv.glob(f'versions/{version}*/bin'))
    return [folder / f'python{version}' for folder in folders]


def compile_with(python: Path, version: str, files: str) -> str | None:
    """
    Compile the files with one interpreter.

    :returns: the error, '' without one; None if this is not a working interpreter of the version.
    """
    env = {name: text for name, text in os.environ.items() if not name.startswith('PYTHON')}
    command = [str(python), '-I', '-W', 'error::SyntaxWarning', '-c', PROGRAM]
    done = subprocess.run(command, input=files, env=env, capture_output=True, text=True)
    if done.stdout.strip() != version:
        return None  # for example a pyenv shim without that version
    return done.stderr if done.returncode else ''


def main() -> None:
    """Compile every file with every interpreter found."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob('*.py'))]
    files = '\n'.join(str(path) for path in [ROOT / 'setup.py', *paths])
    found, failed = [], False
    for version in VERSIONS:
        for python in candidates(version):
            error = compile_with(python, version, files) if python.is_file() else None
            if error is None:
                continue
            found.append(version)
            if error:
                failed = True
                print(f'byte-compilation with {python}:\n{error}')
            break
    missing = [version for version in VERSIONS if version not in found]
    print(
        f'byte-compiled {len(paths) + 1} files with Python {", ".join(found)}'
        + (f' (not on this machine: {", ".join(missing)})' if missing else '')
    )
    sys.exit(failed or not found)


if __name__ == '__main__':
    main()
