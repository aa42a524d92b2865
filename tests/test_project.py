"""What stands around the package: addresses, versions, what the workflows call, links."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import mi_hops

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in ROOT.glob("*.md") if p.name != "CHANGELOG.md")


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", _read("CHANGELOG.md"), re.M)
    cited = re.search(r"^version: (.+)$", _read("CITATION.cff"), re.M)
    assert newest and cited
    assert newest[1] == cited[1] == mi_hops.__version__
    assert f"\n## {mi_hops.__version__}\n" in _read("docs/release-notes.md")


def test_addresses_that_do_not_exist_yet_stand_in_one_place():
    texts = {".md", ".toml", ".yml", ".yaml", ".cff", ".json", ".ipynb", ".py", ".js"}
    found = [
        path.relative_to(ROOT).as_posix()
        for path in _tracked()
        if path.suffix in texts and path.exists()
        if re.search(r"OWNER[/.]", path.read_text(encoding="utf-8"))
    ]
    assert [name for name in found if not name.startswith("tests/")] == ["pyproject.toml"]


def test_workflows_call_what_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", _read("Makefile"), re.M))
    for name in ("ci", "newest"):
        parts = re.findall(r"part: \[(.+)\]", _read(f".github/workflows/{name}.yml"))
        called = {part.strip() for line in parts for part in line.split(",")}
        assert called and called <= targets
    in_ci = {
        t
        for line in re.findall(r"^(?:both|tests) (.+)$", _read(".ci/run"), re.M)
        for t in line.split()
    }
    assert {"lint", "types", "docs", "dist-check", "test", "test-tl4"} <= in_ci <= targets


def test_the_devcontainer_is_json():
    assert json.loads(_read(".devcontainer/devcontainer.json"))["postCreateCommand"] == "make env"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    # mkdocs checks those of the documentation.
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}


def test_addresses_of_others_are_the_ones_expected():
    # Nothing is fetched here; a new host is a decision.
    known = {
        "arxiv.org", "colab.research.google.com", "contributor-covenant.org", "github.com",
        "keepachangelog.com", "plotly.com", "semver.org", "transformerlensorg.github.io",
    }  # fmt: skip
    hosts = {
        host.removeprefix("www.")
        for path in (*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
        for host in re.findall(r"\]\(https?://([^/)]+)", path.read_text(encoding="utf-8"))
    }
    assert hosts <= known
