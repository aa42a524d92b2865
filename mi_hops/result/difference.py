"""What one labelled array, or result, has more than another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mi_hops.result.intervals import interval
from mi_hops.result.statistics import difference_ci

if TYPE_CHECKING:
    import xarray as xr

    from mi_hops.result.result import Result


def subtract(a: Result, b: Result) -> dict[str, Any]:
    """What `Result.__sub__` makes its result of."""
    import xarray as xr

    shared = [
        str(name)
        for name, array in a.data.data_vars.items()
        if name in b.data.data_vars
        and str(name) not in (*a.baselines, *b.baselines)
        and array.dtype.kind in "biuf"
    ]
    if not shared:
        names = [list(side.data.data_vars) for side in (a, b)]
        raise ValueError(f"nothing to subtract: the variables are {names[0]} and {names[1]}")
    found = {}
    for name in shared:
        left, right = a.data[name], b.data[name]
        if set(left.dims) != set(right.dims):
            raise ValueError(
                f"{name!r} has the dimensions {left.dims} and {right.dims}; average or select so "
                "that both sides have the same"
            )
        require_same_unit(left, right)
        for dim in map(str, left.dims):
            right = matched(right, left, dim)
        found[name] = (left.astype(float) - right.astype(float)).assign_attrs(left.attrs)
    return {
        "data": xr.Dataset(found),
        "provenance": {"method": "difference", "of": a.provenance, "less": b.provenance},
        "title": f"{a.title} less {b.title}" if a.title or b.title else "",
        "main": a.main if a.main in found else shared[0],
        "skipped": dict.fromkeys([*a.skipped, *b.skipped]),
        "allow_nonfinite": True,
    }


def require_same_unit(left: xr.DataArray, right: xr.DataArray) -> None:
    """That both sides are in one unit.

    Raises:
        ValueError: they are not; both units are named.
    """
    units = [side.attrs.get("units") for side in (left, right)]
    if units[0] != units[1]:
        raise ValueError(f"{left.name!r} is in {units[0]} and in {units[1]}; units must be equal")


def difference(
    left: xr.DataArray,
    right: xr.DataArray,
    dim: str,
    *,
    paired: bool,
    level: float,
    n_resamples: int,
    seed: int,
) -> xr.Dataset:
    """estimate, lower, upper, n and n_other of mean(left) - mean(right) over a dimension of both.

    Raises:
        ValueError: labels or lengths that do not match.
    """
    import xarray as xr

    if paired:
        right = matched(right, left, dim, "; pass paired=False")
    try:
        left, right = xr.align(left, right, join="exact", exclude=[] if paired else [dim])
    except ValueError as error:
        raise ValueError(f"the two sides have different labels or lengths: {error}") from error
    if paired:
        found = interval(left - right, dim, level, n_resamples, seed, "mean")
        return found.assign(n_other=found["n"])
    left, right = xr.broadcast(left, right, exclude=[dim])
    left = left.transpose(dim, ...)
    right = right.transpose(*left.dims)
    ends = difference_ci(left.values, right.values, level=level, n_resamples=n_resamples, seed=seed)
    parts = dict(zip(("estimate", "lower", "upper"), ends, strict=True))
    counts = {"n": left.notnull().sum(dim).values, "n_other": right.notnull().sum(dim).values}
    frame = left.sum(dim)  # the remaining dimensions and labels
    return xr.Dataset({k: frame.copy(data=v) for k, v in {**parts, **counts}.items()})


def matched(right: xr.DataArray, left: xr.DataArray, dim: str, hint: str = "") -> xr.DataArray:
    """`right` in the order of `left` along `dim`, matched by label where both have labels."""
    if dim not in left.coords or dim not in right.coords:
        if left.sizes[dim] != right.sizes[dim]:
            raise ValueError(
                f"{left.sizes[dim]} and {right.sizes[dim]} values along {dim!r} cannot be paired{hint}"
            )
        return right
    ours, theirs = left[dim].values.tolist(), right[dim].values.tolist()
    if len(set(ours)) < len(ours) or len(ours) != len(theirs) or set(ours) != set(theirs):
        odd = list(set(ours) ^ set(theirs))[:5] or "labels that repeat"
        raise ValueError(f"the two sides do not pair up along {dim!r}: {odd}{hint}")
    return right.sel({dim: left[dim]})
