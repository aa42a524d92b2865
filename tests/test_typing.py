"""A user's script passes mypy and pyright without an ignore; a misspelt public name fails both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mi_hops.model import hooked_class

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "typing"
MISSPELT = {4: "load_modle", 7: "find_gapp", 8: "pach"}
pytestmark = [pytest.mark.slow, pytest.mark.once]


def _scripts() -> list[str]:
    names = ["with_transformer_bridge.py", "misspelt.py"]
    if hooked_class() is not None:
        names.append("with_hooked_transformer.py")
    return [str(SCRIPTS / name) for name in names]


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_mypy():
    # With the package's own settings, strict as well: what `make types` found is not found again.
    done = _run("mypy", "--output=json", *_scripts(), cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    _check([(e["file"], e["line"], e["message"]) for e in found], done)


def test_pyright(tmp_path):
    done = _run(
        # Away from the package's own settings.
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        *_scripts(),
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = [(e["file"], e["range"]["start"]["line"] + 1, e["message"]) for e in found]
    _check(lines, done)


def _check(found: list[tuple[str, int, str]], done: subprocess.CompletedProcess[str]) -> None:
    in_users_scripts = [e for e in found if Path(e[0]).name != "misspelt.py"]
    assert in_users_scripts == [], done.stdout + done.stderr
    assert {line for _, line, _ in found} == set(MISSPELT), done.stdout + done.stderr
    assert all(MISSPELT[line] in message for _, line, message in found)
