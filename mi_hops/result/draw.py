"""The figure of a result: which of heatmap, lines and bars, over which axes, with which intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mi_hops.result import plots
from mi_hops.result.intervals import averaging_note, interval

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from mi_hops.result.result import Result

#: Units whose values cannot be negative, drawn on a white-to-blue scale.
POSITIVE_UNITS = frozenset({"probability", "share", "rank"})

#: Dimensions that make the axes of a heatmap.
GRID = ("layer", "head", "kv_head", "position", "strength")


def draw(
    result: Result, variable: str | None, kind: str | None, keywords: Mapping[str, Any]
) -> go.Figure:
    """What `Result.plot` returns."""
    name = variable if variable is not None else result.main
    array, ends, note = _averaged(result, name)
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
    title = result.title or name
    label = f"{name} ({unit})" if unit else name
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
    options |= {"x": axes[0], "y": "estimate", "group": axes[1] if len(axes) > 1 else None}
    options |= {"labels": {"estimate": label}, "references": _scalar_baselines(result, unit)}
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
    over = averaging_note("mean", ["example"], array.notnull().sum("example").values)
    return found["estimate"], found, f"{over} of {note}" if note else over


def _scalar_baselines(result: Result, unit: str | None) -> dict[str, float]:
    """Means of the baselines of this unit that have no dimension but example."""
    found = {}
    for name in result.baselines:
        array = result[name]
        same = array.attrs.get("units") == unit and array.dtype.kind in "biuf"
        if same and set(array.dims) <= {"example"} and array.notnull().any():
            found[name] = float(array.astype(float).mean())
    return found
