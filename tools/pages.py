"""What mkdocs cannot make by itself (``hooks`` in mkdocs.yml).

The notebooks as pages, with their figures; the public names of each part on the API pages;
``llms.txt``. The address of the repository is read from pyproject.toml.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
_NAMES = re.compile(r"^\{\{ names (?P<module>[\w.]+)(?P<first>[\w. ]*) \}\}$", re.M)
#: Of a figure's layout, what the page decides.
_OWN_LOOK = {"width", "template", "plot_bgcolor", "paper_bgcolor"}
_FIGURE = re.compile(r'<div class="figure".*?</script></div>')
#: Schemes of the theme -> plotly's templates.
_LOOKS = {"default": "plotly_white", "slate": "plotly_dark"}
_kept: dict[str, Any] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The addresses, from their one place."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = dict(re.findall(r'^(Repository|Documentation) = "(.+)"$', text, re.M))
    config.repo_url, config.site_url = urls["Repository"], urls["Documentation"]
    config.repo_name = "Repository"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, the script that draws their figures, and its looks in light and dark."""
    import plotly

    for path in NOTEBOOKS:
        text = notebook_page(path, urlsplit(config.repo_url or "").path.strip("/"))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    files.append(File.generated(config, "assets/plotly.min.js", abs_src_path=str(script)))
    looks = {scheme: plotly.io.templates[t].to_plotly_json() for scheme, t in _LOOKS.items()}
    text = f"window.plotlyLooks = {json.dumps(looks)};"
    files.append(File.generated(config, "assets/looks.js", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in a module's public names, the calls that the page names first."""
    return _NAMES.sub(lambda m: _entries(m["module"], m["first"].split()), markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Remember the order of the pages."""
    _kept["nav"] = nav
    return nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt, and the text of every page beside its HTML."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    section = ""
    for page in _kept["nav"].pages:
        source = page.file.src_uri
        text = _FIGURE.sub("(a figure)", page.markdown or "")
        (site / source).parent.mkdir(parents=True, exist_ok=True)
        (site / source).write_text(text, encoding="utf-8")
        top = page.ancestors[-1].title if page.ancestors else "Start"
        if top != section:
            lines += ["", f"## {top}", ""]
            section = top
        about = first_sentence(text)
        lines.append(f"- [{page.title}]({config.site_url}{source})" + f": {about}" * bool(about))
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_sentence(text: str) -> str:
    """The first sentence of a page's first paragraph, without markup."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    paragraphs = (p for p in re.split(r"\n\s*\n", text) if re.match(r"\s*[\w*\"`(\[]", p))
    flat = " ".join(next(paragraphs, "").split())
    flat = re.sub(r"\[([^\]]*)\][\[(][^\])]*[\])]", r"\1", flat).replace("*", "").replace("`", "")
    return re.split(r"(?<=[^.][.?!])\s", flat)[0]


# -- notebooks --------------------------------------------------------------------------------


def notebook_page(path: Path, repository: str) -> str:
    """A notebook as Markdown; figures are drawn by docs/assets/figures.js."""
    place = f"{repository}/blob/main/notebooks/{path.name}"
    colab = f"[Open in Colab](https://colab.research.google.com/github/{place}){{ .md-button }}"
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            if len(parts) == 1:  # below the title
                parts += [colab, "A CPU is enough. The first cell installs what is missing."]
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```py\n{source}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if PLOTLY in data:
        return figure(data[PLOTLY])
    if "text/html" in data:
        return _table("".join(data["text/html"]))
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def figure(plotted: dict[str, Any]) -> str:
    """A place for a figure, with its data; one line, so that Markdown leaves it as it is."""
    layout = {k: v for k, v in plotted["layout"].items() if k not in _OWN_LOOK}
    layout["font"] = {k: v for k, v in layout.get("font", {}).items() if k != "color"}
    shown = {"data": plotted["data"], "layout": layout}
    held = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    height = layout.get("height", 450)
    return (
        f'<div class="figure" style="min-height:{height}px">'
        f'<script type="application/json">{held}</script></div>'
    )


def _table(text: str) -> str:
    """A table without the looks of its own, one that scrolls where it is too wide."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<table[^>]*>", "<table>", text)
    text = re.sub(r'<tr style="[^"]*">', "<tr>", text)
    text = re.sub(r">[ ]*\n[ ]*", ">", text).strip()
    return f'<div class="table">{text}</div>'


# -- the API ----------------------------------------------------------------------------------


def public_names(module: str) -> dict[str, str]:
    """Public name of a package -> the module that defines it."""
    folder = ROOT.joinpath(*module.split("."))
    init = folder / "__init__.pyi"  # where the names are loaded lazily
    init = init if init.exists() else folder / "__init__.py"
    tree = ast.parse(init.read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: ".".join(
            [module] * node.level + [node.module] * bool(node.module)
        )
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


_ENTRY = "{show_root_heading: true, show_root_full_path: false, show_root_toc_entry: true, heading_level: 3}"


def _entries(module: str, first: list[str]) -> str:
    """The directives for all public names: those given, functions, classes, constants.

    Raises:
        ValueError: a name given that the module does not list.
    """
    names = public_names(module)
    if missing := [name for name in first if name not in names]:
        raise ValueError(f"{module} does not list {missing}")
    kind = {name: (name.isupper(), not name.islower()) for name in names}
    rest = sorted((n for n in names if n not in first), key=lambda n: (kind[n], n.lower()))
    return "\n\n".join(
        f"::: {names[name]}.{name}\n    options: {_ENTRY}" for name in [*first, *rest]
    )
