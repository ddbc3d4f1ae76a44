# SPDX-License-Identifier: Apache-2.0
"""
Many recordings, one folder each: finished ones are skipped, failures are collected.

Parallel jobs are Ray tasks (PyPI `ray`), one recording each, on this machine or on the cluster
that `RAY_ADDRESS` names. If there are GPUs, each task has one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

# Reconstructs an input into a folder; returns the error, or ''.
Job = Callable[[str, Path], str]


def output_folders(inputs: Sequence[str], output: Path) -> dict[str, Path]:
    """
    Name the folder of each recording.

    :raises ValueError: if two would be the same.
    """
    folders = {each: output / Path(each).resolve().name for each in inputs}
    repeated = [name for name, count in Counter(folders.values()).items() if count > 1]
    if repeated or len(folders) < len(inputs):
        names = ', '.join(sorted(path.name for path in repeated)) or 'an input'
        raise ValueError(f'more than one recording is called {names}; expected different names')
    return folders


def run_jobs(
    inputs: Sequence[str],
    output: Path,
    job: Job,
    parallel: int,
    report: Callable[[str], None],
) -> dict[str, str]:
    """
    Reconstruct the recordings that have no folder yet.

    :param parallel: number of parallel jobs; 1 does not need Ray.
    :param report: called with the result of each recording.
    :returns: errors, by input.
    :raises ValueError: if names are ambiguous, or Ray is missing.
    """
    folders = output_folders(inputs, output)
    waiting = {each: folder for each, folder in folders.items() if not folder.exists()}
    for each in folders.keys() - waiting.keys():
        report(f'{each}: {folders[each]} exists already')
    failures = {}
    finished = _run_on_ray(waiting, job, parallel) if parallel > 1 else _run(waiting, job)
    for each, error in finished:
        report(f'{each}: {error or folders[each]}')
        if error:
            failures[each] = error
    return failures


def _run(waiting: dict[str, Path], job: Job) -> Iterator[tuple[str, str]]:
    for each, folder in waiting.items():
        yield each, job(each, folder)


def _run_on_ray(waiting: dict[str, Path], job: Job, parallel: int) -> Iterator[tuple[str, str]]:
    ray = _import_ray()
    on_cluster = 'RAY_ADDRESS' in os.environ
    ray.init(num_cpus=None if on_cluster else parallel, log_to_driver=False)
    try:
        gpus = 1 if ray.cluster_resources().get('GPU') else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)
        remote = task(lambda each, folder: job(each, folder))  # Ray accepts only functions
        running = {remote.remote(each, folder): each for each, folder in waiting.items()}
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
        raise ValueError('parallel jobs need Ray: pip install ray') from error
    module: ModuleType = ray
    return module
