# SPDX-License-Identifier: Apache-2.0
"""
Many recordings: one folder each, finished ones passed over, failures told at the end.

Several at once are Ray's tasks (PyPI `ray`), one recording each, on this machine or on the cluster
that `RAY_ADDRESS` names; where there are GPUs, each task has one to itself.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Makes the map of an input in a folder; returns '' or what went wrong.
Job = Callable[[str, Path], str]


def output_folders(inputs: Sequence[str], output: Path) -> dict[str, Path]:
    """
    Name the folder of each recording.

    :raises ValueError: if two would have the same.
    """
    folders = {each: output / Path(each).resolve().name for each in inputs}
    twice = [name for name, count in Counter(folders.values()).items() if count > 1]
    if twice or len(folders) < len(inputs):
        names = ', '.join(sorted(path.name for path in twice)) or 'an input'
        raise ValueError(f'several recordings would be {names}; expected names that differ')
    return folders


def run_jobs(
    inputs: Sequence[str],
    output: Path,
    job: Job,
    at_once: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """
    Make the maps that are not there yet.

    :param at_once: recordings at the same time; 1 needs no Ray.
    :param say: hears how each ended.
    :returns: what went wrong, by input.
    :raises ValueError: if names are not to be told apart, or Ray is missing.
    """
    folders = output_folders(inputs, output)
    wanted = {each: folder for each, folder in folders.items() if not folder.exists()}
    for each in folders.keys() - wanted.keys():
        say(f'{each}: {folders[each]} is there already')
    failures = {}
    ended = _on_ray(wanted, job, at_once) if at_once > 1 else _in_turn(wanted, job)
    for each, error in ended:
        say(f'{each}: {error or folders[each]}')
        if error:
            failures[each] = error
    return failures


def _in_turn(wanted: dict[str, Path], job: Job) -> Any:
    for each, folder in wanted.items():
        yield each, job(each, folder)


def _on_ray(wanted: dict[str, Path], job: Job, at_once: int) -> Any:
    ray = _import_ray()
    on_cluster = 'RAY_ADDRESS' in os.environ
    ray.init(num_cpus=None if on_cluster else at_once, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get('GPU') else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)
        remote = task(lambda each, folder: job(each, folder))  # Ray takes functions alone
        running = {remote.remote(each, folder): each for each, folder in wanted.items()}
        while running:
            (done,), _ = ray.wait(list(running))
            each = running.pop(done)
            try:
                yield each, ray.get(done)
            except ray.exceptions.RayError as error:  # its process was killed, or it raised
                yield each, f'{type(error).__name__}: {str(error).strip().splitlines()[-1]}'
    finally:
        ray.shutdown()


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ValueError('several jobs at once need Ray: pip install ray') from error
    module: ModuleType = ray
    return module
