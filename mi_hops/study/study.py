"""A study, read back from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.result.display import html_table, shorten
from mi_hops.result.netcdf import read_header
from mi_hops.result.result import Result
from mi_hops.study.folder import Folder, read_json
from mi_hops.study.steps import STEPS

_KINDS = {step.name: step.kind for step in STEPS}


@dataclass(repr=False)
class Study(Folder):
    """A study's folder, read back: its settings and the result of each step.

    Attributes:
        folder: where the files are.
        settings: what was asked for, with model and facts fingerprints.
        summary: the headline numbers, as in ``summary.json``.

    Examples:
        >>> import mi_hops, tempfile
        >>> mi_hops.Study.open(tempfile.mkdtemp())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: ... holds no study (no settings.json)
    """

    @classmethod
    def open(cls, folder: str | Path) -> Study:
        """Reopen a finished or unfinished study.

        Raises:
            ValueError: the folder holds no study, or a damaged one.
        """
        folder = Path(folder)
        if not (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds no study (no settings.json)")
        settings = read_json(folder / "settings.json")
        summary = folder / "summary.json"
        return cls(folder, settings, read_json(summary) if summary.exists() else {})

    def __repr__(self) -> str:
        lines = [f"Study of {self.settings['model']} in {self.folder}"]
        lines += [f"{name}: {text}" for name, text in self.headlines()] or ["not finished"]
        return shorten("\n".join(lines), 1900)

    def _repr_html_(self) -> str:
        title = f"Study of {self.settings['model']} in {self.folder}"
        rows = self.headlines() or [("", "not finished")]
        return html_table(title, ("number", "value [95%]"), rows, total=len(rows))

    def result(self, step: str) -> Result | Evaluation | None:
        """What a step measured: a `Gap`, `FailureTypes`, an `Evaluation`, else a plain `Result`.

        None if it was skipped or has not run.
        """
        path = self.path(step)
        return _KINDS[step].load(path) if path.exists() else None

    def made_with(self) -> dict[str, list[str]]:
        """Versions and device -> the steps whose files were made with them.

        More than one entry where a study was resumed with others.
        """
        found: dict[str, list[str]] = {}
        for step in self.settings["steps"]:
            if self.path(step).exists():
                made = made_with(read_header(self.path(step))["provenance"])
                found.setdefault(made, []).append(step)
        return found

    def headlines(self) -> list[tuple[str, str]]:
        """Name and value of the numbers a terminal should show."""
        return [(line["name"], line["text"]) for line in self.summary.get("headlines", [])]


def require_finished(study: Study, then: str) -> None:
    """Refuse a study without a summary.

    Raises:
        ValueError: with what to do first, and `then`.
    """
    if not study.summary:
        raise ValueError(
            f"the study in {study.folder} is not finished (no summary.json); run it again to resume "
            f"it, then {then}"
        )


def made_with(provenance: Mapping[str, Any]) -> str:
    """``"torch 2.13.0, transformers 5.1.0 on cpu"``, of a result or of a study's settings."""
    versions = (f"{name} {version}" for name, version in provenance["versions"].items())
    return f"{', '.join(versions)} on {provenance['device']}"
