"""Finished parts of long work, on disk as they come: a process that is killed loses seconds of it.

Inside ``with keeping(folder, identity)`` every value that `keep` makes is written, some seconds'
worth at a time, and a later process that does the same work in the same order is given it instead of
making it again. A part is known by what its caller says of it, by the part it belongs to, and by how
often the same was asked for before; what else decides the values (weights, facts, settings,
versions) belongs into `identity`. Outside of such a block nothing is kept.

The files are safetensors, each written whole, with its checksum in its name. One that is damaged, or
of another identity, is deleted, and what it held is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from mi_hops.result.files import replacing

T = TypeVar("T")

#: Seconds of work that are gathered before they are written.
WRITE_EVERY = 20.0


class Keeper:
    """The parts of one piece of work, in a folder of their own."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder, self._identity = folder, identity
        self._known: dict[str, tuple[Any, Path]] = {}  # a part, and the file that has its tensors
        self._new: dict[str, Any] = {}  # parts that are not written yet
        self._tensors: dict[str, Tensor] = {}
        self._asked: Counter[str] = Counter()
        self._around = ""  # the part that is being made
        self._earlier, self._number = 0.0, 0
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not self._read(path):
                path.unlink()
        self._begun = self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on the work so far, with what earlier processes wrote down of theirs."""
        return self._earlier + time.monotonic() - self._begun

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= WRITE_EVERY

    @property
    def has_new(self) -> bool:
        """Whether there is something to write."""
        return bool(self._new)

    def name(self, what: tuple[Any, ...]) -> str:
        """The name of a part."""
        said = hashlib.sha256(repr((self._around, what)).encode()).hexdigest()[:24]
        self._asked[said] += 1
        return f"{said}-{self._asked[said]}"

    def knows(self, name: str) -> bool:
        """Whether an earlier process has made the part."""
        return name in self._known

    def get(self, name: str) -> tuple[Any, ...]:
        """The part that an earlier process has made; nothing if it has not."""
        if name not in self._known:
            return ()
        tree, path = self._known[name]
        with safe_open(path, framework="pt") as file:
            return (_unpacked(tree, file.get_tensor),)

    def make(self, name: str, make: Callable[[], Any]) -> Any:
        """Make a part; it is given back as a later process will be given it."""
        around, self._around = self._around, name
        try:
            value = make()
        finally:
            self._around = around
        tensors: dict[str, Tensor] = {}
        tree = json.loads(json.dumps(_packed(value, name, tensors)))
        self._new[name] = tree
        self._tensors |= tensors
        if self.due:
            self.write()
        return _unpacked(tree, tensors.__getitem__)

    def put(self, name: str, value: Any) -> None:
        """Write a part at once, in place of what it was before."""
        if self.has_new:
            self.write()
        old = self._known.get(name)
        self._new[name] = _packed(value, name, self._tensors)
        self._known[name] = self._new[name], self.write()
        if old is not None:
            old[1].unlink(missing_ok=True)

    def write(self) -> Path:
        """Write what is new, in one file."""
        try:
            self._folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the folder {self._folder.parent} has been removed while work was written to it"
            ) from None
        record = {"units": self._new, "seconds": self.seconds, "identity": self._identity}
        data = safetensors.torch.save(self._tensors, {"record": json.dumps(record)})
        self._number += 1
        path = self._folder / f"{self._number:06d}-{_checksum(data)}.safetensors"
        with replacing(path) as partial:
            partial.write_bytes(data)
        self._new, self._tensors = {}, {}
        self._written = time.monotonic()
        return path

    def _read(self, path: Path) -> bool:
        """Take in a file; False if it is none of ours, whole, and of the same work."""
        number, _, checksum = path.stem.partition("-")
        if path.suffix != ".safetensors" or _checksum(path.read_bytes()) != checksum:
            return False
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
        if record["identity"] != self._identity:
            return False
        self._known |= {name: (tree, path) for name, tree in record["units"].items()}
        self._earlier, self._number = max(self._earlier, record["seconds"]), int(number)
        return True


_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Nothing is kept or given back inside, so that what work costs can be measured."""
    token = _keeper.set(None)
    try:
        yield
    finally:
        _keeper.reset(token)


@contextmanager
def keeping(folder: Path, identity: str) -> Iterator[Keeper]:
    """Keep what `keep` makes in a folder, until the block is done; then the folder is removed.

    Args:
        folder: its own, made when there is something to write; the one it lies in must be there.
        identity: of the work. Files of other work are deleted.
    """
    keeper = Keeper(folder, identity)
    token = _keeper.set(keeper)
    try:
        yield keeper
    except BaseException:
        if folder.parent.is_dir() and keeper.has_new:
            keeper.write()
        raise
    finally:
        _keeper.reset(token)
    shutil.rmtree(folder, ignore_errors=True)


def keep(make: Callable[[], Any], *what: Any) -> Any:
    """What `make` gives, or what it gave to an earlier process that was stopped.

    Args:
        make: gives tensors, texts, numbers and None, and lists and dicts (with names) of them;
            tensors come back on the CPU, tuples as lists. It must not draw from a generator that is
            used after it.
        what: tells the part from others of the same work, by its ``repr``.
    """
    keeper = _keeper.get()
    if keeper is None:
        return make()
    name = keeper.name(what)
    found = keeper.get(name)
    return found[0] if found else keeper.make(name, make)


def keep_each(
    parts: Sequence[tuple[Any, ...]],
    make: Callable[[list[int]], Iterator[tuple[int, Any]]],
) -> Iterator[Any]:
    """As `keep`, for parts that are made elsewhere, in any order; they come in their own order.

    Args:
        parts: what tells each from others.
        make: gives ``(number, value)`` of the parts with these numbers, as they are done.
    """
    keeper, numbers = _keeper.get(), list(range(len(parts)))
    if keeper is None:
        yield from in_order(make(numbers), numbers)
        return
    names = [keeper.name(what) for what in parts]
    missing = [i for i in numbers if not keeper.knows(names[i])]
    kept = ((i, keeper.make(names[i], repeat(value).__next__)) for i, value in make(missing))
    made = in_order(kept, missing)
    for name in names:
        yield keeper.get(name)[0] if keeper.knows(name) else next(made)


def in_order(found: Iterator[tuple[int, T]], numbers: Iterable[int]) -> Iterator[T]:
    """The values of these numbers in their order, of what comes in any; none is asked for early."""
    ready: dict[int, T] = {}
    for number in numbers:
        while number not in ready:
            i, value = next(found)
            ready[i] = value
        yield ready.pop(number)


class Running:
    """A value that grows, such as a sum: the latest one is kept.

    Work that is resumed goes on from there, so a part that is kept in the course of it has to be told
    from the others by how far the work was, not by their order.

    Args:
        what: as in `keep`.

    Attributes:
        value: what an earlier process has put here; None for nothing.
    """

    def __init__(self, *what: Any) -> None:
        self._keeper = _keeper.get()
        self._name = self._keeper.name(what) if self._keeper else ""
        found = self._keeper.get(self._name) if self._keeper else ()
        self.value: Any = found[0] if found else None

    def put(self, value: Callable[[], Any]) -> None:
        """Keep ``value()``, if it is time to write."""
        if self._keeper is not None and self._keeper.due:
            self._keeper.put(self._name, value())


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors apart."""
    if isinstance(value, Tensor):
        tensors[key := f"{name}/{len(tensors)}"] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[key, _packed(part, name, tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(part, name, tensors) for part in value]
    return value


def _unpacked(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpacked(part, tensor) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensor(tree["tensor"])
    return {key: _unpacked(part, tensor) for key, part in tree["dict"]}
