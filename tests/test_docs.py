"""The Python of README and documentation runs, page by page, as a reader would type it in."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if _code(page).strip()],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples write files
    exec(compile(_code(page), str(page), "exec"), {"__name__": "__page__"})


def test_links_of_the_readme_lead_somewhere():
    # mkdocs checks those of the documentation; the README is not part of it.
    links = _LINK.findall((ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
