"""Put the sections together and write the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_hops.report.parts import Section

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mi_hops.study.folder import Study


def write_report(study: Study, path: str | Path) -> Path:
    """Write a finished study as one HTML file that needs no network.

    plotly.js stands in the file once; fonts are the reader's own. The same study gives the same
    file, byte for byte. The file is written whole or not at all.

    Args:
        study: from `run_study` or `Study.open`.
        path: of the file; its folder must exist. A file that is there is replaced.

    Returns:
        The path.

    Raises:
        ValueError: the study is not finished.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not study.summary:
        raise ValueError(
            f"the study in {study.folder} is not finished (no summary.json); run it again to resume "
            "it, then write the report"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(render(study), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(study: Study) -> str:
    """The page of a finished study."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from mi_hops.report.findings import findings

    environment = Environment(
        loader=PackageLoader("mi_hops", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["together"] = _together
    sections = _sections(study)
    return environment.get_template("report.html.jinja").render(
        model=study.settings["model"],
        findings=findings(study.summary),
        about=_about(study.settings, study.summary["made_with"]),
        settings=_settings(study.settings),
        sections=sections,
        draw=_draw,
        plotly=Markup(get_plotlyjs()),
        files=sorted(p.name for p in study.folder.iterdir() if p.suffix in (".nc", ".json")),
    )  # fmt: skip


def _sections(study: Study) -> list[Section]:
    from mi_hops.report.behaviour import gap_section
    from mi_hops.report.creme import creme_section
    from mi_hops.report.injecting import injection_section
    from mi_hops.report.inside import erasure_section, lens_section, locate_section

    makers = (gap_section, lens_section, erasure_section, locate_section, injection_section,
              creme_section)  # fmt: skip
    return [make(study) for make in makers]


def _draw(plot: go.Figure, name: str) -> Any:
    """The data of a plot, and the place that the page's script draws it in once all is laid out.

    A plot drawn at once, as `plots.to_html` does, is as wide as its row, for the panels that will
    stand beside it are not there yet. The name stays the same from run to run.
    """
    from markupsafe import Markup

    data = str(plot.to_json()).replace("<", "\\u003c")  # no text can end the script element
    return Markup(
        '<div class="plot" id="plot-{0}" style="height:{1}px"></div>\n'
        '<script type="application/json" data-plot="plot-{0}">{2}</script>'
    ).format(name, plot.layout.height, Markup(data))


def _together(text: str) -> str:
    """``n = 3`` and ``C = I`` never broken over two lines."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _about(
    settings: Mapping[str, Any], made_with: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """What was studied with what, for the head of the page."""
    facts = settings["facts"]
    report = facts["report"]
    if facts["file"]:  # its folder is nobody's business
        report = f"{facts['file']}: {report.rpartition(facts['file'])[2].lstrip(': ')}"
    versions = {"mi_hops": settings["mi_hops"], **settings["versions"]}
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(made_with) > 1:
        parts = (f"{', '.join(steps)} with {other}" for other, steps in made_with.items())
        made += f". Resumed with others, so the steps differ: {'; '.join(parts)}"
    processing = settings["processing"]
    if processing != "none":
        processing += " (norms folded into the weights, these centred)"
    limit = "" if settings["limit"] is None else f" (limit {settings['limit']})"
    return [
        ("Model", f"{settings['model']} (weights {settings['fingerprint']})"),
        ("Facts", f"n = {settings['n_facts']}{limit}; {report}"),
        ("Precision", f"{settings['dtype']} on {settings['device']}"),
        ("Backend", f"{settings['backend']}; weight processing: {processing}"),
        ("Seed", str(settings["seed"])),
        ("Versions", made),
    ]


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that was asked for, flat, for the end of the page."""
    rows = [("facts digest", settings["facts_digest"])]
    for name, value in settings["sizes"].items():
        text = ", ".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)
        rows.append((f"size: {name.replace('_', ' ')}", text))
    return rows
