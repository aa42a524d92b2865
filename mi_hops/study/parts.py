"""What a page is made of: paragraphs, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd

from mi_hops.facts.unusable import count_reasons
from mi_hops.result import plots
from mi_hops.result.figure_parts import GREY
from mi_hops.result.result import Result
from mi_hops.study.numbers import Estimate, left_out

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHARE = "share of questions"

#: The bar that is meant, and what it is compared with.
STRONG, FAINT = "#0072B2", "#9aa3ad"

#: Boxes around cells: seen on white, on dark blue and on black.
BOX = "#D55E00"


@dataclass(frozen=True)
class Text:
    """A paragraph; a ``note`` stands out, for what is missing or must not be missed."""

    kind: ClassVar[str] = "text"
    text: str
    style: Literal["plain", "note"] = "plain"


@dataclass(frozen=True)
class List:
    """A sentence and the points that follow from it."""

    kind: ClassVar[str] = "list"
    text: str
    points: Sequence[str]


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


Block = Text | List | Table | Figure


def used(result: Result) -> str:
    """``n = 100 facts; 3 left out (2: no bridge; 1: unequal lengths)``."""
    return f"n = {result.n_used} facts{left_out(count_reasons(result.skipped))}"


def row(given: Estimate, **labels: Any) -> dict[str, Any]:
    """An estimate as a row for `plots`: ``value``, ``lower``, ``upper``, ``n`` and labels."""
    names = {"value": "value", "lower": "low", "upper": "high"}
    return {**labels, **{k: short(given[v]) for k, v in names.items()}, "n": given["n"]}


def short(value: float | None) -> float:
    """Five digits, which is more than any interval allows; NaN for None."""
    return float("nan") if value is None else float(f"{value:.5g}")


def frame(intervals: Any, **labels: Any) -> pd.DataFrame:
    """`Result.ci` or `Result.difference_ci` as rows for `plots`, numbers shortened."""
    table = intervals.to_dataframe().reset_index()
    for name in ("estimate", "lower", "upper"):
        table[name] = table[name].map(short)
    return table.assign(**labels)


def panel(plot: go.Figure, *, height: int = 320) -> go.Figure:
    """A plot made ready for the page: its title is the page's, its legend lies above it."""
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    plot.update_layout(
        title=None,
        height=height,
        margin={"l": 52, "r": 12, "t": 34, "b": 46},
        legend={**legend, "title": None},
        dragmode=False,  # so that a finger scrolls the page; zoom is in the tool bar
    )
    plot.update_xaxes(title_standoff=8, automargin=True)
    plot.update_yaxes(title_standoff=8, automargin=True)
    return plot


def curves(
    parts: Iterable[pd.DataFrame],
    *,
    group: str,
    x_label: str,
    y_label: str,
    zero: bool = False,
    **options: Any,
) -> go.Figure:
    """Lines with bands over layers, from rows of `frame`; `zero` draws a line at 0.

    Args:
        options: for `plots.lines`.
    """
    options |= {"y": "estimate", "interval": ("lower", "upper"), "group": group}
    options |= {"title": "", "labels": {"layer": x_label, "estimate": y_label}}
    plot = plots.lines(pd.concat(parts), x="layer", **options)
    if zero:
        plot.add_hline(y=0, line={"color": GREY, "width": 1.2})
    return panel(plot)


def bars(
    rows: Iterable[Mapping[str, Any]],
    *,
    x: str,
    group: str | None = None,
    y_label: str = SHARE,
    height: int = 360,
    most: float = 1.0,
) -> go.Figure | None:
    """Bars of shares with intervals from rows of `row`; None where no row has a value."""
    data = pd.DataFrame(list(rows))
    if data.empty or data["value"].isna().all():
        return None
    options: dict[str, Any] = {"y": "value", "interval": ("lower", "upper"), "group": group}
    options |= {"title": "", "labels": {x: "", "value": y_label}, "y_range": (0, most)}
    plot = plots.bars(data, x=x, **options)
    # Plotly turns the labels where there is no room for them, as on a phone; lines keep them short.
    labels = [
        "<br>".join(wrap(label, 13, break_long_words=False)) for label in plot.layout.xaxis.ticktext
    ]
    plot.update_xaxes(tickangle=None, ticktext=labels, title=None)
    return panel(plot, height=height).update_yaxes(tickformat=".0%")


def heatmap(
    cells: Any,
    *,
    x: str,
    limits: tuple[float, float],
    colour_label: str,
    sequential: bool = False,
    boxes: Iterable[tuple[int, int]] = (),
    x_label: str | None = None,
) -> go.Figure:
    """Layers upward, the colour bar above them, values in the cells and boxes around some.

    Args:
        cells: ``estimate``, ``lower``, ``upper`` and ``n`` on (layer, x), as `Result.ci` gives them.
        boxes: (layer, x) indices of cells to put a box around.
        x_label: title of the axis; none where its labels say what it is.
    """
    array = cells["estimate"].astype(float).transpose("layer", x)
    hover = {"n": cells["n"], "95% from": cells["lower"], "to": cells["upper"]}
    colours = plots.Colours(colour_label, sequential, low=limits[0], high=limits[1])
    options: dict[str, Any] = {"title": "", "colours": colours, "labels": {x: x_label or x}}
    plot = plots.heatmap(array, x=x, y="layer", hover=hover, **options)
    panel(plot, height=130 + max(180, 30 * array.sizes["layer"]))
    if x_label is None:
        plot.update_xaxes(title=None)
    values = array.values
    if values.shape[0] <= 16 and values.shape[1] <= 12:
        words = [[_cell(v, sequential) for v in line] for line in values]
        plot.update_traces(text=words, texttemplate="%{text}", textfont={"size": 11})
    for layer, column in boxes:
        corners = {"x0": column - 0.5, "x1": column + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        plot.add_shape(type="rect", **corners, line={"color": BOX, "width": 3})
    place = {"orientation": "h", "x": 0.5, "xanchor": "center", "y": 1.02, "yanchor": "bottom"}
    size = {"lenmode": "fraction", "len": 0.9, "thickness": 10, "tickfont": {"size": 11}}
    title = {"text": colour_label, "side": "top", "font": {"size": 12}}
    ticks = {"nticks": 6, "ypad": 0, "tickformat": ".0%" if sequential else None}
    plot.update_layout(
        margin={"l": 48, "r": 12, "t": 8, "b": 46},
        coloraxis_colorbar={**place, **size, **ticks, "title": title},
    )
    return plot


def _cell(value: float, as_percent: bool) -> str:
    if not isfinite(value):
        return ""
    text = f"{100 * value:.0f}" if as_percent else f"{value:.2f}"
    return text.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")
