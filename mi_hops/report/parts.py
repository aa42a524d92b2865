"""What a page is made of: sections of paragraphs, tables and figures, and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mi_hops.facts.unusable import count_reasons, describe_reasons

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mi_hops.result.result import Result
    from mi_hops.study.folder import Study

#: An estimate as in ``summary.json``: ``value``, ``low``, ``high`` and ``n``.
Estimate = Mapping[str, Any]

SHARE = "share of questions"

#: The bar that is meant, and what it is compared with.
STRONG, FAINT = "#0072B2", "#9aa3ad"


@dataclass(frozen=True)
class Text:
    """A paragraph; a ``note`` stands out, for what is missing or must not be missed."""

    kind: ClassVar[str] = "text"
    text: str
    style: Literal["plain", "note"] = "plain"


@dataclass(frozen=True)
class Table:
    """A table of plain strings.

    Attributes:
        title: above the table; the line to click where it is folded.
        columns: their heads.
        rows: cells, as strings.
        note: what the numbers are, under the table.
        texts: how many columns from the left hold words; the others are numbers, set right.
        fold: show it on a click.
        marked: indices of rows that stand out.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: int = 1
    fold: bool = False
    marked: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """One or several plots side by side under one title.

    Attributes:
        panels: (title, plot); an only plot needs no title of its own.
        caption: what was measured, averaged over what, n, and how to read it.
        width: pixels that a panel needs; fewer stand side by side on a narrow screen.
    """

    kind: ClassVar[str] = "figure"
    title: str
    panels: Sequence[tuple[str, go.Figure]]
    caption: str
    width: int = 340


Block = Text | Table | Figure


@dataclass
class Section:
    """A step of the study on the page."""

    id: str
    title: str
    question: str
    blocks: list[Block] = field(default_factory=list)


def cell_place(cell: Mapping[str, Any]) -> str:
    """Where an injection's cell puts the memory: "layer 3", or "all layers"."""
    layer = str(cell["layer"])
    return "all layers" if "+" in layer else f"layer {layer}"


def opened(study: Study, step: str, title: str, question: str) -> tuple[Section, Result | None]:
    """The section of a step, and its result; where there is none the section says why."""
    section = Section(step, title, question)
    result = study.result(step)
    if result is None:
        section.blocks.append(left_out(study.skipped(step)))
    return section, result


def left_out(reason: str | None) -> Text:
    """The block of a step that has no result."""
    return Text(f"This step was left out: {reason or 'it has not run'}.", style="note")


def percent(share: Estimate, *, n: bool = True) -> str:
    """``37.8% [35.1, 40.5], n = 1290``."""
    if share["value"] is None:
        return "no case"
    text = f"{share['value']:.1%}{_interval(share, lambda end: f'{100 * end:.1f}')}"
    text = text.replace("-", "\N{MINUS SIGN}")
    return f"{text}, n = {share['n']}" if n else text


def number(estimate: Estimate, *, n: bool = True, signed: bool = True) -> str:
    """``-0.078 [-0.122, -0.034], n = 100``; large and small numbers with three digits."""
    if estimate["value"] is None:
        return "no case"
    text = f"{figures(estimate['value'], signed=signed)}"
    text += _interval(estimate, lambda end: figures(end, signed=signed))
    return f"{text}, n = {estimate['n']}" if n else text


def figures(value: float | None, *, signed: bool = False) -> str:
    """A number as a table shows it: three decimals, or three digits where these say nothing."""
    if value is None or not isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if value == 0 or 0.001 <= abs(value) < 100:
        text = f"{value:{sign}.3f}"
    elif 0.0001 <= abs(value) < 0.001:
        text = f"{value:{sign}.4f}"
    elif abs(value) >= 100:
        text = f"{value:{sign},.0f}"
    else:
        text = f"{value:{sign}.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def _interval(estimate: Estimate, show: Any) -> str:
    ends = (estimate["low"], estimate["high"])
    if any(end is None or not isfinite(end) for end in ends):
        return " (no interval)"
    return f" [{show(ends[0])}, {show(ends[1])}]"


def at(cell: Any) -> dict[str, Any]:
    """One cell of `Result.ci` or `Result.difference_ci` as an estimate."""
    values = {name: float(cell[name]) for name in ("estimate", "lower", "upper")}
    value, low, high = (v if isfinite(v) else None for v in values.values())
    return {"value": value, "low": low, "high": high, "n": int(cell["n"])}


def row(estimate: Estimate, **labels: Any) -> dict[str, Any]:
    """An estimate as a row for `plots`: ``value``, ``lower``, ``upper``, ``n`` and labels."""
    ends = {"value": estimate["value"], "lower": estimate["low"], "upper": estimate["high"]}
    return {**labels, **{k: short(v) for k, v in ends.items()}, "n": estimate["n"]}


def short(value: float | None) -> float:
    """Five digits, which is more than any interval allows; NaN for None."""
    return float("nan") if value is None else float(f"{value:.5g}")


def frame(intervals: Any, **labels: Any) -> pd.DataFrame:
    """`Result.ci` or `Result.difference_ci` as rows for `plots`, numbers shortened."""
    table = intervals.to_dataframe().reset_index()
    for name in ("estimate", "lower", "upper"):
        table[name] = table[name].map(short)
    return table.assign(**labels)


def used(result: Result) -> str:
    """``n = 100 facts; 3 left out (2: no bridge; 1: unequal lengths)``."""
    return f"n = {result.n_used} facts{left_over(count_reasons(result.skipped))}"


def left_over(counts: Mapping[str, int]) -> str:
    """``; 3 left out (2: no bridge; 1: unequal lengths)``, or nothing."""
    return f"; {sum(counts.values())} left out ({describe_reasons(counts)})" if counts else ""


def layers(numbers: Sequence[int]) -> str:
    """``layers 2 to 4``, ``layer 5``, ``layers 1, 4``."""
    if not numbers:
        return "no layer"
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"


def panel(
    plot: go.Figure,
    *,
    height: int = 320,
    y_range: tuple[float, float] | None = None,
    as_percent: bool = False,
) -> go.Figure:
    """A plot made ready for the page: its title is the page's, its legend lies above it."""
    plot.update_layout(
        title=None,
        height=height,
        margin={"l": 52, "r": 12, "t": 34, "b": 46},
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"},
        hoverlabel={"font": {"family": "system-ui, -apple-system, Segoe UI, sans-serif"}},
        legend={
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
            "title": None,
        },
        dragmode=False,  # so that a finger scrolls the page; zoom is in the tool bar
    )  # fmt: skip
    plot.update_xaxes(title_standoff=8, automargin=True)
    plot.update_yaxes(title_standoff=8, automargin=True)
    if y_range is not None:
        plot.update_yaxes(range=y_range)
    if as_percent:
        plot.update_yaxes(tickformat=".0%")
    return plot


def bars(rows: Iterable[Mapping[str, Any]], *, x: str, group: str | None = None, y_label: str = SHARE,
         height: int = 360, most: float = 1.0, **options: Any) -> go.Figure | None:  # fmt: skip
    """Bars of shares with intervals from rows of `row`; None where no row has a value."""
    import pandas as pd

    from mi_hops.result import plots

    data = pd.DataFrame(list(rows))
    if data.empty or data["value"].isna().all():
        return None
    plot = plots.bars(
        data, x=x, y="value", group=group, lower="lower", upper="upper", title="",
        x_label="", y_label=y_label, **options,
    )  # fmt: skip
    # Plotly turns the labels where there is no room for them, as on a phone; lines keep them short.
    labels = [
        "<br>".join(wrap(label, 13, break_long_words=False)) for label in plot.layout.xaxis.ticktext
    ]
    plot.update_xaxes(tickangle=None, ticktext=labels, title=None)
    return panel(plot, height=height, y_range=(0, most), as_percent=True)


def heatmap(
    array: Any,
    *,
    x: str,
    height: int,
    limits: tuple[float, float],
    colour_label: str,
    hover: Mapping[str, Any],
    sequential: bool = False,
    boxes: Iterable[tuple[int, int]] = (),
    x_label: str | None = None,
) -> go.Figure:
    """Layers upward, with the colour bar under it, values in the cells and boxes around some.

    Args:
        array: [layer, x] in any order.
        boxes: (layer, x) indices of cells to put a box around.
        x_label: title of the axis; none where its labels say what it is.
    """
    from mi_hops.result import plots

    array = array.astype(float)
    plot = plots.heatmap(
        array, x=x, y="layer", title="", zmin=limits[0], zmax=limits[1], sequential=sequential,
        hover=hover, x_label=x_label, colour_label=colour_label,
    )  # fmt: skip
    panel(plot, height=height)
    if x_label is None:
        plot.update_xaxes(title=None)
    cells = array.transpose("layer", x).values
    if cells.shape[0] <= 16 and cells.shape[1] <= 12:
        words = [[_cell(v, sequential) for v in line] for line in cells]
        plot.update_traces(text=words, texttemplate="%{text}", textfont={"size": 11})
    for layer, column in boxes:
        plot.add_shape(
            type="rect", x0=column - 0.5, x1=column + 0.5, y0=layer - 0.5, y1=layer + 0.5,
            line={"color": "#111111", "width": 2.5},
        )  # fmt: skip
    plot.update_layout(
        margin={"l": 48, "r": 12, "t": 8, "b": 46},
        coloraxis_colorbar={
            "orientation": "h", "x": 0.5, "xanchor": "center", "y": 1.02, "yanchor": "bottom",
            "lenmode": "fraction", "len": 0.9, "thickness": 10, "tickfont": {"size": 11},
            "title": {"text": colour_label, "side": "top", "font": {"size": 12}},
            "nticks": 6, "ypad": 0, "tickformat": ".0%" if sequential else None,
        },
    )  # fmt: skip
    return plot


def _cell(value: float, as_percent: bool) -> str:
    if not isfinite(value):
        return ""
    text = f"{100 * value:.0f}" if as_percent else f"{value:.2f}"
    return text.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")
