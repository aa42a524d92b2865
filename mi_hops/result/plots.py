"""Plotly figures from labelled arrays and data frames.

Every function returns a `plotly.graph_objects.Figure`: nothing is shown, no global template is
changed, and plotly is imported on the first call only. Ink and background are those of the template
(`plotly.io.templates.default`, or ``template="plotly_dark"`` in a call). The conventions:

- effects are drawn in red-white-blue around a midpoint (0 by default) with symmetric limits, positive
  **blue**; the colour bar says so. Positive-only values (probabilities, ranks) go from white to blue;
- cells without a value (NaN) are grey, which no colour scale here contains;
- tokens are labelled with their position (``" of 3"``), so that equal tokens stay apart; heads are
  ``L{layer}H{head}``; layers run upward from 0; code names are spelled out (``attn_out``: "attention
  output");
- intervals are bands around lines and error bars on bars, and are in the hover text.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.figure_parts import (
    MAX_TICKS,
    Colours,
    add_references,
    apply_style,
    as_frame,
    as_text,
    band_outline,
    by_group,
    colour_scale,
    head_label,
    hover_text,
    interval_words,
    markup,
    see_through,
    tick_settings,
)
from mi_hops.result.names import readable

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

#: Colours that stay apart for colour-blind readers (Okabe and Ito), highest contrast first; the
#: last is grey, since black vanishes on a dark background.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#808080")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up")
_MISSING = "rgba(128, 128, 128, 0.35)"


def token_label(token: str, position: object) -> str:
    """``" of"``, 3 -> ``" of 3"``: visible, and unique in a prompt.

    Line breaks and tabs are written as escapes and an empty or blank token as ``␣``.
    """
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"{shown if shown.strip() else '␣'} {position}"


def axis_labels(array: xr.DataArray, dim: str) -> list[str]:
    """One tick label for each index of `dim`.

    A coordinate ``token`` along the axis is shown with the position ("": the position alone); heads
    become ``H{h}``, or ``L{l}H{h}`` where the array belongs to one layer; code names are spelled out,
    other labels are shown as they are. Labels that repeat get their index.
    """
    values = array[dim].values
    if "token" in array.coords and array["token"].dims == (dim,):
        tokens = array["token"].values.tolist()
        places = values if np.issubdtype(values.dtype, np.number) else range(len(tokens))
        return [
            token_label(str(token), place) if token != "" else str(place)
            for token, place in zip(tokens, places, strict=True)
        ]
    if dim == "head" and np.issubdtype(values.dtype, np.integer):
        if "layer" in array.coords and array["layer"].ndim == 0:
            return [head_label(array["layer"].item(), head) for head in values]
        return [f"H{head}" for head in values]
    labels = [str(value) if dim == "example" else as_text(value) for value in values]
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
    colours: Colours | None = None,
    hover: Mapping[str, xr.DataArray] | None = None,
    labels: Mapping[str, str] | None = None,
    y_upward: bool = True,
    **layout: Any,
) -> go.Figure:
    """Heatmap of a two-dimensional array, or of a three-dimensional one with a panel per `facet`.

    Args:
        array: [y, x] or [y, x, facet] in any order; nothing is averaged here.
        x, y, facet: Names of the dimensions across, up and over panels.
        title: Title of the figure; long ones are broken into lines.
        colours: What the colours mean, and the ends of their scale.
        hover: Further arrays for the hover text, by name; each broadcasts to `array`.
        labels: Dimension -> title of its axis; the dimension's readable name by default.
        y_upward: Index 0 at the bottom (False: at the top).
        layout: For `update_layout`: ``width`` and ``height`` in pixels (the height grows with the
            number of rows by default), ``template``, anything else.

    Raises:
        ValueError: The array has other dimensions than those named, is not numeric, or the colour
            scale has its ends the wrong way round.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    colours, labels = colours or Colours(), labels or {}
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
    titles = None if facet is None else [markup(label) for label in axis_labels(array, facet)]
    columns = min(len(panels), 4) or 1
    rows = max(1, ceil(len(panels) / columns))
    x_ticks, y_ticks = axis_labels(array, x), axis_labels(array, y)
    x_axis = tick_settings(x_ticks, MAX_TICKS // columns, room=72 // columns)
    longest = max((len(label) for label in x_ticks), default=0)
    under = 60 + (min(180, 5 * longest) if x_axis["tickangle"] else 0)  # pixels under each panel
    grown = min(1600, rows * (max(230, 24 * len(y_ticks)) + under) + 90)
    height = layout.get("height") or grown
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.9 / max(rows - 1, 1), (under + 30) / height),
    )
    extras = {name: extra.broadcast_like(array) for name, extra in (hover or {}).items()}

    def where(i: int, j: int) -> list[str]:
        if {x, y} == {"layer", "head"}:
            at = {y: i, x: j}
            return [head_label(*(array[dim].values[at[dim]] for dim in ("layer", "head")))]
        return [f"{readable(x)}: {x_ticks[j]}", f"{readable(y)}: {y_ticks[i]}"]

    for index, panel in enumerate(panels):
        pieces = {
            name: (extra if facet is None else extra.isel({facet: index})).transpose(y, x).values
            for name, extra in extras.items()
        }
        words = [
            [
                hover_text(where(i, j), panel.values[i, j], {k: v[i, j] for k, v in pieces.items()})
                for j in range(len(x_ticks))
            ]
            for i in range(len(y_ticks))
        ]
        figure.add_trace(
            go.Heatmap(
                z=panel.values.astype(float) + 0.0,  # no -0
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
    figure.update_yaxes(
        **tick_settings(y_ticks, MAX_TICKS, slant=False), showgrid=False, zeroline=False
    )
    if not y_upward:
        figure.update_yaxes(autorange="reversed")
    for column in range(1, columns + 1):
        lowest = rows if (rows - 1) * columns + column <= len(panels) else rows - 1
        figure.update_xaxes(
            title_text=labels.get(x, readable(x)), title_standoff=8, row=lowest, col=column
        )
    figure.update_yaxes(title_text=labels.get(y, readable(y)), col=1)
    figure.update_layout(
        coloraxis={
            **colour_scale(array.values, colours),
            "colorbar": {
                # Above the bar and in short lines: beside it, it would run into the ticks.
                "title": {
                    "text": "<br>".join(map(markup, colours.lines())) + "<br> ",
                    "side": "top",
                    "font": {"size": 12},
                },
                "thickness": 16,
                "lenmode": "pixels",
                "len": min(320, max(160, height - under - 70)),
                "y": 1,
                "yanchor": "top",
                "outlinewidth": 0,
            },
        },
        plot_bgcolor=_MISSING,
    )
    apply_style(figure, title, {**layout, "height": height})
    return figure


def lines(
    data: pd.DataFrame | Mapping[str, Any],
    *,
    x: str,
    y: str,
    group: str | None = None,
    interval: tuple[str, str] | None = None,
    title: str,
    labels: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    **layout: Any,
) -> go.Figure:
    """Lines over a numeric axis, one for each value of `group`, with interval bands.

    Args:
        data: Frame, or columns by name, with one row for each point of each line. A NaN breaks its
            line (and a NaN bound its band).
        x, y, group: Column names; groups keep the order in which they come.
        interval: Columns with the lower and the upper end of the interval.
        labels: Column -> title of its axis; the column's name by default.
        references: Values drawn as dotted horizontal lines with their names (baselines).
        y_range: Ends of the y axis.
        layout: For `update_layout`: ``width`` and ``height`` in pixels, ``template``, anything else.

    Raises:
        ValueError: A column is missing, `x` is not numeric, or a line has two
            points at one `x` (average first).
    """
    import plotly.graph_objects as go

    x_title, y_title = ((labels or {}).get(column, readable(column)) for column in (x, y))
    frame = as_frame(data, x, y, group, *(interval or ()))
    if len(frame) and frame[x].dtype.kind not in "iuf":
        raise ValueError(f"lines need numbers on the x axis, column {x!r} is not; use bars")
    figure = go.Figure()
    for index, (name, part) in enumerate(by_group(frame, group, x)):
        part = part.sort_values(x, kind="stable")
        colour = COLOURS[index % len(COLOURS)]
        if interval is not None:
            outline = band_outline(*(part[column].to_numpy(float) for column in (x, *interval)))
            figure.add_trace(
                go.Scatter(
                    x=outline[0],
                    y=outline[1],
                    fill="toself",
                    fillcolor=see_through(colour, 0.18),
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
                y=part[y].to_numpy(float) + 0.0,
                name=markup(name),
                mode="lines+markers",
                line={
                    "color": colour,
                    "width": 2.2,
                    "dash": _DASHES[(index // len(COLOURS)) % len(_DASHES)],
                },
                marker={"size": 6, "symbol": _MARKERS[(index // len(COLOURS)) % len(_MARKERS)]},
                legendgroup=name,
                showlegend=group is not None,
                customdata=interval_words(part, interval),
                hovertemplate=f"{x_title}: %{{x}}<br>{y_title}: %{{y:.6~g}}%{{customdata}}",
            )
        )
    add_references(figure, references)
    figure.update_xaxes(title_text=x_title)
    if len(frame) and frame[x].dtype.kind in "iu" and np.ptp(frame[x].to_numpy()) <= MAX_TICKS // 2:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(title_text=y_title, range=y_range, exponentformat="power")
    apply_style(figure, title, {"height": 420, **layout}, legend=group)
    return figure


def bars(
    data: pd.DataFrame | Mapping[str, Any],
    *,
    x: str,
    y: str,
    group: str | None = None,
    interval: tuple[str, str] | None = None,
    title: str,
    labels: Mapping[str, str] | None = None,
    references: Mapping[str, float] | None = None,
    y_range: tuple[float, float] | None = None,
    **layout: Any,
) -> go.Figure:
    """Bars for categories, side by side for each value of `group`, with interval error bars.

    Arguments and errors are those of `lines`; `x` may be of any type. An interval with a NaN end is
    not drawn.
    """
    import plotly.graph_objects as go

    x_title, y_title = ((labels or {}).get(column, readable(column)) for column in (x, y))
    frame = as_frame(data, x, y, group, *(interval or ()))
    categories = [as_text(value) for value in dict.fromkeys(frame[x])]
    place = {category: index for index, category in enumerate(categories)}
    figure = go.Figure()
    for index, (name, part) in enumerate(by_group(frame, group, x)):
        height_of = part[y].to_numpy(float) + 0.0
        error = None
        if interval is not None:
            up = np.clip(part[interval[1]].to_numpy(float) - height_of, 0, None)
            down = np.clip(height_of - part[interval[0]].to_numpy(float), 0, None)
            known = np.isfinite(up) & np.isfinite(down)
            error = {
                "type": "data",
                "symmetric": False,
                "array": np.where(known, up, 0.0),
                "arrayminus": np.where(known, down, 0.0),
                "thickness": 1.4,
                "width": 4,
            }
        figure.add_trace(
            go.Bar(
                x=[place[as_text(value)] for value in part[x]],
                y=height_of,
                name=markup(name),
                marker={"color": COLOURS[index % len(COLOURS)]},
                error_y=error,
                showlegend=group is not None,
                text=[markup(as_text(value)) for value in part[x]],
                textposition="none",
                customdata=interval_words(part, interval),
                hovertemplate=f"{x_title}: %{{text}}<br>{y_title}: %{{y:.6~g}}%{{customdata}}",
            )
        )
    add_references(figure, references)
    figure.update_xaxes(title_text=x_title, **tick_settings(categories))
    figure.update_yaxes(title_text=y_title, range=y_range, exponentformat="power")
    figure.update_layout(barmode="group", bargap=0.25, bargroupgap=0.06)
    apply_style(figure, title, {"height": 420, **layout}, legend=group)
    return figure
