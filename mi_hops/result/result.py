"""The labelled result every method returns, and the statistics that go with it.

A `Result` wraps an `xarray.Dataset`: values per example on named dimensions (``example``, ``layer``,
``position``, ``head``, ``metric``, ``strength``, any other), baselines beside them, units, what was
skipped and why, and where the numbers come from. It averages, gives bootstrap intervals, plots
itself, becomes a long data frame, and is saved as NetCDF, which any xarray can open::

    result = Result.from_arrays(
        {"effect": (("example", "layer"), effects)},
        coords={"example": ids, "layer": range(12)},
        baselines={"clean": ("example", clean)},
        units={"effect": "probability", "clean": "probability"},
        provenance=provenance,
        skipped=[("misery-3", "answer of another length")],
    )
    result.mean()["effect"], result.ci(), result.plot()

The statistics themselves work on plain arrays and stand in `statistics`; their names are here too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mi_hops.result import netcdf
from mi_hops.result.statistics import (
    Statistic,
    bootstrap_ci,
    difference_ci,
    point_estimate,
    proportion_ci,
    summarise_change,
    to_numpy,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

__all__ = ["Result", "bootstrap_ci", "difference_ci", "proportion_ci", "summarise_change"]

#: Units whose values cannot be negative, drawn on a white-to-blue scale.
POSITIVE_UNITS = frozenset({"probability", "share", "rank"})

_FORMAT = 1
_GRID = (
    "layer",
    "head",
    "kv_head",
    "position",
    "strength",
)  # dimensions that make the axes of a heatmap


class Result:
    """Values per example with their labels, baselines, units, provenance and skipped examples.

    Args:
        data: Dataset, or mapping of names to arrays as `xarray.Dataset` takes it. Variables with the
            attribute ``role="baseline"`` are baselines; ``units`` is an attribute too.
        provenance: What made the numbers (model fingerprint, dtype, versions, seed, ...): anything
            JSON can hold.
        title: What the result is of, for figures and `describe`.
        main: The variable meant where none is named; the first that is no baseline by default.
        used: How many examples the numbers rest on (or the examples); by default the length of the
            ``example`` dimension.
        skipped: (example, reason) of each example that was left out.
        allow_nonfinite: Take NaN and infinities. NaN then means "not measured" and is left out of
            every average.

    Attributes:
        data: The `xarray.Dataset`.
        provenance: A plain dict.
        skipped: List of (example, reason).

    Raises:
        ValueError: There is no value, a number is not finite, the type of an array cannot be saved,
            or provenance is not JSON.
    """

    def __init__(
        self,
        data: xr.Dataset | Mapping[str, Any],
        *,
        provenance: Mapping[str, Any],
        title: str = "",
        main: str | None = None,
        used: int | Sequence[Any] | None = None,
        skipped: Iterable[tuple[str, str]] = (),
        allow_nonfinite: bool = False,
    ) -> None:
        import xarray as xr

        dataset = data if isinstance(data, xr.Dataset) else xr.Dataset(dict(data))
        self.data: xr.Dataset = dataset.map(netcdf.storable, keep_attrs=True).assign_coords(
            {
                name: netcdf.storable(coord)
                for name, coord in dataset.coords.items()
                if name not in dataset.dims
            }
        )
        self.provenance: dict[str, Any] = netcdf.json_copy(provenance, "provenance")
        self.title = title
        self.skipped: list[tuple[str, str]] = [(str(who), str(why)) for who, why in skipped]
        self._used = used if used is None or isinstance(used, int) else len(used)
        slashed = [name for name in self.data.variables if "/" in str(name)]
        if slashed:  # said now, not when a long sweep is saved
            raise ValueError(f"names {slashed} have a slash, which NetCDF cannot hold; rename them")
        values = [n for n, v in self.data.data_vars.items() if v.attrs.get("role") != "baseline"]
        if not values:
            raise ValueError("a result needs at least one variable that is no baseline")
        if main is not None and main not in self.data.data_vars:
            raise ValueError(f"no variable {main!r}; there are {list(self.data.data_vars)}")
        self.main: str = main if main is not None else str(values[0])
        if not allow_nonfinite:
            for name, variable in self.data.data_vars.items():
                _check_finite(str(name), variable)

    @classmethod
    def from_arrays(
        cls,
        values: Mapping[str, tuple[str | Sequence[str], Any]],
        *,
        provenance: Mapping[str, Any],
        coords: Mapping[str, Any] | None = None,
        baselines: Mapping[str, tuple[str | Sequence[str], Any]] | None = None,
        units: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> Result:
        """Build a result from arrays, lists or torch tensors.

        Args:
            values: Name -> (dimension names, array). Tensors come from any device and any float type
                (16-bit floats become float32).
            provenance: As in `Result`.
            coords: Dimension -> its labels, or name -> (dimension names, labels) for further labels,
                such as ``"token": ("position", tokens)``.
            baselines: Like `values`; what the values are to be compared with (clean, corrupted).
            units: Name -> unit, such as ``"probability"``, ``"nats"`` or ``"logits"``.
            keywords: The other arguments of `Result`.

        Raises:
            ValueError: As in `Result`; or two arrays differ in the length of a dimension, a name is
                used twice, or a unit is given for no variable.
        """
        import xarray as xr

        baselines = dict(baselines or {})
        both = {**values, **baselines}
        if len(both) < len(values) + len(baselines):
            raise ValueError(f"{sorted(set(values) & set(baselines))} are both value and baseline")
        unknown = set(units or {}) - set(both)
        if unknown:
            raise ValueError(f"units for {sorted(unknown)}, but the variables are {sorted(both)}")
        variables = {}
        for name, (dims, array) in both.items():
            attributes = {"role": "baseline"} if name in baselines else {}
            if units and name in units:
                attributes["units"] = units[name]
            variables[name] = xr.Variable(dims, to_numpy(array), attributes)
        labels = {name: _labels(given) for name, given in (coords or {}).items()}
        for name, variable in variables.items():
            if name in variable.dims or name in labels:
                raise ValueError(
                    f"{name!r} is a variable and a dimension or coordinate; rename one"
                )
        return cls(xr.Dataset(variables, coords=labels), provenance=provenance, **keywords)

    def __getitem__(self, name: str) -> xr.DataArray:
        if name not in self.data:
            raise KeyError(f"no {name!r} in the result; there are {list(self.data.variables)}")
        return self.data[name]

    def __repr__(self) -> str:
        return f"Result: {self.describe()}\n{self.data!r}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(self.describe())}</pre>{self.data._repr_html_()}"

    @property
    def values(self) -> np.ndarray:
        """The main variable as a numpy array."""
        return self[self.main].values

    @property
    def baselines(self) -> list[str]:
        """Names of the baseline variables."""
        return [str(n) for n, v in self.data.data_vars.items() if v.attrs.get("role") == "baseline"]

    @property
    def n_used(self) -> int | None:
        """How many examples the numbers rest on; None where nobody said and no dimension tells."""
        return self._used if self._used is not None else self.data.sizes.get("example")

    def describe(self) -> str:
        """Title, then ``n used 40, n skipped 3 (2 no bridge, 1 unequal lengths)``, then each variable."""
        reasons = Counter(why for _, why in self.skipped).most_common()
        why = f" ({', '.join(f'{count} {reason}' for reason, count in reasons)})" if reasons else ""
        used = "unknown" if self.n_used is None else self.n_used
        lines = [self.title] if self.title else []
        lines.append(f"n used {used}, n skipped {len(self.skipped)}{why}")
        for name, variable in self.data.data_vars.items():
            shape = ", ".join(f"{dim} {size}" for dim, size in variable.sizes.items())
            notes = [
                variable.attrs[key]
                for key in ("role", "units", "averaging")
                if key in variable.attrs
            ]
            lines.append(f"{name} [{shape}]{': ' if notes else ''}{'; '.join(notes)}")
        return "\n".join(lines)

    def sel(self, **labels: Any) -> Result:
        """The part with these labels, as in `xarray.Dataset.sel`: ``sel(layer=3, metric="rank")``.

        Raises:
            ValueError: There is no such dimension or label.
        """
        unknown = set(labels) - set(self.data.dims)
        if unknown:
            raise ValueError(f"no dimension {sorted(unknown)}; there are {list(self.data.dims)}")
        try:
            part = self.data.sel(labels)
        except KeyError as error:
            known = {dim: self.data[dim].values.tolist()[:20] for dim in labels}
            raise ValueError(f"no {labels} in the result; labels begin with {known}") from error
        used = self._used
        if "example" in labels:
            used = int(part.sizes.get("example", 1))
        return self._with(part, used=used)

    def assign(self, *, title: str | None = None, main: str | None = None, **labels: Any) -> Result:
        """The same numbers with further labels, another title or another main variable.

        Args:
            labels: name -> (dimension, labels), such as ``group=("example", names)``.
        """
        changed = self._with(self.data.assign_coords(labels), used=self._used)
        changed.title = self.title if title is None else title
        changed.main = self.main if main is None else main
        return changed

    def mean(self, dim: str | Sequence[str] = "example") -> Result:
        """Mean over one or more dimensions, NaN left out; text variables on them are dropped."""
        return self._reduce("mean", dim)

    def median(self, dim: str | Sequence[str] = "example") -> Result:
        """Median over one or more dimensions, NaN left out; text variables on them are dropped."""
        return self._reduce("median", dim)

    def ci(
        self,
        dim: str = "example",
        *,
        variable: str | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
        statistic: Statistic = "mean",
    ) -> xr.Dataset:
        """Bootstrap interval of a statistic of one variable over one dimension.

        Returns:
            Dataset on the remaining dimensions: ``estimate``, ``lower``, ``upper`` (units of the
            variable) and ``n``, the number of values that are not NaN. Where n is 0 everything else
            is NaN; where it is 1 the interval is NaN, for one value says nothing about spread.

        Raises:
            ValueError: No such variable or dimension, no numbers, or a bad `level` or `n_resamples`.
        """
        array = self._numbers(variable, dim)
        return _interval_dataset(array, dim, level, n_resamples, seed, statistic)

    def difference_ci(
        self,
        other: Result | xr.DataArray | str | None = None,
        *,
        groups: str | Sequence[bool] | np.ndarray | None = None,
        variable: str | None = None,
        dim: str = "example",
        paired: bool = True,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> xr.Dataset:
        """Difference of means with its bootstrap interval.

        Args:
            other: What is subtracted: another result (its variable of the same name, or its main
                one), an array, or the name of a variable of this result, such as a baseline.
            groups: In place of `other`: True and False for each example (or the name of a variable or
                coordinate that says so). The mean of the False ones is subtracted from that of the
                True ones, unpaired.
            variable: The variable compared; the main one by default.
            dim: The dimension averaged over.
            paired: Subtract example by example (matched by label where both have labels) before
                averaging. False resamples the two sides on their own.
            level, n_resamples, seed: As in `bootstrap_ci`.

        Returns:
            Dataset on the remaining dimensions: ``estimate``, ``lower``, ``upper``; ``n`` and
            ``n_other``, the values on each side. NaN intervals where a side has fewer than two.

        Raises:
            ValueError: Both or neither of `other` and `groups`, labels that do not match, groups
                that are not true or false.
        """
        import xarray as xr

        left = self._numbers(variable, dim)
        if groups is not None and other is None:
            mask = _mask(self.data[groups] if isinstance(groups, str) else groups, left.sizes[dim])
            left, right, paired = left.isel({dim: mask}), left.isel({dim: ~mask}), False
        elif other is not None and groups is None:
            right = self._other_side(other, variable, dim)
        else:
            raise ValueError("give either other or groups")
        if paired:
            right = _matched(right, left, dim)
        try:
            left, right = xr.align(left, right, join="exact", exclude=[] if paired else [dim])
        except ValueError as error:
            raise ValueError(f"the two sides have different labels or lengths: {error}") from error
        if paired:
            ci = _interval_dataset(left - right, dim, level, n_resamples, seed, "mean")
            return ci.assign(n_other=ci["n"])
        left, right = xr.broadcast(left, right, exclude=[dim])
        left = left.transpose(dim, ...)
        right = right.transpose(*left.dims)
        ends = difference_ci(
            left.values, right.values, level=level, n_resamples=n_resamples, seed=seed
        )
        parts = dict(zip(("estimate", "lower", "upper"), ends, strict=True))
        counts = {"n": left.notnull().sum(dim).values, "n_other": right.notnull().sum(dim).values}
        frame = left.sum(dim)  # the remaining dimensions and labels
        return xr.Dataset({k: frame.copy(data=v) for k, v in {**parts, **counts}.items()})

    def to_dataframe(self) -> pd.DataFrame:
        """Long form: one row per variable, cell and example.

        Columns: ``variable``, ``role`` (value or baseline), the dimensions and further labels (empty
        where a variable has not got them), ``value``.
        """
        import pandas as pd

        frames = []
        for name, variable in self.data.data_vars.items():
            if variable.ndim:
                frame = variable.to_dataframe(name="value").reset_index()
            else:
                labels = {label: [coord.item()] for label, coord in variable.coords.items()}
                frame = pd.DataFrame({**labels, "value": [variable.item()]})
            frame.insert(0, "role", variable.attrs.get("role", "value"))
            frame.insert(0, "variable", str(name))
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        return table[[column for column in table.columns if column != "value"] + ["value"]]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one NetCDF file (through h5netcdf); nothing half-written is left on failure.

        Raises:
            ValueError: The file exists and `overwrite` is False, or the folder does not exist.
        """
        header = {
            "format": _FORMAT,
            "title": self.title,
            "main": self.main,
            "used": self._used,
            "skipped": self.skipped,
            "provenance": self.provenance,
        }
        return netcdf.write(self.data, path, header=header, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no saved result, or one of a newer format.
        """
        dataset, header = netcdf.read(path)
        if header.pop("format") > _FORMAT:
            raise ValueError(f"{path} was saved by a newer version of mi_hops; update mi_hops")
        # Whether the numbers are finite was judged when the result was made.
        return cls(dataset, **header, allow_nonfinite=True)

    def plot(
        self, variable: str | None = None, *, kind: str | None = None, **keywords: Any
    ) -> go.Figure:
        """Figure of one variable: a heatmap, lines or bars, averaged over examples.

        With several examples their mean is drawn, and the title says so; lines and bars show its 95%
        bootstrap interval, heatmaps tell it on hover. With one example the position axis carries its
        tokens. Two of (layer, head, position, strength) make a heatmap, with a panel for each value of
        a third dimension; one of them with numbers makes lines, any other axis bars, grouped by a
        second dimension. Scalar baselines of the same unit are dotted lines.

        Args:
            variable: The main variable by default.
            kind: ``"heatmap"``, ``"lines"`` or ``"bars"`` in place of the choice above.
            keywords: For the function of that name in `plots`.

        Raises:
            ValueError: There are too many or too few dimensions for the figure; select first.
        """
        from mi_hops.result import plots

        name = variable if variable is not None else self.main
        array, interval, note = self._averaged(name)
        grid = [dim for dim in _GRID if dim in array.dims]
        axes = [*grid, *(str(dim) for dim in array.dims if dim not in grid)]
        if kind is None:
            one_axis = "lines" if grid and array[grid[0]].dtype.kind in "iuf" else "bars"
            kind = "heatmap" if len(grid) >= 2 else one_axis
        if kind not in ("heatmap", "lines", "bars"):
            raise ValueError(f"kind {kind!r}; choose heatmap, lines or bars")
        fewest, most = (2, 3) if kind == "heatmap" else (1, 2)
        if not fewest <= len(axes) <= most:
            raise ValueError(
                f"{name!r} has dimensions {axes} left and {kind} needs {fewest} or {most}; select "
                "or average some, or choose another kind"
            )
        unit = self[name].attrs.get("units")
        title = self.title or name
        label = f"{name} ({unit})" if unit else name
        options: dict[str, Any] = {"title": f"{title} ({note})" if note else title}
        if kind == "heatmap":
            options |= {"y": axes[0], "x": axes[1], "facet": axes[2] if len(axes) > 2 else None}
            smallest = array.min().item() if array.notnull().any() else 0.0
            options |= {
                "colour_label": label,
                "sequential": unit in POSITIVE_UNITS and smallest >= 0,
            }
            if interval is not None:
                ends = {"95% from": interval["lower"], "to": interval["upper"]}
                options["hover"] = {"n": interval["n"], **ends}
            return plots.heatmap(array, **{**options, **keywords})
        columns = array.to_dataset(name="estimate") if interval is None else interval
        columns = columns.assign_coords({dim: array[dim] for dim in axes})
        if kind == "bars":
            columns = columns.assign_coords({dim: plots.axis_labels(array, dim) for dim in axes})
        options |= {"x": axes[0], "y": "estimate", "group": axes[1] if len(axes) > 1 else None}
        options |= {"y_label": label, "references": self._scalar_baselines(unit)}
        if interval is not None:
            options |= {"lower": "lower", "upper": "upper"}
        draw = plots.lines if kind == "lines" else plots.bars
        return draw(columns.to_dataframe().reset_index(), **{**options, **keywords})

    def _averaged(self, name: str) -> tuple[xr.DataArray, xr.Dataset | None, str]:
        """A variable without its example dimension, its interval if it was averaged, and a note."""
        array = self._numbers(name)
        note = str(self[name].attrs.get("averaging", ""))
        if "example" not in array.dims:
            return array, None, note
        if array.sizes["example"] == 1:
            array = array.isel(example=0)
            return (
                array,
                None,
                f"example {array['example'].item()}" if "example" in array.coords else note,
            )
        interval = _interval_dataset(array, "example", 0.95, 1000, 0, "mean")
        over = _averaging("mean", ["example"], array.notnull().sum("example").values)
        return interval["estimate"], interval, f"{over} of {note}" if note else over

    def _other_side(
        self, other: Result | xr.DataArray | str, variable: str | None, dim: str
    ) -> xr.DataArray:
        """What `difference_ci` subtracts, as floats."""
        if isinstance(other, str):
            return self._numbers(other, dim)
        if isinstance(other, Result):
            name = variable if variable is not None else self.main
            return other._numbers(name if name in other.data else None, dim)
        if dim not in other.dims:
            raise ValueError(f"the other side has no dimension {dim!r}; it has {other.dims}")
        return other.astype(float)

    def _with(self, data: xr.Dataset, *, used: int | None) -> Result:
        """This result with other data."""
        return Result(
            data,
            provenance=self.provenance,
            title=self.title,
            main=self.main,
            used=used,
            skipped=self.skipped,
            allow_nonfinite=True,
        )

    def _numbers(self, variable: str | None, dim: str | None = None) -> xr.DataArray:
        """A variable as float64, checked to have the dimension."""
        name = self.main if variable is None else variable
        if name not in self.data.data_vars:
            raise ValueError(f"no variable {name!r}; there are {list(self.data.data_vars)}")
        array = self.data[name]
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name!r} holds {array.dtype}, not numbers")
        if dim is not None and dim not in array.dims:
            raise ValueError(f"{name!r} has no dimension {dim!r}; it has {array.dims}")
        return array.astype(float)

    def _reduce(self, statistic: Literal["mean", "median"], dim: str | Sequence[str]) -> Result:
        import xarray as xr

        dims = [dim] if isinstance(dim, str) else list(dim)
        unknown = set(dims) - set(self.data.dims)
        if unknown:
            raise ValueError(f"no dimension {sorted(unknown)}; there are {list(self.data.dims)}")
        reduced = {}
        for name, array in self.data.data_vars.items():
            over = [d for d in dims if d in array.dims]
            if over and array.dtype.kind not in "biuf":
                continue
            if over:
                note = _averaging(statistic, over, array.notnull().sum(over).values)
                before = array.attrs.get("averaging")
                note = f"{note} of {before}" if before else note
                array = getattr(array.astype(float), statistic)(over, keep_attrs=True)
                array = array.assign_attrs(averaging=note)
            reduced[name] = array
        if self.main not in reduced:
            raise ValueError(f"{self.main!r} is text and cannot be averaged over {dims}")
        coords = {
            name: coord
            for name, coord in self.data.coords.items()
            if not set(dims) & set(coord.dims)
        }
        return self._with(xr.Dataset(reduced, coords=coords), used=self.n_used)

    def _scalar_baselines(self, unit: str | None) -> dict[str, float]:
        """Means of the baselines of this unit that have no dimension but example."""
        found = {}
        for name in self.baselines:
            array = self.data[name]
            same = array.attrs.get("units") == unit and array.dtype.kind in "biuf"
            if same and set(array.dims) <= {"example"} and array.notnull().any():
                found[name] = float(array.astype(float).mean())
        return found


def _interval_dataset(
    array: xr.DataArray, dim: str, level: float, n_resamples: int, seed: int, statistic: Statistic
) -> xr.Dataset:
    """estimate, lower, upper and n of an array of floats over one of its dimensions."""
    import xarray as xr

    array = array.transpose(dim, ...)
    lower, upper = bootstrap_ci(
        array.values, level=level, n_resamples=n_resamples, seed=seed, statistic=statistic
    )
    parts = {
        "estimate": point_estimate(array.values, statistic),
        "lower": lower,
        "upper": upper,
        "n": array.notnull().sum(dim).values,
    }
    frame = array.sum(dim)  # the remaining dimensions and labels
    return xr.Dataset({name: frame.copy(data=values) for name, values in parts.items()})


def _matched(right: xr.DataArray, left: xr.DataArray, dim: str) -> xr.DataArray:
    """`right` in the order of `left` along `dim`, matched by label where both have labels."""
    if dim not in left.coords or dim not in right.coords:
        if left.sizes[dim] != right.sizes[dim]:
            raise ValueError(
                f"{left.sizes[dim]} and {right.sizes[dim]} values along {dim!r} make no pairs; "
                "pass paired=False"
            )
        return right
    ours, theirs = left[dim].values.tolist(), right[dim].values.tolist()
    if len(set(ours)) < len(ours) or sorted(map(str, ours)) != sorted(map(str, theirs)):
        odd = list(set(ours) ^ set(theirs))[:5] or "labels that repeat"
        raise ValueError(f"the two sides do not pair up along {dim!r}: {odd}; pass paired=False")
    return right.sel({dim: left[dim]})


def _mask(groups: Any, size: int) -> np.ndarray:
    mask = np.asarray(groups)
    if mask.shape != (size,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"groups must be {size} times true or false, got {mask.dtype}{mask.shape}")
    return mask.astype(bool)


def _averaging(statistic: str, dims: Sequence[str], counts: np.ndarray) -> str:
    """``mean over n=12 examples``, ``mean over n=3 to 5 (layer x head)``."""
    low, high = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    what = f"{dims[0]}{'' if high == 1 else 's'}" if len(dims) == 1 else f"({' x '.join(dims)})"
    return f"{statistic} over n={low if low == high else f'{low} to {high}'} {what}"


def _labels(given: Any) -> Any:
    """A coordinate as xarray takes it: labels, or (dimensions, labels)."""
    if isinstance(given, tuple) and len(given) == 2 and not np.isscalar(given[1]):
        dims, labels = given
        names = (dims,) if isinstance(dims, str) else dims
        if isinstance(names, Iterable) and all(isinstance(name, str) for name in names):
            return (dims, to_numpy(labels))
    return given if np.isscalar(given) else to_numpy(given)


def _check_finite(name: str, array: xr.DataArray) -> None:
    if array.dtype.kind != "f":
        return
    bad = np.argwhere(~np.isfinite(array.values))
    if not len(bad):
        return
    at = dict(zip(array.dims, bad[0].tolist(), strict=True))
    labels = {
        dim: array[dim].values[index].item() for dim, index in at.items() if dim in array.coords
    }
    raise ValueError(
        f"{name!r} is {array.values[tuple(bad[0])]} at index {at} (labels {labels}), {len(bad)} such of "
        f"{array.size}; mend or skip them, or pass allow_nonfinite=True if NaN means not measured"
    )
