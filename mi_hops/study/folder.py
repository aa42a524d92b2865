"""A study's folder: its settings, the files of its steps, and when it may be written to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mi_hops.result.files import replacing


@dataclass(repr=False)
class Folder:
    """A study's folder, as far as its steps need it.

    Attributes:
        folder: where the files are.
        settings: what was asked for, with model and facts fingerprints.
        summary: the headline numbers, as in ``summary.json``.
    """

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
        path = self.folder / "choices.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write(self, name: str, text: str) -> None:
        """A text file of the folder, whole or not at all."""
        with replacing(self.folder / name, overwrite=True) as partial:
            partial.write_text(text)


_OURS = ("settings.json", "summary.json", "choices.json", "report.html")
# What may differ between two runs of the same study; every step's file remembers its own.
_PLACE = ("device", "versions")


def prepare(out: Path, settings: dict[str, Any], *, force: bool) -> None:
    """Make the folder ready to be written to: new, or of a study with the same settings.

    Raises:
        FileExistsError: it holds something else, and `force` is False.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; a study needs a folder")
    present = {p.name for p in out.iterdir()} if out.exists() else set()
    if "settings.json" in present:
        old = json.loads((out / "settings.json").read_text())
        differs = sorted(k for k in {*old, *settings} - {*_PLACE} if old.get(k) != settings.get(k))
        if not differs:
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
    out.mkdir(parents=True, exist_ok=True)
    for step in settings["steps"]:
        (out / f"{step}.nc").unlink(missing_ok=True)
        (out / f"{step}.skipped").unlink(missing_ok=True)
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    Folder(out, settings).write("settings.json", json.dumps(settings, indent=1) + "\n")
