"""The figure of a result: which of heatmap, lines and bars, over which axes, with which intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.result import plots
from mi_hops.result.intervals import averaging_note, interval
from mi_hops.result.names import readable, shared_tokens, spelled_out

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from mi_hops.result.result import Result

#: Units whose values cannot be negative, drawn on a white-to-blue scale.
POSITIVE_UNITS = frozenset({"probability", "share", "rank"})

#: Variables that are differences of scores, in the scores' own unit -> baselines that are such too.
DIFFERENCES: Mapping[str, tuple[str, ...]] = {
    "change": (),
    "attribution": (),
    "indirect": ("total",),
    "spread": ("total_spread",),
}

#: Dimensions that make the axes of a heatmap, up and across.
GRID = ("layer", "head", "kv_head", "sender", "receiver", "position", "strength")
_HEAD = re.compile(r"L(\d+)H(\d+)(\.[qkv])?")


def draw(
    result: Result, variable: str | None, kind: str | None, keywords: Mapping[str, Any]
) -> go.Figure:
    """What `Result.plot` returns."""
    name = variable if variable is not None else result.main
    array, ends, note = _averaged(result, name)
    if "sender" in array.dims and "receiver" in array.dims:
        array, ends = _heads_as_grid(array), None if ends is None else _heads_as_grid(ends)
    grid = [dim for dim in GRID if dim in array.dims]
    axes = [*grid, *(str(dim) for dim in array.dims if dim not in grid)]
    if kind is None:
        one_axis = "lines" if grid and array[grid[0]].dtype.kind in "iuf" else "bars"
        kind = "heatmap" if len(grid) >= 2 else one_axis
    if kind not in ("heatmap", "lines", "bars"):
        raise ValueError(f"kind is {kind!r}; choose heatmap, lines or bars")
    fewest, most = (2, 3) if kind == "heatmap" else (1, 2)
    if not fewest <= len(axes) <= most:
        raise ValueError(
            f"{name!r} has dimensions {axes} left and {kind} needs {fewest} or {most}; select "
            "or average some, or choose another kind"
        )
    unit = result[name].attrs.get("units")
    title = spelled_out(result.title or name)
    shown = readable(name)
    label = f"{shown} ({unit})" if unit and unit not in shown else shown
    options: dict[str, Any] = {"title": f"{title} ({note})" if note else title}
    if kind == "heatmap":
        smallest = array.min().item() if array.notnull().any() else 0.0
        sequential = unit in POSITIVE_UNITS and smallest >= 0
        options |= {"y": axes[0], "x": axes[1], "facet": axes[2] if len(axes) > 2 else None}
        options["colours"] = plots.Colours(label, sequential=sequential)
        if ends is not None:
            options["hover"] = {"n": ends["n"], "95% from": ends["lower"], "to": ends["upper"]}
        return plots.heatmap(array, **{**options, **keywords})
    columns = array.to_dataset(name="estimate") if ends is None else ends
    columns = columns.assign_coords({dim: array[dim] for dim in axes})
    if kind == "bars":
        columns = columns.assign_coords({dim: plots.axis_labels(array, dim) for dim in axes})
    columns = columns.drop_vars("token", errors="ignore")
    options |= {"x": axes[0], "y": "estimate", "group": axes[1] if len(axes) > 1 else None}
    options |= {"labels": {"estimate": label}, "references": _scalar_baselines(result, name, unit)}
    if ends is not None:
        options["interval"] = ("lower", "upper")
    chosen = plots.lines if kind == "lines" else plots.bars
    return chosen(columns.to_dataframe().reset_index(), **{**options, **keywords})


def _averaged(result: Result, name: str) -> tuple[xr.DataArray, xr.Dataset | None, str]:
    """A variable without its example dimension, its interval if it was averaged, and a note."""
    array = result.numbers(name)
    note = str(result[name].attrs.get("averaging", ""))
    if "example" not in array.dims:
        return array, None, note
    if array.sizes["example"] == 1:
        array = array.isel(example=0)
        named = "example" in array.coords
        return array, None, f"example {array['example'].item()}" if named else note
    found = interval(array, "example", 0.95, 1000, 0, "mean")
    found = found.assign_coords(shared_tokens(array))
    over = averaging_note("mean", ["example"], array.notnull().sum("example").values)
    return found["estimate"], found, f"{over} of {note}" if note else over


def _heads_as_grid(values: Any) -> Any:
    """Paths from or to nothing but heads at one other end as a grid of layers and heads.

    Args:
        values: array or dataset on sender and receiver; of anything else it comes back as it is.
    """
    for many, one in (("sender", "receiver"), ("receiver", "sender")):
        heads = [_HEAD.fullmatch(str(name)) for name in values[many].values]
        if values.sizes[one] != 1 or not all(heads) or len({h[3] for h in heads if h}) != 1:
            continue
        places = [(int(h[1]), int(h[2])) for h in heads if h]
        if len(places) < 2:
            continue
        named = values.isel({one: 0}).assign_coords(
            layer=(many, [layer for layer, _ in places]), head=(many, [head for _, head in places])
        )
        return named.drop_vars(many).set_index({many: ["layer", "head"]}).unstack(many)
    return values


def _scalar_baselines(result: Result, variable: str, unit: str | None) -> dict[str, float]:
    """Means of the baselines on a variable's scale that have no dimension but example.

    They have its unit, and are differences of scores where it is one (`DIFFERENCES`): where a run
    starts from tells nothing on an axis of changes.
    """
    differences = [name for names in DIFFERENCES.values() for name in names]
    found = {}
    for name in result.baselines:
        array = result[name]
        alike = name in DIFFERENCES.get(variable, ()) or (
            variable not in DIFFERENCES and name not in differences
        )
        same = array.attrs.get("units") == unit and array.dtype.kind in "biuf"
        if alike and same and set(array.dims) <= {"example"} and array.notnull().any():
            found[name] = float(array.astype(float).mean())
    return found
