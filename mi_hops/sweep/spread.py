"""Parts of long work on other processes, by any executor of `concurrent.futures`.

Inside ``with spread(model, executor)`` the batches of what runs the model are tasks of the executor.
They are the batches of a run in one process, each made by the same code on the same weights, so on
the same hardware every number is the same to the last bit, whatever the number of workers. A worker
loads the model once, makes sure that it is the same one, and keeps it; a task carries what the batch
is made from (prompts, targets, interventions, a lens, a repair), never the model.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from mi_hops.model import HookedModel, fingerprint
from mi_hops.model.loading import loader_of
from mi_hops.model.shortcuts import OPTIONS, is_touched
from mi_hops.sweep.keep import keeping_nothing
from mi_hops.sweep.shared import SharedFolder

#: How often a task is tried.
TRIES = 3
#: Tasks that wait at an executor which is not ours.
_AHEAD = 256
#: What all tasks of one piece of work together may carry of what they share, in bytes.
_CARRIED = 2**31

Load = Callable[[], HookedModel]
#: What tasks are made inside of, such as `pretransposed_weights`.
Around = Callable[[Any], Any]


class TaskError(ChildProcessError):
    """Some tasks failed after several tries; all others are done."""


@contextmanager
def spread(
    model: HookedModel, executor: Executor | int, *, load: Load | None = None
) -> Iterator[None]:
    """Within the block, work over facts and pairs runs on an executor's workers.

    This applies to `generate` (and so to `find_gap`), lenses over prompts or facts, erasing, locating,
    patching, tracing and ablating over pairs, injection, `score_prompts`, `second_moments`,
    `creme_many` and `evaluate`. Training, gradients and other edits run in this process, and so does
    everything while hooks are attached to the model or its weights are changed. A task whose worker
    is lost is redone, and one that fails `TRIES` times does not stop the others.

    Args:
        executor: of `concurrent.futures`, such as ``dask.distributed.Client(...).get_executor()``, or
            a `SharedFolder`; or a number of processes on this machine. With a number, a script needs the usual
            ``if __name__ == "__main__":``.
        load: gives a worker the same model; by default what `load_model` was called with.

    Raises:
        ValueError: a model that `load_model` has not loaded, without `load`; a number of processes
            below 1. In the block: a worker whose model has other weights; what cannot be sent.
        TaskError: in the block, tasks that failed; with their facts.
        ChildProcessError: in the block, an executor that takes no more tasks.

    Warns:
        UserWarning: more threads than cores; every process has as many as this one, because their
            number can change the last bits.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().sample(train=0, held_out=4)
        >>> with ThreadPoolExecutor(1) as executor, mi_hops.spread(model, executor):
        ...     gap = mi_hops.find_gap(model, facts)
        >>> len(gap.facts) == len(facts)
        True
    """
    load = load or loader_of(model)
    if load is None:
        raise ValueError(
            "workers load the model themselves, and this one was not loaded by load_model; pass load=, "
            "a function without arguments that gives it"
        )
    with ExitStack() as stack:
        if isinstance(executor, int):
            workers: _Given = stack.enter_context(_processes(executor))
        elif isinstance(executor, SharedFolder):
            workers = stack.enter_context(_shared(executor, model, load))
        else:
            workers = _Given(executor)
        token = _spread.set(_Spread(model, load, fingerprint(model), workers))
        stack.callback(_spread.reset, token)
        yield


def spreading(model: HookedModel) -> _Spread | None:
    """Where work with this model is to be done, if not here."""
    found = _spread.get()
    return found if found is not None and found.takes(model) else None


@dataclass
class _Task:
    """Some parts of a piece of work, by number."""

    numbers: list[int]
    tries: int = 0
    error: BaseException | None = None


@dataclass
class _Spread:
    """A model, and who has it."""

    model: Any
    load: Load
    fingerprint: str
    workers: _Given

    def takes(self, model: HookedModel) -> bool:
        """Whether the workers' model is this one, as it is now."""
        return (
            model is self.model
            and not any(getattr(model.cfg, flag, False) for flag in (*OPTIONS, "use_hook_mlp_in"))
            and not is_touched(model)
            and fingerprint(model) == self.fingerprint
        )

    def each(
        self,
        parts: Sequence[Any],
        run: Callable[[Any], Any],
        around: Sequence[Around],
        texts: Callable[[Any], Sequence[str]],
    ) -> Iterator[tuple[int, Any]]:
        """(number of a part, what `run` makes of it), as they are done.

        Args:
            texts: what a part is made from, to tell of one that failed.
        """
        work = _Work(
            self.load,
            self.fingerprint,
            self._pickled(run),
            tuple(around),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )
        shared = cloudpickle.dumps(work)
        size = max(1, -(-len(parts) * len(shared) // _CARRIED))
        numbers = range(len(parts))
        waiting = deque(_Task(list(numbers[i : i + size])) for i in numbers[::size])
        alone: list[_Task] = []  # tasks that may be what their workers were lost by
        failed: list[_Task] = []
        running: dict[Future[bytes], _Task] = {}
        try:
            while waiting or running or alone:
                if not waiting and not running:
                    waiting.append(alone.pop())
                while waiting and len(running) < self.workers.ahead:
                    task = waiting.popleft()
                    # Dask takes equal calls for one, failed or not; a pickle ends before the zeros.
                    data = self._pickled([parts[i] for i in task.numbers]) + bytes(task.tries)
                    running[self.workers.submit(_make, shared, data)] = task
                for future in self.workers.wait(running):
                    task = running.pop(future)
                    try:
                        found = pickle.loads(future.result())
                    except ValueError:  # of the input, and the same wherever it is run
                        raise
                    except Exception as error:
                        if isinstance(error, BrokenExecutor):
                            self.workers.replace(error)
                        task.tries, task.error = task.tries + 1, error
                        last = task.tries == TRIES - 1
                        (failed if task.tries == TRIES else alone if last else waiting).append(task)
                        continue
                    yield from zip(task.numbers, found, strict=True)
        finally:
            for future in running:
                future.cancel()
        if failed:
            raise _report(failed, [texts(parts[i]) for task in failed for i in task.numbers])

    def _pickled(self, value: Any) -> bytes:
        file = io.BytesIO()
        try:
            _Pickler(file, self.model).dump(value)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(
                f"a task cannot be sent to a worker ({error}); functions and repairs of your own must "
                "not hold open files, locks, generators or what belongs to a device alone"
            ) from error
        return file.getvalue()


_spread: ContextVar[_Spread | None] = ContextVar("spread", default=None)


def _report(failed: Sequence[_Task], texts: Sequence[Sequence[str]]) -> TaskError:
    said = [text for part in texts for text in part]
    first = failed[0].error
    error = TaskError(
        f"{len(texts)} batch(es) failed {TRIES} times each, all others are done (a study keeps them: "
        f"the same command tries these alone). They hold {len(said)} prompts: "
        f"{[text[-60:] for text in said[:8]]}. The first error: {type(first).__name__}: {first}"
    )
    error.__cause__ = first
    return error


# -- executors ------------------------------------------------------------------------------------


@dataclass
class _Given:
    """An executor of the user's."""

    executor: Executor
    ahead: int = _AHEAD

    def submit(self, *task: Any) -> Future[bytes]:
        """Hand a task over."""
        try:
            return self.executor.submit(*task)
        except BrokenExecutor as error:
            self.replace(error)
            return self.executor.submit(*task)

    def wait(self, futures: Iterable[Future[bytes]]) -> set[Future[bytes]]:
        """The first of them that are done; while none is, who shares a folder does some."""
        if isinstance(self.executor, SharedFolder):
            return self.executor.wait(futures)
        return wait(futures, return_when=FIRST_COMPLETED)[0]

    def replace(self, error: BrokenExecutor) -> None:
        """Have another executor in place of one that has lost a worker."""
        raise ChildProcessError(
            "the executor has lost a worker and takes no more tasks; what is finished is kept where a "
            "study keeps it. Pass a new executor, or a number of processes, which are replaced"
        ) from error


@dataclass
class _Processes(_Given):
    """Processes of this machine, which are ours."""

    n: int = 1

    def replace(self, error: BrokenExecutor) -> None:
        """Start as many processes again."""
        try:  # the tasks of one loss all tell of it
            self.executor.submit(os.getpid)
        except (BrokenExecutor, RuntimeError):
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = _pool(self.n)


@contextmanager
def _shared(folder: SharedFolder, model: Any, load: Load) -> Iterator[_Given]:
    """Processes that share a folder, of which this is one."""
    global _model, _known
    folder.begin()
    # What this process does it does with the model that it has.
    _model = cloudpickle.dumps((load, fingerprint(model))), model
    try:
        yield _Given(folder)
    finally:
        _model = _known = b"", None
        folder.shutdown()


def _pool(n: int) -> Executor:
    # A process that is forked would share the threads' locks and the device of this one.
    return ProcessPoolExecutor(n, mp_context=get_context("spawn"), initializer=_begin)


@contextmanager
def _processes(n: int) -> Iterator[_Processes]:
    if n < 1:
        raise ValueError(f"{n} worker processes; expected 1 or more, or an executor")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if n * threads > max(cores, threads):
        warnings.warn(
            f"{n} workers of {threads} threads each on {cores} cores; set OMP_NUM_THREADS="
            f"{max(1, cores // n)} before Python starts",
            stacklevel=5,
        )
    processes = _Processes(_pool(n), ahead=2 * n, n=n)
    try:
        yield processes
    except BaseException:
        processes.executor.shutdown(wait=False, cancel_futures=True)
        raise
    processes.executor.shutdown()


def _begin() -> None:
    """In a process of ours: Ctrl-C is for the one that started it, and it does not outlive that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


# -- in a worker ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What the tasks of one piece of work share.

    Attributes:
        run: what makes a part, pickled without the model.
        grad, threads: torch's settings where the work belongs.
    """

    load: Load
    fingerprint: str
    run: bytes
    around: tuple[Around, ...]
    grad: bool
    threads: int


#: One task at a time in a process: hooks are the model's, not a thread's.
_LOCK = threading.Lock()
#: The model of this process's tasks, and what the last of them was made with.
_model: tuple[bytes, Any] = (b"", None)
_known: tuple[bytes, Any] = (b"", None)


def _make(shared: bytes, data: bytes) -> bytes:
    """A task: what the work makes of some parts."""
    global _known
    with _LOCK, keeping_nothing(), ExitStack() as stack:
        stack.callback(_spread.reset, _spread.set(None))
        digest = hashlib.sha256(shared).digest()
        if _known[0] != digest:
            _known = b"", None  # makes room first
            work = pickle.loads(shared)
            model = _loaded(work.load, work.fingerprint)
            _known = digest, (work, model, _Unpickler(work.run, model).load())
        work, model, run = _known[1]
        if torch.get_num_threads() != work.threads:
            torch.set_num_threads(work.threads)
        stack.enter_context(torch.set_grad_enabled(work.grad))
        for around in work.around:
            stack.enter_context(around(model))
        return pickle.dumps([_on_cpu(run(part)) for part in _Unpickler(data, model).load()])


def _loaded(load: Load, expected: str) -> Any:
    """The model, loaded once."""
    global _model
    key = cloudpickle.dumps((load, expected))
    if _model[0] != key:
        model = load()
        found = fingerprint(model)
        if found != expected:
            raise ValueError(
                f"a worker has loaded a model of other weights ({found}) than those here ({expected}); "
                "do files differ between machines, or were weights changed after loading?"
            )
        _model = key, model
    return _model[1]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(part) for part in value]
    return value


# -- the model stays where it is ------------------------------------------------------------------


class _Pickler(cloudpickle.Pickler):
    """Writes the name of a part of the model in place of the part."""

    def __init__(self, file: io.BytesIO, model: Any) -> None:
        super().__init__(file)
        self._names = {id(part): name for name, part in _parts(model).items()}

    def persistent_id(self, value: Any) -> Any:
        """Its name in the model, or None."""
        return self._names.get(id(value))


class _Unpickler(pickle.Unpickler):
    """Puts the worker's own model in their place."""

    def __init__(self, data: bytes, model: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._parts = _parts(model)

    def persistent_load(self, name: str) -> Any:
        """What has this name."""
        return self._parts[name]


def _parts(model: Any) -> dict[str, Any]:
    """All that a task may refer to, by name."""
    parts = {f"module {name}": module for name, module in model.named_modules()}
    parts |= {f"parameter {name}": weight for name, weight in model.named_parameters()}
    parts |= {"cfg": model.cfg, "tokenizer": model.tokenizer}
    return {name: part for name, part in parts.items() if part is not None}
