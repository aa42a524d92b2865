"""A finished study, reopened by the command that made it, without loading the model; no torch here.

Beside its results the command leaves ``call.json``: what was asked, and size and time of every file
that decides the answer. As long as nothing of it has changed, there is nothing to run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mi_hops._version import __version__
from mi_hops.result.files import replacing

_FILE = "call.json"
_REPORT = "report.html"
_PACKAGE = Path(__file__).parents[1]


def remember(folder: Path, call: Mapping[str, Any], inputs: Iterable[Path]) -> None:
    """Write down what a finished study was asked, and what it was made from.

    Args:
        call: the options, as JSON has them.
        inputs: files of model and facts.
    """
    made = {"call": dict(call), "made": _state(folder, inputs), "mi_hops": __version__}
    with replacing(folder / _FILE, overwrite=True) as partial:
        partial.write_text(json.dumps(made, indent=1) + "\n")


def reopened(folder: Path, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of the finished study that this call made; None where there may be more to do.

    Nothing to run: the same call, inputs, code and report, and every step's files as they were written.
    """
    try:
        kept = json.loads((folder / _FILE).read_text())
        same = kept["call"] == json.loads(json.dumps(call)) and kept["mi_hops"] == __version__
        if not same or kept["made"] != _state(folder, map(Path, kept["made"]["inputs"])):
            return None
        steps = json.loads((folder / "steps.json").read_text())
        for step in ("summary", *json.loads((folder / "settings.json").read_text())["steps"]):
            files = steps[step]["files"]
            if not files or any(checksum(folder / name) != was for name, was in files.items()):
                return None
        return dict(json.loads((folder / "summary.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, its first half."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _state(folder: Path, inputs: Iterable[Path]) -> dict[str, Any]:
    """What a finished study depends on."""
    return {
        "inputs": {str(path): _stamp(path) for path in sorted(inputs)},
        "code": max(path.stat().st_mtime_ns for path in _PACKAGE.rglob("*.py")),
        "report": checksum(folder / _REPORT),
    }


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
