"""Importing is cheap, every public name and module is there, and the wheel carries the data."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mi_hops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(mi_hops.__file__).parent
HEAVY = ("torch", "transformer_lens", "transformers", "plotly", "pandas", "xarray")


def _modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], prefix="mi_hops.")
    return sorted(module.name for module in found)


@pytest.mark.parametrize(
    ("use", "unloaded"),
    [
        ("dir(mi_hops)", HEAVY),
        (
            "mi_hops.load_facts('hopland'); mi_hops.Hopland(); mi_hops.planted_models()",
            ("torch", "transformer_lens", "transformers"),
        ),
    ],
)
def test_what_needs_no_model_loads_nothing_heavy(use, unloaded):
    code = f"import sys, mi_hops; {use}; print([n for n in {unloaded} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mi_hops.__all__)
def test_every_public_name_resolves(name):
    assert getattr(mi_hops, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = mi_hops.no_such_thing


def test_the_stub_is_the_one_list_of_public_names():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert tree.body == imports
    names = [(alias.name, alias.asname) for node in imports for alias in node.names]
    assert [pair for pair in names if pair[0] != pair[1]] == []  # else no re-export
    assert sorted(name for name, _ in names) == mi_hops.__all__ == dir(mi_hops)


def test_every_wing_is_an_attribute():
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert wings - set(mi_hops.__all__) == set()


def test_wings_list_their_names_as_the_stub_does():
    for path in (*PACKAGE.glob("*/__init__.py"), PACKAGE / "editing/baselines/__init__.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        names = [alias for node in imports for alias in node.names]
        assert all(alias.name == alias.asname for alias in names), path  # else no re-export
        assert len({alias.name for alias in names}) == len(names), path


def test_the_modules_are_found():
    assert {"mi_hops.cli", "mi_hops.facts.fact", "mi_hops.worlds.train"} <= set(_modules())


@pytest.mark.parametrize("name", _modules())
def test_every_module_imports(name):
    importlib.import_module(name)


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_tests_touch_no_private_name():
    """Neither `from mi_hops... import _name` nor `thing._name` of what came from there."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        ours = [
            alias
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mi_hops")
            for alias in node.names
        ]
        names = {alias.asname or alias.name for alias in ours}
        found += [f"{path.name}: {name}" for name in names if re.match("_(?!_)", name)]
        found += [
            f"{path.name}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and re.match("_(?!_)", node.attr)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
        ]
    assert found == []


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mi_hops-{mi_hops.__version__}-py3-none-any.whl"
    packed = set(zipfile.ZipFile(wheel).namelist())

    files = (p.relative_to(ROOT) for p in PACKAGE.rglob("*") if p.is_file())
    wanted = {p.as_posix() for p in files if "__pycache__" not in p.parts}
    assert "mi_hops/py.typed" in packed
    assert wanted - packed == set()
    tops = {name.split("/")[0] for name in packed}
    assert tops == {"mi_hops", f"mi_hops-{mi_hops.__version__}.dist-info"}
