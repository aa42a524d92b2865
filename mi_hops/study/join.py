"""Several processes run one study: those that share a folder, and nothing else, or an executor's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mi_hops.study.folder import is_locked
from mi_hops.study.study import Study
from mi_hops.sweep.shared import SharedFolder, help_in


def join_study(out: str | Path, run: Callable[[Executor], Study]) -> Study:
    """Lead a study, or help the process that leads it; whoever is left when that one ends leads on.

    Any number of processes call this with the same study, at any time: the tasks of an array job.

    Args:
        out: the study's folder, which all of them can write to.
        run: `run_study` into that folder with the executor given.

    Returns:
        The finished study, in each of the processes.

    Raises:
        Exception: what `run` raises where this process leads.

    Examples:
        >>> import mi_hops, tempfile
        >>> from functools import partial
        >>> facts, out = mi_hops.Hopland().sample(train=4, held_out=4), tempfile.mkdtemp()
        >>> few = {"settings": mi_hops.StudySettings(sizes="quick"), "progress": False}
        >>> def run(executor):
        ...     return mi_hops.run_study("hops-gpt2", facts, out=out, executor=executor, **few)
        >>> mi_hops.study.join_study(out, run).skipped("gap") is None
        True
    """
    tasks = Path(out) / TASKS
    while True:
        try:
            return run(SharedFolder(tasks))
        except BlockingIOError:
            help_in(tasks, lambda: not is_locked(Path(out)))


#: Where the tasks lie, in a study's folder.
TASKS = ".tasks"


@contextmanager
def executor_of(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    """What `run_study` takes as its executor: a number of processes, or that of a Dask cluster.

    Raises:
        ValueError: both are given, or Dask is not installed.
        OSError: nobody answers at the address.
    """
    if scheduler is None:
        yield workers
        return
    if workers is not None:
        raise ValueError(
            "--workers are processes of this machine, --scheduler has its own; give one"
        )
    try:
        from dask.distributed import Client
    except ImportError:
        raise ValueError(
            "--scheduler needs Dask: install it with 'pip install mi-hops[scale]'"
        ) from None
    with Client(scheduler, timeout=30) as client:
        yield client.get_executor()
