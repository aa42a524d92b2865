"""A study's folder: its settings, the files of its steps, and when it may be written to."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mi_hops.result.files import replacing
from mi_hops.result.progress import showing_progress
from mi_hops.study.reopen import checksum
from mi_hops.sweep.keep import keeping


@dataclass(repr=False)
class Folder:
    """A study's folder, as far as its steps need it; `Study` describes the attributes."""

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)

    def path(self, step: str) -> Path:
        """The file of a step.

        Raises:
            ValueError: no such step.
        """
        if step not in self.settings["steps"]:
            raise ValueError(f"no step {step!r}; a study has {self.settings['steps']}")
        return self.folder / f"{step}.nc"

    def skipped(self, step: str) -> str | None:
        """Why a step was left out, or None."""
        note = self.path(step).with_suffix(".skipped")
        return note.read_text().strip() if note.exists() else None

    def done(self, step: str) -> bool:
        """Whether a step has its file, or its reason for having none."""
        return self.path(step).exists() or self.skipped(step) is not None

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen for the edits, and from what; empty if none were made."""
        return self._read("choices.json")

    @property
    def budget(self) -> dict[str, Any]:
        """Step -> seconds for one fact and facts taken, where a time budget decided."""
        return self._read("budget.json")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def write(self, name: str, text: str) -> None:
        """A text file of the folder, whole or not at all."""
        with replacing(self.folder / name, overwrite=True) as partial:
            partial.write_text(text)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """What each step took and wrote.

        ``seconds``; ``peak_memory``, of the process up to its end, bytes; ``files``, name -> checksum.
        """
        try:
            return dict(self._read("steps.json"))
        except (OSError, ValueError):
            return {}

    def record(self, step: str, files: Sequence[str] = (), **more: Any) -> None:
        """Write down that a step is done, with the checksums of its files and of further `files`."""
        names = (f"{step}.nc", f"{step}.skipped", f"{step}.json", *files)
        found = {
            name: checksum(self.folder / name) for name in names if (self.folder / name).exists()
        }
        told = self.records | {step: {**more, "files": found}}
        self.write("steps.json", json.dumps(told, indent=1) + "\n")

    def sound(self, step: str) -> bool:
        """Whether all that a step wrote is there, as it was written."""
        files = self.records.get(step, {}).get("files", {})
        paths = {self.folder / name: was for name, was in files.items()}
        return bool(files) and all(p.exists() and checksum(p) == was for p, was in paths.items())

    def discard(self, step: str) -> None:
        """Delete what a step wrote."""
        for kind in ("nc", "skipped", "json"):
            (self.folder / f"{step}.{kind}").unlink(missing_ok=True)

    def kept(self, step: str) -> Path:
        """The folder in which a step's finished parts lie while it runs."""
        return self.folder / f".{step}.kept"

    @contextmanager
    def working(
        self,
        step: str,
        identity: Mapping[str, Any],
        *,
        files: Sequence[str] = (),
        progress: bool = False,
    ) -> Iterator[None]:
        """What a step does is kept as it comes, until the block is done; its time is written down.

        Args:
            identity: all that the step's numbers depend on.
            files: what the step writes beside its own file.
            progress: show the bars of what the step does.
        """
        said = hashlib.sha256(json.dumps([step, identity]).encode()).hexdigest()
        with keeping(self.kept(step), said) as keeper, showing_progress(progress):
            yield
            took = round(keeper.seconds, 1)
            self.record(step, files, seconds=took, peak_memory=peak_memory())


def read_json(path: Path) -> Any:
    """What a file of a study's folder says.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); run the study in another folder, or again with force=True"
        ) from None


def peak_memory() -> float:
    """The most memory that this process has held so far, in bytes; NaN where it cannot be determined."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return float("nan")
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else writes to the folder inside the block; it is made if it is not there.

    The system releases the lock of a process that ends, however it ends.

    Raises:
        BlockingIOError: somebody does.
        FileNotFoundError: the folder has been removed.
        FileExistsError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; a study needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another process is running a study in {out}; wait for it, stop it, or choose another "
            "folder"
        ) from None
    except OSError:  # a folder that can only be read may hold a finished study
        yield
        return
    try:
        for path in out.iterdir():  # of processes that were killed while they wrote
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink()
        yield
    except Exception as error:
        if (out / _LOCK).exists():
            raise
        raise FileNotFoundError(
            f"{out} has been removed while a study was written to it"
        ) from error
    finally:
        (out / _LOCK).unlink(missing_ok=True)
        lock.release()


def is_locked(out: Path) -> bool:
    """Whether somebody writes to the folder right now."""
    if not (out / _LOCK).exists():
        return False
    lock = FileLock(out / _LOCK)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # removed in the meantime
        return False


_LOCK = ".lock"
_HALF_WRITTEN = re.compile(r"\.\w+\.(nc|json|skipped|html)\.\d+\.[0-9a-f]{8}\.part")
_OURS = ("call.json", "settings.json", "steps.json", "choices.json", "report.html")
#: Files of the study as a whole that have checksums as a step's have.
_CHECKED = ("summary", "budget")
# What may differ between two runs of the same study; every step's file remembers its own.
_PLACE = ("device", "versions")


def _differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings in which two studies differ."""
    return sorted(k for k in {*old, *new} - {*_PLACE} if old.get(k) != new.get(k))


def same_study(out: Path, settings: dict[str, Any]) -> Folder | None:
    """The folder, if it holds a study with these settings."""
    try:
        old = read_json(out / "settings.json")
    except (OSError, ValueError):
        return None
    return None if _differs(old, settings) else Folder(out, settings)


def prepare(out: Path, settings: dict[str, Any], *, force: bool) -> None:
    """Make a folder that is `locked` ready to be written to: of a study with the same settings.

    Raises:
        FileExistsError: it holds something else, and `force` is False.
    """
    study = Folder(out, settings)
    present = {p.name for p in out.iterdir()} - {_LOCK}
    if "settings.json" in present:
        try:
            old = read_json(out / "settings.json")
        except ValueError:
            if not force:
                raise
            old = {}
        differs = _differs(old, settings)
        if not differs:
            for step in settings["steps"]:
                if study.sound(step):  # killed before it could tidy up
                    shutil.rmtree(study.kept(step), ignore_errors=True)
                elif study.done(step):
                    study.discard(step)
            for name in _CHECKED:
                if not study.sound(name):
                    study.discard(name)
            return
        if not force:
            raise FileExistsError(
                f"{out} holds a study with other settings ({', '.join(differs)} differ); choose "
                "another folder, or overwrite it with force=True"
            )
    elif present and not force:
        names = ", ".join(sorted(present)[:4])
        raise FileExistsError(
            f"{out} is not empty and holds no study ({names}, ...); choose another folder, or "
            "write beside these files with force=True"
        )
    for step in (*settings["steps"], *_CHECKED):
        shutil.rmtree(study.kept(step), ignore_errors=True)
        study.discard(step)
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    study.write("settings.json", json.dumps(settings, indent=1) + "\n")
