"""The parts that the figures of `plots` are made of: colour scales, ticks, bands, texts, style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.names import readable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MAX_TICKS = 40

#: Lines that can be seen on a light and on a dark background.
GREY = "#808080"


@dataclass(frozen=True)
class Colours:
    """What the colours of a heatmap mean.

    Attributes:
        label: what is drawn, with its unit.
        sequential: white to blue, for positive-only values, instead of red-white-blue.
        midpoint: value drawn white on the diverging scale.
        low, high: ends of the scale. Where one is missing the scale is symmetric about the midpoint;
            where both are, it reaches the largest distance from it. A sequential scale starts at 0
            (or the smallest value, if that is negative) and ends at the largest.
    """

    label: str = "effect"
    sequential: bool = False
    midpoint: float = 0.0
    low: float | None = None
    high: float | None = None

    @property
    def meaning(self) -> str:
        """What light and dark, red and blue stand for."""
        if self.sequential:
            return "darker: higher"
        if self.midpoint == 0:
            return "blue: positive, red: negative"
        return f"blue: above {self.midpoint:g}, red: below"

    def lines(self) -> list[str]:
        """Label and meaning, in lines that fit above a colour bar."""
        return [*wrap(self.label, 18), *(part.strip() for part in self.meaning.split(","))]


def head_label(layer: object, head: object) -> str:
    """``3, 11 -> "L3H11"``."""
    return f"L{layer}H{head}"


def as_text(value: Any) -> str:
    """Label of a coordinate value: short for floats, the readable name of a code name."""
    if isinstance(value, float | np.floating):
        return as_number(value, 6)
    return readable(value)


def as_number(value: Any, digits: int = 6) -> str:
    """A number with so many significant digits, without a sign at zero; anything else as it is."""
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value + 0.0:.{digits}g}"  # -0.0 + 0.0 is 0.0


def markup(text: str) -> str:
    """A text for plotly, which reads some HTML: ``"<s>"`` would be dropped as a tag."""
    return escape(text, quote=False)


def hover_text(where: Sequence[str], value: Any, more: Mapping[str, Any]) -> str:
    """Hover text of a cell: where it is, its value, and further numbers by name."""
    numbers = (f"{name}: {as_number(number)}" for name, number in more.items())
    return "<br>".join([*map(markup, where), f"<b>{as_number(value)}</b>", *map(markup, numbers)])


def colour_scale(values: np.ndarray, colours: Colours) -> dict[str, Any]:
    """Colour scale and its ends; white stays at the midpoint even between unequal ends."""
    from plotly.colors import sample_colorscale

    midpoint, ends = colours.midpoint, (colours.low, colours.high)
    finite = values[np.isfinite(values)].astype(float)
    if colours.sequential:
        low = min(0.0, finite.min(initial=0.0)) if colours.low is None else colours.low
        high = finite.max(initial=low) if colours.high is None else colours.high
        if colours.high is None and high <= low:
            high = low + 1.0
        scale: Any = "Blues"
    else:
        given = [abs(end - midpoint) for end in ends if end is not None]
        extent = max(given) if given else np.abs(finite - midpoint).max(initial=0.0) or 1.0
        low = midpoint - extent if colours.low is None else colours.low
        high = midpoint + extent if colours.high is None else colours.high
        scale = "RdBu"
        if not np.isclose(high - midpoint, midpoint - low):
            points = np.linspace(low, high, 33)
            shades = np.clip(0.5 + (points - midpoint) / (2 * extent or 1.0), 0, 1)
            steps = np.linspace(0, 1, len(points))
            scale = list(
                zip(steps.tolist(), sample_colorscale("RdBu", shades.tolist()), strict=True)
            )
    if not low < high:
        raise ValueError(
            f"the colour scale would run from {low} to {high}; give Colours with low < high"
        )
    return {"colorscale": scale, "cmin": float(low), "cmax": float(high)}


def tick_settings(
    labels: Sequence[str], limit: int = MAX_TICKS, *, slant: bool = True, room: int = 90
) -> dict[str, Any]:
    """Axis settings that paint labels on indices; every k-th where they would not all fit.

    Labels that are longer together than `room` letters are slanted.
    """
    step = max(1, ceil(len(labels) / max(limit, 1)))
    shown = list(range(0, len(labels), step))
    long = max((len(label) for label in labels), default=0) * len(shown) > room
    return {
        "tickmode": "array",
        "tickvals": shown,
        "ticktext": [markup(labels[index]) for index in shown],
        "tickangle": -40 if slant and long else 0,
        "automargin": True,
    }


def as_frame(data: pd.DataFrame | Mapping[str, Any], *columns: str | None) -> pd.DataFrame:
    """The data as a frame that has all the named columns."""
    import pandas as pd

    frame = pd.DataFrame(data)
    missing = [name for name in columns if name is not None and name not in frame.columns]
    if missing:
        raise ValueError(f"no column {missing} in the data; there are {list(frame.columns)}")
    return frame


def by_group(frame: pd.DataFrame, group: str | None, x: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each line or set of bars, in order of appearance; each has one point at an x."""
    parts = [("", frame)]
    if group is not None:
        groups = frame.groupby(group, sort=False, observed=True)
        parts = [(as_text(name), part) for name, part in groups]
    for name, part in parts:
        if part[x].duplicated().any():
            raise ValueError(
                f"{name or 'the data'} has several rows at one {x!r}; average them or name a group"
            )
    return parts


def band_outline(
    x: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> tuple[list[float | None], list[float | None]]:
    """Outline of the area between two curves: one closed polygon for each run of finite bounds."""
    across: list[float | None] = []
    along: list[float | None] = []
    known = np.isfinite(lower) & np.isfinite(upper)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if across:
            across.append(None)
            along.append(None)
        run = slice(start, stop)
        across += [*x[run].tolist(), *x[run][::-1].tolist()]
        along += [*upper[run].tolist(), *lower[run][::-1].tolist()]
    return across, along


def interval_words(part: pd.DataFrame, interval: tuple[str, str] | None) -> list[str]:
    """`` [0.1, 0.3]`` for each row, empty where there is no interval; ``n`` where the frame has it."""
    words = []
    for _, row in part.iterrows():
        text = ""
        if interval is not None and np.isfinite(ends := [row[end] for end in interval]).all():
            text += f" [{as_number(float(ends[0]))}, {as_number(float(ends[1]))}]"
        if "n" in part.columns:
            text += f"<br>n: {row['n']:g}"
        words.append(text)
    return words


def add_references(figure: go.Figure, references: Mapping[str, float] | None) -> None:
    """Dotted horizontal lines with their names."""
    for name, value in (references or {}).items():
        figure.add_hline(
            y=float(value),
            line={"color": GREY, "width": 1.4, "dash": "dot"},
            annotation={
                "text": f"{markup(readable(name))} {as_number(float(value), 3)}",
                "font": {"size": 11},
            },
            annotation_position="top right",
        )


def see_through(colour: str, opacity: float) -> str:
    """A hexadecimal colour, made transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def apply_style(
    figure: go.Figure, title: str, layout: Mapping[str, Any], *, legend: str | None = None
) -> None:
    """A title of several lines if need be, margins, and last what the caller asks of the layout.

    Colours of ink and background are the template's, by default that of `plotly.io.templates`.
    """
    letters = max(20, int(layout["width"] / 8.6)) if layout.get("width") else 88
    broken = [piece for line in title.split("\n") for piece in (wrap(line, letters) or [""])]
    height = layout.get("height") or 450
    figure.update_layout(
        title={
            "text": "<br>".join(map(markup, broken)),
            "font": {"size": 16},
            "x": 0.01,
            "xanchor": "left",
            "y": 1 - 16 / height,
            "yanchor": "top",
        },
        margin={"l": 64, "r": 24, "t": 44 + 20 * len(broken), "b": 56},
        hoverlabel={"align": "left"},
        legend={"title": {"text": legend and markup(readable(legend))}, "font": {"size": 12}},
    )
    figure.update_layout(layout)
