"""Plotly figures from labelled arrays and data frames.

Every function returns a `plotly.graph_objects.Figure`: nothing is shown, no global template is
changed, and plotly is imported on the first call only. The conventions:

- effects are drawn in red-white-blue around a midpoint (0 by default) with symmetric limits, positive
  **blue**; the colour bar says so. Positive-only values (probabilities, ranks) go from white to blue;
- cells without a value (NaN) are grey, which no colour scale here contains;
- tokens are labelled with their position (``" of 3"``), so that equal tokens stay apart; heads are
  ``L{layer}H{head}``; layers run upward from 0;
- intervals are bands around lines and error bars on bars, and stand in the hover text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

#: Colours that stay apart for colour-blind readers (Okabe and Ito), darkest contrast first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up")
_FONT = "Helvetica, Arial, sans-serif"
_MISSING = "#d9d9d9"
_MAX_TICKS = 40


def token_label(token: str, position: object) -> str:
    """``" of"``, 3 -> ``" of 3"``: visible, unique in a prompt, safe in plotly's markup.

    Line breaks and tabs are written as escapes and an empty or blank token as ``␣``, and ``<s>`` is
    escaped, which plotly would otherwise take for a tag and drop.
    """
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"{escape(shown, quote=False) if shown.strip() else '␣'} {position}"


def head_label(layer: object, head: object) -> str:
    """``3, 11 -> "L3H11"``."""
    return f"L{layer}H{head}"


def axis_labels(array: xr.DataArray, dim: str) -> list[str]:
    """One tick label for each index of `dim`.

    A coordinate ``token`` along the axis is shown with the position; heads become ``H{h}``, or
    ``L{l}H{h}`` where the array belongs to one layer; other labels are shown as they are. Labels that
    repeat get their index.
    """
    values = array[dim].values if dim in array.coords else np.arange(array.sizes[dim])
    if "token" in array.coords and array["token"].dims == (dim,):
        tokens = [str(token) for token in array["token"].values]
        places = values if np.issubdtype(values.dtype, np.number) else np.arange(len(tokens))
        return [token_label(token, place) for token, place in zip(tokens, places, strict=True)]
    if dim == "head" and np.issubdtype(values.dtype, np.integer):
        if "layer" in array.coords and array["layer"].ndim == 0:
            return [head_label(array["layer"].item(), head) for head in values]
        return [f"H{head}" for head in values]
    labels = [_text(value) for value in values]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {index}" for index, label in enumerate(labels)]
    return labels


def heatmap(
    array: xr.DataArray,
    *,
    x: str,
    y: str,
    title: str,
    facet: str | None = None,
    midpoint: float = 0.0,
    zmin: float | None = None,
    zmax: float | None = None,
    height: int | None = None,
    colour_label: str = "effect",
    sequential: bool = False,
    hover: Mapping[str, xr.DataArray] | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    y_upward: bool = True,
) -> go.Figure:
    """Heatmap of a two-dimensional array, or of a three-dimensional one with a panel per `facet`.

    Args:
        array: [y, x] or [y, x, facet] in any order; nothing is averaged here.
        x, y, facet: Names of the dimensions across, up and over panels.
        title: Title of the figure; long ones are broken into lines.
        midpoint: Value drawn white on the diverging scale.
        zmin, zmax: Ends of the colour scale. Where one is missing the scale is symmetric about the
            midpoint; where both are, it reaches the largest distance from it. A sequential scale
            starts at 0 (or the smallest value, if that is negative) and ends at the largest.
        height: Pixels; by default it grows with the number of rows.
        colour_label: What the colours mean, with the unit.
        sequential: White to blue, for positive-only values, in place of red-white-blue.
        hover: Further arrays for the hover text, by name; each broadcasts to `array`.
        x_label, y_label: Axis titles; the dimension names by default.
        y_upward: Index 0 at the bottom (False: at the top).

    Raises:
        ValueError: The array has other dimensions than those named, is not numeric, or the colour
            scale has its ends the wrong way round.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    named = (y, x) if facet is None else (facet, y, x)
    if set(array.dims) != set(named) or len(set(named)) != len(named):
        raise ValueError(
            f"the array has dimensions {array.dims} but x={x!r}, y={y!r}, facet={facet!r} were "
            "named; select or average the others first"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"a heatmap needs numbers, the array holds {array.dtype}")
    array = array.transpose(*named)
    panels = [array] if facet is None else [array.isel({facet: i}) for i in range(len(array))]
    titles = None if facet is None else [escape(label) for label in axis_labels(array, facet)]
    columns = min(len(panels), 4) or 1
    rows = max(1, ceil(len(panels) / columns))
    x_ticks, y_ticks = axis_labels(array, x), axis_labels(array, y)
    x_axis = _ticks(x_ticks, _MAX_TICKS // columns, room=90 // columns)
    longest = max((len(label) for label in x_ticks), default=0)
    under = 60 + (min(180, 5 * longest) if x_axis["tickangle"] else 0)  # pixels under each panel
    height = height or min(1600, rows * (max(230, 24 * len(y_ticks)) + under) + 90)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.9 / max(rows - 1, 1), (under + 30) / height),
    )
    extras = {name: extra.broadcast_like(array) for name, extra in (hover or {}).items()}
    for index, panel in enumerate(panels):
        pieces = {
            name: (extra if facet is None else extra.isel({facet: index})).transpose(y, x).values
            for name, extra in extras.items()
        }
        head_grid = {x, y} == {"layer", "head"}
        words = [
            [
                _hover_text(panel, x, y, i, j, x_ticks, y_ticks, head_grid, pieces)
                for j in range(len(x_ticks))
            ]
            for i in range(len(y_ticks))
        ]
        figure.add_trace(
            go.Heatmap(
                z=panel.values.astype(float),
                x=list(range(len(x_ticks))),
                y=list(range(len(y_ticks))),
                customdata=words,
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
            ),
            row=index // columns + 1,
            col=index % columns + 1,
        )
    # Positions on the axes are indices and labels are only painted on: plotly would merge two cells
    # that have the same label.
    figure.update_xaxes(**x_axis, showgrid=False, zeroline=False)
    figure.update_yaxes(**_ticks(y_ticks, _MAX_TICKS, slant=False), showgrid=False, zeroline=False)
    if not y_upward:
        figure.update_yaxes(autorange="reversed")
    for column in range(1, columns + 1):
        lowest = rows if (rows - 1) * columns + column <= len(panels) else rows - 1
        figure.update_xaxes(title_text=x_label or x, title_standoff=8, row=lowest, col=column)
    figure.update_yaxes(title_text=y_label or y, col=1)
    scale = _colour_scale(array.values, sequential, midpoint, zmin, zmax)
    meaning = "darker: higher" if sequential else f"blue: above {midpoint:g}, red: below"
    if not sequential and midpoint == 0:
        meaning = "blue: positive, red: negative"
    figure.update_layout(
        coloraxis={
            **scale,
            "colorbar": {
                "title": {"text": f"{colour_label}<br>({meaning})", "side": "right"},
                "thickness": 16,
                "lenmode": "pixels",
                "len": min(320, max(160, height - under - 70)),
                "y": 1,
                "yanchor": "top",
                "outlinewidth": 0,
            },
        },
    )
    _style(figure, title, height)
    figure.update_layout(plot_bgcolor=_MISSING)
    return figure


def lines(
    data: pd.DataFrame | Mapping[str, Any],
    *,
    x: str,
    y: str,
    group: str | None = None,
    lower: str | None = None,
    upper: str | None = None,
    title: str,
    x_label: str | None = None,
    y_label: str | None = None,
    references: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 420,
) -> go.Figure:
    """Lines over a numeric axis, one for each value of `group`, with interval bands.

    Args:
        data: Frame, or columns by name, with one row for each point of each line. A NaN breaks its
            line (and a NaN bound its band).
        x, y, group: Column names; groups keep the order in which they come.
        lower, upper: Columns with the ends of the interval, both or neither.
        references: Values drawn as dotted horizontal lines with their names (baselines).
        y_range: Ends of the y axis.

    Raises:
        ValueError: A column is missing, `x` is not numeric, only one bound is given, or a line has
            two points at one `x` (average first).
    """
    import plotly.graph_objects as go

    frame = _frame(data, x=x, y=y, group=group, lower=lower, upper=upper)
    if len(frame) and frame[x].dtype.kind not in "iuf":
        raise ValueError(f"lines need numbers on the x axis, column {x!r} is not; use bars")
    figure = go.Figure()
    for index, (name, part) in enumerate(_groups(frame, group, x)):
        part = part.sort_values(x, kind="stable")
        colour = COLOURS[index % len(COLOURS)]
        if lower is not None and upper is not None:
            across, along = _band(*(part[column].to_numpy(float) for column in (x, lower, upper)))
            figure.add_trace(
                go.Scatter(
                    x=across,
                    y=along,
                    fill="toself",
                    fillcolor=_see_through(colour, 0.18),
                    line={"width": 0},
                    mode="lines",
                    hoverinfo="skip",
                    legendgroup=name,
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=part[x].to_numpy(),
                y=part[y].to_numpy(float),
                name=escape(name, quote=False),
                mode="lines+markers",
                line={
                    "color": colour,
                    "width": 2.2,
                    "dash": _DASHES[(index // len(COLOURS)) % len(_DASHES)],
                },
                marker={"size": 6, "symbol": _MARKERS[(index // len(COLOURS)) % len(_MARKERS)]},
                legendgroup=name,
                showlegend=group is not None,
                customdata=_interval_words(part, lower, upper),
                hovertemplate=f"{x_label or x}: %{{x}}<br>{y_label or y}: %{{y:.6~g}}%{{customdata}}",
            )
        )
    _references(figure, references)
    figure.update_xaxes(title_text=x_label or x)
    if (
        len(frame)
        and frame[x].dtype.kind in "iu"
        and np.ptp(frame[x].to_numpy()) <= _MAX_TICKS // 2
    ):
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(title_text=y_label or y, range=y_range)
    _style(figure, title, height, legend=group)
    return figure


def bars(
    data: pd.DataFrame | Mapping[str, Any],
    *,
    x: str,
    y: str,
    group: str | None = None,
    lower: str | None = None,
    upper: str | None = None,
    title: str,
    x_label: str | None = None,
    y_label: str | None = None,
    references: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 420,
) -> go.Figure:
    """Bars for categories, side by side for each value of `group`, with interval error bars.

    Arguments and errors are those of `lines`; `x` may be of any type. An interval with a NaN end is
    not drawn.
    """
    import plotly.graph_objects as go

    frame = _frame(data, x=x, y=y, group=group, lower=lower, upper=upper)
    categories = [_text(value) for value in dict.fromkeys(frame[x])]
    place = {category: index for index, category in enumerate(categories)}
    figure = go.Figure()
    for index, (name, part) in enumerate(_groups(frame, group, x)):
        height_of = part[y].to_numpy(float)
        error = None
        if lower is not None and upper is not None:
            up = np.clip(part[upper].to_numpy(float) - height_of, 0, None)
            down = np.clip(height_of - part[lower].to_numpy(float), 0, None)
            known = np.isfinite(up) & np.isfinite(down)
            error = {
                "type": "data",
                "symmetric": False,
                "array": np.where(known, up, 0.0),
                "arrayminus": np.where(known, down, 0.0),
                "thickness": 1.4,
                "width": 4,
                "color": "#333333",
            }
        figure.add_trace(
            go.Bar(
                x=[place[_text(value)] for value in part[x]],
                y=height_of,
                name=escape(name, quote=False),
                marker={"color": COLOURS[index % len(COLOURS)]},
                error_y=error,
                showlegend=group is not None,
                text=[escape(_text(value), quote=False) for value in part[x]],
                textposition="none",
                customdata=_interval_words(part, lower, upper),
                hovertemplate=f"{x_label or x}: %{{text}}<br>{y_label or y}: %{{y:.6~g}}%{{customdata}}",
            )
        )
    _references(figure, references)
    figure.update_xaxes(
        title_text=x_label or x, **_ticks([escape(c, quote=False) for c in categories])
    )
    figure.update_yaxes(title_text=y_label or y, range=y_range)
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.06)
    _style(figure, title, height, legend=group)
    return figure


def to_html(
    figure: go.Figure, *, include_plotlyjs: bool | str = False, div_id: str | None = None
) -> str:
    """One ``<div>`` with the figure, to be put into a page.

    Args:
        include_plotlyjs: False leaves plotly.js to the page (several figures share one copy); True
            writes it into the div; other values as in plotly's own `to_html`.
        div_id: Identifier of the div, unique in the page; a random one by default, so name it where
            the page has to come out the same each time.
    """
    return figure.to_html(
        full_html=False,
        include_plotlyjs=include_plotlyjs,
        div_id=div_id,
        config={"displaylogo": False, "responsive": True},
    )


def _text(value: Any) -> str:
    """Label of a coordinate value: short for floats, plain otherwise."""
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return str(value)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _hover_text(
    panel: xr.DataArray,
    x: str,
    y: str,
    i: int,
    j: int,
    x_ticks: Sequence[str],
    y_ticks: Sequence[str],
    head_grid: bool,
    pieces: Mapping[str, np.ndarray],
) -> str:
    """Hover text of cell [i, j]: where it is, its value, and the further arrays."""
    if head_grid:
        cell = panel.isel({y: i, x: j})
        layer = cell["layer"].item() if "layer" in cell.coords else (i if y == "layer" else j)
        head = cell["head"].item() if "head" in cell.coords else (i if y == "head" else j)
        where = [head_label(layer, head)]
    else:
        where = [f"{x}: {x_ticks[j]}", f"{y}: {y_ticks[i]}"]
    value = f"<b>{_number(panel.values[i, j])}</b>"
    return "<br>".join([*where, value, *(f"{k}: {_number(v[i, j])}" for k, v in pieces.items())])


def _colour_scale(
    values: np.ndarray,
    sequential: bool,
    midpoint: float,
    zmin: float | None,
    zmax: float | None,
) -> dict[str, Any]:
    """Colour scale and its ends; white stays at the midpoint even between unequal ends."""
    from plotly.colors import sample_colorscale

    finite = values[np.isfinite(values)].astype(float)
    if sequential:
        low = zmin if zmin is not None else min(0.0, finite.min(initial=0.0))
        high = zmax if zmax is not None else finite.max(initial=low)
        if zmax is None and high <= low:
            high = low + 1.0
        scale: Any = "Blues"
    else:
        given = [abs(end - midpoint) for end in (zmin, zmax) if end is not None]
        extent = max(given) if given else np.abs(finite - midpoint).max(initial=0.0) or 1.0
        low = zmin if zmin is not None else midpoint - extent
        high = zmax if zmax is not None else midpoint + extent
        scale = "RdBu"
        if not np.isclose(high - midpoint, midpoint - low):
            points = np.linspace(low, high, 33)
            shades = np.clip(0.5 + (points - midpoint) / (2 * extent or 1.0), 0, 1)
            steps = np.linspace(0, 1, len(points))
            scale = list(
                zip(steps.tolist(), sample_colorscale("RdBu", shades.tolist()), strict=True)
            )
    if not low < high:
        raise ValueError(f"the colour scale would run from {low} to {high}; give zmin < zmax")
    return {"colorscale": scale, "cmin": float(low), "cmax": float(high)}


def _ticks(
    labels: Sequence[str], limit: int = _MAX_TICKS, *, slant: bool = True, room: int = 90
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
        "ticktext": [labels[index] for index in shown],
        "tickangle": -40 if slant and long else 0,
        "automargin": True,
    }


def _frame(data: pd.DataFrame | Mapping[str, Any], **columns: str | None) -> pd.DataFrame:
    """The data as a frame that has all the named columns."""
    import pandas as pd

    frame = pd.DataFrame(data)
    missing = [name for name in columns.values() if name is not None and name not in frame.columns]
    if missing:
        raise ValueError(f"no column {missing} in the data; there are {list(frame.columns)}")
    if (columns["lower"] is None) != (columns["upper"] is None):
        raise ValueError("give both lower and upper, or neither")
    return frame


def _groups(frame: pd.DataFrame, group: str | None, x: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each line or set of bars, in order of appearance; each has one point at an x."""
    parts = (
        [("", frame)]
        if group is None
        else [(_text(name), part) for name, part in frame.groupby(group, sort=False, observed=True)]
    )
    for name, part in parts:
        if part[x].duplicated().any():
            raise ValueError(
                f"{name or 'the data'} has several rows at one {x!r}; average them or name a group"
            )
    return parts


def _band(
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


def _interval_words(part: pd.DataFrame, lower: str | None, upper: str | None) -> list[str]:
    """`` [0.1, 0.3]`` for each row, empty where there is no interval; ``n`` where the frame has it."""
    words = []
    for _, row in part.iterrows():
        text = ""
        if lower is not None and upper is not None and np.isfinite([row[lower], row[upper]]).all():
            text += f" [{row[lower]:.6g}, {row[upper]:.6g}]"
        if "n" in part.columns:
            text += f"<br>n: {row['n']:g}"
        words.append(text)
    return words


def _references(figure: go.Figure, references: Mapping[str, float] | None) -> None:
    for name, value in (references or {}).items():
        figure.add_hline(
            y=float(value),
            line={"color": "#666666", "width": 1.4, "dash": "dot"},
            annotation={
                "text": f"{escape(name, quote=False)} {value:.3g}",
                "font": {"size": 11, "color": "#444444"},
            },
            annotation_position="top right",
        )


def _see_through(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _style(figure: go.Figure, title: str, height: int, *, legend: str | None = None) -> None:
    """Fonts, margins and a title of several lines if need be, on this figure alone."""
    broken = [piece for line in title.split("\n") for piece in (wrap(line, 88) or [""])]
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": _FONT, "size": 13, "color": "#222222"},
        title={
            "text": "<br>".join(escape(line, quote=False) for line in broken),
            "font": {"size": 16},
            "x": 0.01,
            "xanchor": "left",
            "y": 1 - 16 / height,
            "yanchor": "top",
        },
        margin={"l": 64, "r": 24, "t": 44 + 20 * len(broken), "b": 56},
        hoverlabel={"font": {"family": _FONT, "size": 12}, "align": "left"},
        legend={"title": {"text": legend}, "font": {"size": 12}},
    )
