"""What a figure shows, in words: for those who cannot see it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import unescape
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.figure_parts import as_number

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Bars or lines that are told one by one.
_MOST = 12


def describe(plot: go.Figure, title: str) -> str:
    """``"Bars of share answered. suffix: first hop 90%, ..."``: the kind of figure and its values.

    Args:
        title: what stands above the figure.
    """
    parts = [title] if title else []
    x, y = (_text(axis.title.text) for axis in (plot.layout.xaxis, plot.layout.yaxis))
    kinds = {trace.type for trace in plot.data}
    what = {"bar": "Bars", "heatmap": "Heatmap"}.get(next(iter(kinds), ""), "Lines")
    axes = " by ".join(name for name in (y, x) if name)
    parts.append(f"{what} of {axes}" if axes else what)
    told = list(_told(plot))
    parts += told[:_MOST]
    if len(told) > _MOST:
        parts.append(f"and {len(told) - _MOST} more")
    return ". ".join(part.rstrip(". ") for part in parts) + "."


def _told(plot: go.Figure) -> Iterator[str]:
    percent = "%" in str(plot.layout.yaxis.tickformat)
    for trace in plot.data:
        if trace.type == "heatmap":
            yield _cells(plot, np.asarray(trace.z, dtype=float))
        elif trace.type == "bar":
            values = zip(trace.text or trace.x, trace.y, strict=False)
            yield _named(
                trace.name, ", ".join(f"{_text(a)} {_value(b, percent)}" for a, b in values)
            )
        elif "markers" in str(trace.mode):
            yield _named(trace.name, _course(trace.x, np.asarray(trace.y, dtype=float), percent))


def _course(x: Sequence[Any], y: np.ndarray, percent: bool) -> str:
    known = np.flatnonzero(np.isfinite(y))
    if not len(known):
        return "no values"
    first, last, top = known[0], known[-1], known[np.argmax(y[known])]
    ends = (
        f"from {_value(y[first], percent)} at {x[first]} to {_value(y[last], percent)} at {x[last]}"
    )
    return f"{ends}, largest {_value(y[top], percent)} at {x[top]}"


def _cells(plot: go.Figure, z: np.ndarray) -> str:
    if not np.isfinite(z).any():
        return "no values"
    found = []
    for word, at in (("largest", np.nanargmax(z)), ("smallest", np.nanargmin(z))):
        row, column = map(int, np.unravel_index(at, z.shape))
        where = f"{_tick(plot.layout.yaxis, row)}, {_tick(plot.layout.xaxis, column)}"
        found.append(f"{word} {_value(z[row, column], False)} at {where}")
    return ", ".join(found)


def _tick(axis: Any, index: int) -> str:
    places = list(axis.tickvals or ())
    return _text(axis.ticktext[places.index(index)]) if index in places else str(index)


def _named(name: Any, text: str) -> str:
    return f"{_text(name)}: {text}" if name else text


def _value(value: Any, percent: bool) -> str:
    number = float(value)
    if not isfinite(number):
        return "no value"
    return f"{number:.0%}" if percent else as_number(number, 3)


def _text(markup: Any) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", str(markup or ""))).strip()
