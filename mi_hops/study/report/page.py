"""Put the sections together and write the page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mi_hops.result.files import replacing
from mi_hops.study.numbers import figures
from mi_hops.study.parts import Block, Text
from mi_hops.study.report.describe import describe
from mi_hops.study.report.opening import opening
from mi_hops.study.steps import steps_of
from mi_hops.study.study import Study, require_finished
from mi_hops.study.summary import headlines
from mi_hops.study.trust import how_far

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Section:
    """A part of a page: its anchor, its heads, and what it shows."""

    id: str
    title: str
    question: str
    blocks: list[Block]


def write_report(study: Study, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write a finished study as one HTML file that needs no network.

    plotly.js is included, compressed; fonts and light or dark mode follow the reader's settings. The
    same study gives the same file, byte for byte. The file is written whole or not at all.

    Args:
        study: from `run_study` or `Study.open`.
        path: of the file, ``report.html`` in the study's folder by default; its folder must exist.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        ValueError: the study is not finished, or the path does not end in ``.html``.
        FileExistsError: the file exists and `overwrite` is False.
        FileNotFoundError: the folder does not exist.

    Examples:
        >>> import mi_hops, tempfile
        >>> facts = mi_hops.Hopland().sample(train=0, held_out=1)
        >>> out, few = tempfile.mkdtemp(), mi_hops.StudySettings(sizes="quick")
        >>> study = mi_hops.run_study("hops-gpt2", facts, out=out, settings=few, progress=False)
        >>> mi_hops.write_report(study).name
        'report.html'
    """
    path = study.folder / "report.html" if path is None else Path(path)
    require_finished(study, "write the report")
    with replacing(path, suffix=".html", overwrite=overwrite) as partial:
        partial.write_text(_page(study), encoding="utf-8", newline="\n")
    return path


def _page(study: Study) -> str:
    places = {step.name: step.shown_in or step.name for step in steps_of(study)}
    return render(
        "report.html.jinja",
        title=f"Two-hop questions: {study.settings['model']}",
        found="What was found",
        model=study.settings["model"],
        opening=opening(study),
        headlines=[(places[step], line) for step, line in headlines(study.summary) if line.text],
        about=_about(study.settings, study.summary["made_with"]),
        settings=_settings(study.settings, study.records, study.budget),
        sections=_sections(study),
        files=sorted(p.name for p in study.folder.iterdir() if p.suffix in (".nc", ".json")),
    )


def render(template: str, **given: Any) -> str:
    """A page of this folder's templates, with plotly.js in it."""
    environment = Environment(
        loader=PackageLoader("mi_hops.study", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["together"] = _together
    environment.globals["draw"] = _draw
    return environment.get_template(template).render(library=_library(), **given)


def _library() -> str:
    """plotly.js's cartesian bundle (bars, heatmaps, lines), as it ships with the package: packed."""
    packed = files("mi_hops.study.report").joinpath("plotly-cartesian.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode()


def _sections(study: Study) -> list[Section]:
    """One of each step, but for those that are shown in another's."""
    steps = steps_of(study)
    sections = {
        step.name: Section(step.name, step.title, step.question, [])
        for step in steps
        if not step.shown_in
    }
    for step in steps:
        result = study.result(step.name)
        if result is None:
            what = step.short if step.shown_in else "This step"
            why = f"{what} was left out: {study.skipped(step.name) or 'it has not run'}."
            blocks: list[Block] = [Text(why, style="note")]
        else:
            blocks = list(step.section(result, study))
            if trusted := how_far(step.name):
                blocks.append(Text(trusted, style="note"))
        sections[step.shown_in or step.name].blocks.extend(blocks)
    return list(sections.values())


def _draw(plot: go.Figure, name: str, title: str) -> Any:
    """The data of a plot, and the place that the page's script draws it in once all is laid out.

    A plot drawn at once, as plotly's own HTML does, is as wide as its row, for the panels that will
    stand beside it are not there yet. The template is the page's own, one for light and one for dark.
    """
    figure = json.loads(str(plot.to_json()))
    figure["layout"].pop("template", None)
    data = json.dumps(figure, separators=(",", ":"), ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # no text can end the script element
    return Markup(
        '<div class="plot" id="plot-{0}" role="img" aria-label="{3}" style="height:{1}px"></div>\n'
        '<script type="application/json" data-plot="plot-{0}">{2}</script>'
    ).format(name, plot.layout.height, Markup(data), describe(plot, title))


def _together(text: str) -> str:
    """``n = 3`` and ``C = I`` never broken over two lines."""
    return text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _about(
    settings: Mapping[str, Any], made_with: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """What was studied with what, for the head of the page."""
    versions = {"mi_hops": settings["mi_hops"], **settings["versions"]}
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(made_with) > 1:
        parts = (f"{', '.join(steps)} with {other}" for other, steps in made_with.items())
        made += f". Resumed with others, so the steps differ: {'; '.join(parts)}"
    processing = settings["processing"]
    if processing != "none":
        processing += " (norms folded into the weights, these centred)"
    limit = "" if settings["limit"] is None else f" (limit {settings['limit']})"
    weights = f", {settings['weights']}" if "weights" in settings else ""
    return [
        ("Model", f"{settings['model']} (weights {settings['fingerprint']}{weights})"),
        ("Facts", f"n = {settings['n_facts']}{limit}; {settings['facts']['report']}"),
        ("Precision", f"{settings['dtype']} on {settings['device']}"),
        ("Backend", f"{settings['backend']}; weight processing: {processing}"),
        ("Seed", str(settings["seed"])),
        ("BOS", "before every prompt" if settings["bos"] else "not prepended"),
        ("Versions", made),
    ]


def _settings(
    settings: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    budget: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str]]:
    """All that was asked for, flat, and what each step took, for the end of the page."""
    rows = [("facts digest", settings["facts_digest"])]
    for name, value in settings["sizes"].items():
        text = ", ".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)
        rows.append((f"size: {name.replace('_', ' ')}", text))
    if settings["budget"] is not None:
        rows.append(("time budget", f"{settings['budget']:g} minutes"))
    for step, tried in budget.items():
        price = f"{tried['facts']} facts, by a trial at {figures(tried['seconds_each'])} s each"
        rows.append((f"budget: {step}", price))
    for step in settings["steps"]:
        if took := records.get(step):
            peak = f"memory at its peak so far {took.get('peak_memory', math.nan) / 2**30:.2f} GiB"
            rows.append((f"time: {step}", f"{took.get('seconds', math.nan):,.1f} s; {peak}"))
    return rows
