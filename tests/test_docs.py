"""The Python of README and documentation runs, page by page, as a reader would type it in."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

from tests.models import require_real_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SHOWN = re.compile(r"^```py(?:thon)?\n(.*?)^```", re.DOTALL | re.MULTILINE)  # not run: ```py


def _code(page: Path) -> str:
    """The blocks of a page as one script, in which line numbers are the page's."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        for i, line in enumerate(block.group(1).splitlines()):
            lines[first + i] = line
    model = os.environ.get("MI_HOPS_MODEL", "hops-gpt2")
    return "\n".join(lines).replace('"hops-gpt2"', repr(model))


def test_there_are_pages_with_code():
    assert sum(bool(_code(page).strip()) for page in PAGES) >= 8


def _shown(path: Path) -> str:
    """All Python that a page or a notebook shows, whether it is run here or not."""
    if path.suffix == ".md":
        return "\n".join(_SHOWN.findall(path.read_text()))
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def _imports(code: str):
    """(module, name) of every import from the package; name is None in ``import module``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@pytest.mark.parametrize(
    "path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_examples_import_from_the_package_and_its_wings_alone(path):
    found = [(m, n) for m, n in _imports(_shown(path)) if m.split(".")[0] == "mi_hops"]
    assert [m for m, _ in found if m.count(".") > 1] == []
    for module, name in found:
        assert module in _packages(), module
        package = f"{module}.{name}" in _packages()
        assert name is None or package or name in _listed(module), f"{module} does not list {name}"


def _listed(module: str) -> set[str]:
    """The public names of a package: what its stub, or else its `__init__`, imports as themselves."""
    folder = ROOT.joinpath(*module.split("."))
    stub = folder / "__init__.pyi"
    listed = stub if stub.exists() else folder / "__init__.py"
    tree = ast.parse(listed.read_text())
    found = [n for node in tree.body if isinstance(node, ast.ImportFrom) for n in node.names]
    return {alias.name for alias in found if alias.name == alias.asname}


def _packages() -> set[str]:
    inits = (ROOT / "mi_hops").rglob("__init__.py")
    return {".".join(p.parent.relative_to(ROOT).parts) for p in inits}


def _costly(page: Path) -> bool:
    """Whether a page runs the real model or whole studies, which other tests do everywhere."""
    return any(word in _code(page) for word in ('"smollm2-135m"', "run_study"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.once) if _costly(page) else page
        for page in PAGES
        if _code(page).strip()
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    code = _code(page)
    if '"smollm2-135m"' in code:
        require_real_model()
    monkeypatch.chdir(tmp_path)  # examples write files
    exec(compile(code, str(page), "exec"), {"__name__": "__page__"})


def test_api_pages_name_what_is_public():
    asked = re.compile(r"^\{\{ names ([\w.]+)([\w. ]*) \}\}$", re.M)
    found = [
        pair for page in (ROOT / "docs").rglob("*.md") for pair in asked.findall(page.read_text())
    ]
    assert len(found) >= 12
    for module, first in found:
        assert set(first.split()) <= _listed(module), module
