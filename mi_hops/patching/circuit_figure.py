"""A circuit as a picture: components in rows by layer, edges from writer to reader."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.model import HookedModel
from mi_hops.patching.circuit import Circuit, next_writers
from mi_hops.patching.nodes import Edge, all_edges, require_edges
from mi_hops.result.figure_parts import GREY, apply_style, markup
from mi_hops.result.plots import COLOURS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mi_hops.result.result import Result

#: What a reader takes the write for -> colour and words of the legend, where edges have no scores.
_INPUTS = {
    "q": (COLOURS[0], "into a query"),
    "k": (COLOURS[1], "into a key"),
    "v": (COLOURS[2], "into a value"),
    "": (GREY, "into an MLP or the logits"),
}
_SIGNS = {
    "+": (COLOURS[0], "patching it raises the metric"),
    "-": (COLOURS[1], "patching it lowers the metric"),
}
#: Of components: white letters can be read on it, and it can itself be seen on black and on white.
_FILL = "#5f6b7a"
_WIDEST, _THINNEST = 6.0, 1.0


def circuit_figure(
    model: HookedModel,
    circuit: Circuit,
    *,
    scores: Result | None = None,
    most: int = 60,
    title: str = "Circuit",
    **layout: Any,
) -> go.Figure:
    """A layered graph: the embedding at the bottom, then heads and MLP of each layer, the logits on top.

    Args:
        scores: of edges, as for `extract`: an edge's width is then the size of its mean ``change``, its
            colour the sign. Without them the colour tells what the edge is read as.
        most: edges drawn; of more, those of the largest scores, and the title says so.
        title: of the figure.
        layout: for `update_layout`: ``width`` and ``height`` in pixels, ``template``, anything else.

    A key or value head that several query heads share is drawn as an edge into each of those that are in the
    circuit.

    Returns:
        A plotly figure; hovering tells an edge's ends and score.

    Raises:
        ValueError: an empty circuit, edges that are not the model's, `most` below 1, or more edges than
            `most` without scores to choose by.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.patching import Circuit, circuit_figure
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> way = {("embed", "L1H0.v"), ("L1H0", "MLP2"), ("MLP2", "logits")}
        >>> len(circuit_figure(model, Circuit(frozenset(way))).data[-1].x)
        4
    """
    require_edges(circuit.edges, all_edges(model))
    if not circuit.edges or most < 1:
        raise ValueError(f"{len(circuit)} edges and most={most}; expected at least 1 of each")
    weights = dict.fromkeys(circuit.edges, 0.0)
    if scores is not None:
        mean = scores["change"].mean("example")
        weights = {(u, v): float(mean.sel(sender=u, receiver=v)) for u, v in circuit.edges}
    elif len(circuit) > most:
        raise ValueError(
            f"the circuit has {len(circuit)} edges and most is {most}; give scores= to draw the "
            "largest, or a larger most="
        )
    drawn = sorted(circuit.edges, key=lambda e: (-abs(weights[e]), e))[:most]
    ends = _ends(model, circuit, drawn)
    places = _places({end for pairs in ends.values() for pair in pairs for end in pair}, ends)
    figure = _drawn(drawn, weights, ends, places, scored=scores is not None)
    cut = f"\nthe {len(drawn)} largest of {len(circuit)} edges" if len(drawn) < len(circuit) else ""
    ticks = dict(sorted((y, _row_label(name)) for name, (_, y) in places.items()))
    figure.update_layout(showlegend=True, hovermode="closest", plot_bgcolor="rgba(0, 0, 0, 0)")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(
        tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, zeroline=False
    )
    apply_style(figure, f"{title}{cut}", {"height": 160 + 52 * len(ticks), **layout})
    if "legend" not in layout:
        below = {"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top"}
        figure.update_layout(legend=below)
    return figure


def _ends(
    model: HookedModel, circuit: Circuit, edges: Iterable[Edge]
) -> dict[Edge, list[tuple[str, str]]]:
    """For each edge the components it is drawn between."""
    heads = {
        name for u, v in circuit.edges for name in (u, v.removesuffix(".q")) if "." not in name
    }
    shaped = next_writers(model)
    found = {}
    for u, v in edges:
        group = shaped.get(v, [v])
        into = [name for name in group if name in heads] or group[:1]
        found[u, v] = [(u, name) for name in into]
    return found


def _row(name: str) -> tuple[int, int]:
    """Order of a component's row from the bottom."""
    if name == "embed":
        return (-1, 0)
    if name == "logits":
        return (10**6, 0)
    layer = int(re.findall(r"\d+", name)[0])
    return (layer, int(name.startswith("MLP")))


def _row_label(name: str) -> str:
    layer, mlp = _row(name)
    ends = {"embed": "embedding", "logits": "logits"}
    return ends.get(name, f"MLP {layer}" if mlp else f"heads {layer}")


def _places(
    names: Iterable[str], ends: Mapping[Edge, list[tuple[str, str]]]
) -> dict[str, tuple[float, float]]:
    """Where components stand: evenly in their rows, each row ordered to lie under what it is joined to."""
    rows: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda n: [int(d) for d in re.findall(r"\d+", n)]):
        rows[_row(name)].append(name)
    near: dict[str, list[str]] = defaultdict(list)
    for pairs in ends.values():
        for u, v in pairs:
            near[u].append(v)
            near[v].append(u)
    x = {name: i - (len(row) - 1) / 2 for row in rows.values() for i, name in enumerate(row)}
    order = sorted(rows)
    for sweep in range(6):  # by the mean of the neighbours, up and down in turn
        for key in order if sweep % 2 else reversed(order):
            row = rows[key]
            pulled = {
                n: sum(x[m] for m in near[n]) / len(near[n]) if near[n] else x[n] for n in row
            }
            row.sort(key=lambda n: (pulled[n], n))
            x |= {name: i - (len(row) - 1) / 2 for i, name in enumerate(row)}
    return {name: (x[name], float(y)) for y, key in enumerate(order) for name in rows[key]}


def _drawn(
    edges: Iterable[Edge],
    weights: Mapping[Edge, float],
    ends: Mapping[Edge, list[tuple[str, str]]],
    places: Mapping[str, tuple[float, float]],
    *,
    scored: bool,
) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    largest = max(map(abs, weights.values())) or 1.0
    named: set[str] = set()
    middles: list[tuple[float, float, str]] = []
    for u, v in edges:
        weight = weights[u, v]
        key = ("+" if weight >= 0 else "-") if scored else v.partition(".")[2]
        colour, words = (_SIGNS if scored else _INPUTS)[key]
        width = _THINNEST + (_WIDEST - _THINNEST) * abs(weight) / largest if scored else 2.0
        told = f"{u} → {v}" + (f"<br><b>{weight:.4g}</b>" if scored else "")
        for one, other in ends[u, v]:
            (x0, y0), (x1, y1) = places[one], places[other]
            # An edge over several rows is bent, so that it passes beside what stands in between.
            bend = 0.18 * (y1 - y0 - 1) * (1 if x0 + x1 >= 0 else -1)
            middle = ((x0 + x1) / 2 + bend, (y0 + y1) / 2)
            figure.add_trace(
                go.Scatter(
                    x=[x0, middle[0], x1],
                    y=[y0, middle[1], y1],
                    mode="lines",
                    line={"color": colour, "width": width, "shape": "spline"},
                    opacity=0.75,
                    name=words,
                    legendgroup=words,
                    showlegend=words not in named,
                    hoverinfo="skip",
                )
            )
            named.add(words)
            middles.append((*middle, told))
    figure.add_trace(
        go.Scatter(
            x=[m[0] for m in middles],
            y=[m[1] for m in middles],
            mode="markers",
            marker={"size": 9, "color": "rgba(0,0,0,0)"},
            text=[m[2] for m in middles],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    )
    shown = sorted(places)
    figure.add_trace(
        go.Scatter(
            x=[places[n][0] for n in shown],
            y=[places[n][1] for n in shown],
            mode="markers+text",
            marker={
                "size": 34,
                "symbol": ["square" if not n.startswith("L") else "circle" for n in shown],
                "color": _FILL,
            },
            text=[markup(n) for n in shown],
            textfont={"size": 10, "color": "#ffffff"},
            hoverinfo="text",
            showlegend=False,
        )
    )
    return figure
