"""What the package shows: bounded signatures and files, one place for what is done once."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import mi_hops

PACKAGE = Path(mi_hops.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MOST_PARAMETERS = 10

#: Records whose fields are data, and commands whose parameters are the flags of a command line.
EXEMPT = {
    "mi_hops.facts.fact.TwoHopFact.__init__",
    "mi_hops.cli.study",
    "mi_hops.cli.train_world",
}


def modules():
    """Names of all modules but the one that runs the command line."""
    found = pkgutil.walk_packages(mi_hops.__path__, "mi_hops.")
    return [info.name for info in found if not info.name.endswith("__main__")]


def callables(module):
    """(name, function) of what a module defines in public: functions, constructors, methods."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            yield f"{module.__name__}.{name}", thing
        elif inspect.isclass(thing):
            for key, member in vars(thing).items():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and (key == "__init__" or not key.startswith("_")):
                    yield f"{module.__name__}.{name}.{key}", function


@pytest.mark.parametrize("name", modules())
def test_no_public_callable_has_more_than_ten_parameters(name):
    for where, function in callables(importlib.import_module(name)):
        given = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        assert len(given) <= MOST_PARAMETERS or where in EXEMPT, f"{where}: {given}"


def places(pattern, folders=(PACKAGE,)):
    """Lines of the sources in which a pattern occurs."""
    files = [p for folder in folders for p in sorted(folder.rglob("*.py")) if p != Path(__file__)]
    return [
        f"{p.name}:{i}"
        for p in files
        for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_what_is_done_once_stands_once():
    assert len(places(r"skipped\.append\(\(fact\.id")) == 1
    outside = [p for p in SOURCES if "model" not in p.relative_to(PACKAGE).parts[:1]]
    assert not [p for p in outside if "backend_of" in p.read_text(encoding="utf-8")]


def test_the_formatter_decides_and_torch_is_imported_at_the_top():
    root = PACKAGE.parent
    folders = [
        PACKAGE,
        *(root / name for name in ("tests", "benchmarks") if (root / name).is_dir()),
    ]
    assert len(places(r"# fmt: skip", folders)) < 30
    assert len(places(r"^\s+import torch$")) < 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_over_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
