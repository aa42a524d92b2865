"""A study's folder: its settings, the files of its steps, and when it may be written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops.result.result import Result

if TYPE_CHECKING:
    from mi_hops.reasoning.evaluation import Evaluation

STEPS = ("gap", "failures", "lens", "erasure", "locate", "injection", "editing")


@dataclass
class Study:
    """A study's folder, read back.

    Attributes:
        folder: where the files are.
        settings: what was asked for, with model and facts fingerprints.
        summary: the headline numbers, as in ``summary.json``.
    """

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Study:
        """Reopen a finished or unfinished study.

        Raises:
            ValueError: the folder holds no study.
        """
        folder = Path(folder)
        if not (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds no study (no settings.json)")
        settings = json.loads((folder / "settings.json").read_text())
        summary = folder / "summary.json"
        return cls(folder, settings, json.loads(summary.read_text()) if summary.exists() else {})

    def path(self, step: str) -> Path:
        """The file of a step."""
        return self.folder / f"{step}.nc"

    def skipped(self, step: str) -> str | None:
        """Why a step was left out, or None."""
        note = self.folder / f"{step}.skipped"
        return note.read_text().strip() if note.exists() else None

    def done(self, step: str) -> bool:
        """Whether a step has its file, or its reason for having none."""
        return self.path(step).exists() or self.skipped(step) is not None

    def result(self, step: str) -> Result | None:
        """The labelled result of a step; None if it was skipped or has not run."""
        return Result.load(self.path(step)) if self.path(step).exists() else None

    def evaluation(self) -> Evaluation | None:
        """The scores of the edits; None if the step was skipped or has not run."""
        from mi_hops.reasoning.evaluation import Evaluation

        path = self.path("editing")
        return Evaluation.load(path) if path.exists() else None

    def made_with(self) -> dict[str, list[str]]:
        """Versions and device -> the steps whose files were made with them.

        More than one entry where a study was resumed with others.
        """
        found: dict[str, list[str]] = {}
        for step in STEPS:
            result = self.result(step)
            if result is not None:
                found.setdefault(made_with(result.provenance), []).append(step)
        return found

    def headlines(self) -> list[tuple[str, str]]:
        """Name and value of the numbers a terminal should show."""
        return [(line["name"], line["text"]) for line in self.summary.get("headlines", [])]


def made_with(provenance: Mapping[str, Any]) -> str:
    """``"torch 2.13.0, transformers 5.1.0 on cpu"``, of a result or of a study's settings."""
    versions = (f"{name} {version}" for name, version in provenance["versions"].items())
    return f"{', '.join(versions)} on {provenance['device']}"


_OURS = ("settings.json", "summary.json", "choices.json", "report.html")
# What may differ between two runs of the same study; every step's file remembers its own.
_PLACE = ("device", "versions")


def prepare(out: Path, settings: dict[str, Any], *, force: bool) -> Study:
    """The folder, ready to be written to: new, or of a study with the same settings."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; a study needs a folder")
    present = {p.name for p in out.iterdir()} if out.exists() else set()
    if "settings.json" in present:
        old = json.loads((out / "settings.json").read_text())
        differs = sorted(k for k in {*old, *settings} - {*_PLACE} if old.get(k) != settings.get(k))
        if not differs:
            return Study.open(out)
        if not force:
            raise FileExistsError(
                f"{out} holds a study with other settings ({', '.join(differs)} differ); choose "
                "another folder, or overwrite it with force=True"
            )
    elif present and not force:
        raise FileExistsError(
            f"{out} is not empty and holds no study ({', '.join(sorted(present)[:4])}, ...); "
            "choose another folder, or write beside these files with force=True"
        )
    out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        (out / f"{step}.nc").unlink(missing_ok=True)
        (out / f"{step}.skipped").unlink(missing_ok=True)
    for name in _OURS:
        (out / name).unlink(missing_ok=True)
    write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")
    return Study(out, settings)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)
