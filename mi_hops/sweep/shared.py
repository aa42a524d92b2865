"""Tasks as files: processes that share nothing but a folder do the work of one of them.

The process that leads writes its tasks into the folder, and does them itself while nobody else has
done one; others that `help_in` the folder take what nobody has taken. Who takes a task holds a lock on it,
which the system releases when that process ends, however it ends: then another takes it.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mi_hops.result.files import replacing

#: Seconds between two looks into the folder.
LOOK_EVERY = 0.2


class SharedFolder(Executor):
    """An executor whose workers are processes that `help_in` a folder, and the caller itself.

    Args:
        folder: for the tasks alone; `begin` deletes what lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Future[bytes]] = {}
        self._numbers = 0

    def begin(self) -> None:
        """Empty the folder: what another process has left there is of no use."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Write a task: a function that can be imported, what it shares with others, what is its own."""
        shared, data = args
        digest = hashlib.sha256(shared).hexdigest()[:24]
        common = self.folder / f"{digest}.shared"
        if not common.exists():
            _write(common, shared)
        self._numbers += 1
        name = f"{self._numbers:08d}-{uuid.uuid4().hex[:8]}"
        _write(self.folder / f"{name}.task", pickle.dumps((fn, digest, data)))
        future: Future[Any] = Future()
        self._open[name] = future
        return future

    def wait(self, futures: Iterable[Future[bytes]]) -> set[Future[bytes]]:
        """The first of them that are done; while none is, the caller does what nobody does."""
        asked = set(futures)
        while True:
            for name, future in list(self._open.items()):
                if self._collected(name, future):
                    del self._open[name]
            done = {future for future in asked if future.done()}
            if done:
                return done
            if not _take_one(self.folder):
                time.sleep(LOOK_EVERY)

    def _collected(self, name: str, future: Future[bytes]) -> bool:
        if future.cancelled():
            (self.folder / f"{name}.task").unlink(missing_ok=True)
            return True
        path = self.folder / f"{name}.done"
        if not path.exists():
            return False
        good, found = pickle.loads(path.read_bytes())
        if good:
            future.set_result(found)
        else:
            future.set_exception(found)
        for kind in ("task", "done", "lock"):
            (self.folder / f"{name}.{kind}").unlink(missing_ok=True)
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Delete the folder; who helps finds nothing more to do."""
        shutil.rmtree(self.folder, ignore_errors=True)


def help_in(folder: Path, finished: Callable[[], bool]) -> int:
    """Do tasks of the folder until `finished`; gives their number."""
    n = 0
    while not finished():
        if _take_one(folder):
            n += 1
        else:
            time.sleep(LOOK_EVERY)
    return n


def _take_one(folder: Path) -> bool:
    """Do a task that nobody does or has done, if there is one."""
    for task in sorted(folder.glob("*.task")):
        done = task.with_suffix(".done")
        if done.exists():
            continue
        lock = FileLock(task.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # taken, or the folder is gone
            continue
        try:
            if done.exists():
                continue
            fn, digest, data = pickle.loads(task.read_bytes())
            shared = (folder / f"{digest}.shared").read_bytes()
            try:
                said = pickle.dumps((True, fn(shared, data)))
            except Exception as error:
                said = pickle.dumps((False, error))
            _write(done, said)
            return True
        except FileNotFoundError:  # the folder was deleted: nobody waits for this any more
            continue
        finally:
            lock.release()
    return False


def _write(path: Path, data: bytes) -> None:
    with replacing(path, overwrite=True) as partial:
        partial.write_bytes(data)
