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

The statistics themselves work on plain arrays and are in `statistics`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mi_hops.result import intervals, netcdf
from mi_hops.result.checks import as_labels, check_finite
from mi_hops.result.difference import difference, require_same_unit, subtract
from mi_hops.result.display import shorten
from mi_hops.result.names import shared_tokens
from mi_hops.result.statistics import Statistic, to_numpy

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr
    from typing_extensions import Self

_FORMAT = 1
_MOST = 1500  # characters of a description, so that a cell of a notebook never floods


class Result:
    """Values per example with their labels, baselines, units, provenance and skipped examples.

    Args:
        data: Dataset, or mapping of names to arrays as `xarray.Dataset` takes it. Variables with the
            attribute ``role="baseline"`` are baselines; ``units`` is an attribute too.
        provenance: What made the numbers (model fingerprint, dtype, versions, seed, ...): anything
            JSON can hold.
        title: What the result is of, for figures and `describe`.
        main: The variable meant where none is named; the first that is not a baseline by default.
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

    Examples:
        >>> import mi_hops
        >>> values = {"effect": (("example", "layer"), [[0.0, 0.5], [0.5, 0.5]])}
        >>> result = mi_hops.Result.from_arrays(values, provenance={}, units={"effect": "nats"})
        >>> print((result - result.sel(example=[1, 0])).describe())
        n used 2, n skipped 0
        effect [example 2, layer 2]: nats
        >>> result.mean().values.tolist()
        [0.25, 0.5]
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
        if isinstance(used, int | np.integer):
            self._used: int | None = int(used)
        else:
            self._used = None if used is None else len(used)
        slashed = [name for name in self.data.variables if "/" in str(name)]
        if slashed:  # said now, not when a long sweep is saved
            raise ValueError(f"names {slashed} have a slash, which NetCDF cannot hold; rename them")
        values = [n for n, v in self.data.data_vars.items() if v.attrs.get("role") != "baseline"]
        if not values:
            raise ValueError("a result needs at least one variable that is not a baseline")
        if main is not None and main not in self.data.data_vars:
            raise ValueError(f"no variable {main!r}; there are {list(self.data.data_vars)}")
        self.main: str = main if main is not None else str(values[0])
        if not allow_nonfinite:
            for name, variable in self.data.data_vars.items():
                check_finite(str(name), variable)

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
    ) -> Self:
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
        labels = {name: as_labels(given) for name, given in (coords or {}).items()}
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
        return f"Result: {shorten(self.describe(), _MOST)}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(shorten(self.describe(), _MOST))}</pre>{self.data._repr_html_()}"

    def __sub__(self, other: Result) -> Result:
        """This result less another: every number they share by name, aligned by label.

        Units, labels and titles are kept; text and baselines are left out. The provenance holds both
        sides'. Examples that either side skipped count as skipped.

        Raises:
            ValueError: No shared variable, or one with other dimensions, labels or units.
        """
        if not isinstance(other, Result):
            return NotImplemented
        return Result(**subtract(self, other))

    def assign(
        self,
        variables: Mapping[str, Any] | None = None,
        *,
        coords: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        title: str | None = None,
        main: str | None = None,
    ) -> Result:
        """This result with variables, labels or entries of its provenance added or replaced.

        Args:
            variables, coords: As `xarray.Dataset.assign` and `assign_coords` take them:
                ``{"half": ("example", names)}``.
            provenance: Entries beside those there are.
            title, main: The new ones, where given.
        """
        data = self.data.assign(variables or {}).assign_coords(coords or {})
        return self._with(
            data,
            used=self._used,
            provenance={**self.provenance, **(provenance or {})},
            title=self.title if title is None else title,
            main=self.main if main is None else main,
        )

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
        """Number of examples used; None if it was not given and no dimension tells."""
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
        except (KeyError, IndexError) as error:
            known = {dim: self.data[dim].values.tolist()[:20] for dim in labels}
            raise ValueError(f"no {labels} in the result; labels begin with {known}") from error
        used = self._used
        if "example" in labels:
            used = int(part.sizes.get("example", 1))
        return self._with(part, used=used)

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
        array = self.numbers(variable, dim)
        return intervals.interval(array, dim, level, n_resamples, seed, statistic)

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
            groups: Instead of `other`: True and False for each example (or the name of a variable or
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
            ValueError: Both or neither of `other` and `groups`, labels that do not match, results in
                different units, groups that are not true or false.
        """
        left = self.numbers(variable, dim)
        if groups is not None and other is None:
            mask = intervals.as_mask(
                self.data[groups] if isinstance(groups, str) else groups, left.sizes[dim]
            )
            left, right, paired = left.isel({dim: mask}), left.isel({dim: ~mask}), False
        elif other is not None and groups is None:
            right = self._other_side(other, variable, dim)
        else:
            raise ValueError("give either other or groups")
        return difference(
            left, right, dim, paired=paired, level=level, n_resamples=n_resamples, seed=seed
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Long form: one row per variable, cell and example.

        Columns: ``variable``, ``role`` (value or baseline), the dimensions and further labels (empty
        where a variable does not have them), ``value``. A dimension or label that is called like one
        of the other columns is found under ``role (label)`` and the like.
        """
        import pandas as pd

        frames = []
        for name, variable in self.data.data_vars.items():
            if variable.ndim:
                frame = variable.to_dataframe(name="value").reset_index()
            else:
                labels = {label: [coord.item()] for label, coord in variable.coords.items()}
                frame = pd.DataFrame({**labels, "value": [variable.item()]})
            taken = {c: f"{c} (label)" for c in ("variable", "role") if c in frame}
            frame = frame.rename(columns=taken)
            frame.insert(0, "role", variable.attrs.get("role", "value"))
            frame.insert(0, "variable", str(name))
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        return table[[column for column in table.columns if column != "value"] + ["value"]]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one NetCDF file (through h5netcdf); nothing half-written is left on failure.

        Raises:
            FileExistsError: The file exists and `overwrite` is False.
            FileNotFoundError: The folder does not exist.
            ValueError: The name does not end in ``.nc``.
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
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a saved result, or one of a newer format.
        """
        dataset, header = netcdf.read(path)
        if header.pop("format") > _FORMAT:
            raise ValueError(f"{path} was saved by a newer version of mi_hops; update mi_hops")
        # Whether the numbers are finite was checked when the result was made.
        try:
            return cls(dataset, **header, allow_nonfinite=True)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole result: {error}") from error

    def plot(
        self, variable: str | None = None, *, kind: str | None = None, **keywords: Any
    ) -> go.Figure:
        """Figure of one variable: a heatmap, lines or bars, averaged over examples.

        With several examples their mean is drawn, and the title says so; lines and bars show its 95%
        bootstrap interval, heatmaps show it on hover. With one example the position axis carries its
        tokens. Two of (layer, head, position, strength) make a heatmap, with a panel for each value of
        a third dimension; one of them with numbers makes lines, any other axis bars, grouped by a
        second dimension. Scalar baselines of the same unit and kind are dotted lines.

        Args:
            variable: The main variable by default.
            kind: ``"heatmap"``, ``"lines"`` or ``"bars"`` instead of the choice above.
            keywords: For the function of that name in `plots`.

        Raises:
            ValueError: There are too many or too few dimensions for the figure; select first.
        """
        from mi_hops.result.draw import draw

        return draw(self, variable, kind, keywords)

    def _other_side(
        self, other: Result | xr.DataArray | str, variable: str | None, dim: str
    ) -> xr.DataArray:
        """What `difference_ci` subtracts, as floats."""
        if isinstance(other, str):
            return self.numbers(other, dim)
        if isinstance(other, Result):
            name = variable if variable is not None else self.main
            found = other.numbers(name if name in other.data else None, dim)
            require_same_unit(self.numbers(variable), found)
            return found
        if dim not in other.dims:
            raise ValueError(f"the other side has no dimension {dim!r}; it has {other.dims}")
        return other.astype(float)

    def _with(self, data: xr.Dataset, *, used: int | None, **changes: Any) -> Result:
        """This result with other data."""
        kept = {"provenance": self.provenance, "title": self.title, "main": self.main}
        return Result(
            data, used=used, skipped=self.skipped, allow_nonfinite=True, **{**kept, **changes}
        )

    def numbers(self, variable: str | None, dim: str | None = None) -> xr.DataArray:
        """A variable (the main one by default) as float64, checked to have the dimension."""
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
                note = intervals.averaging_note(statistic, over, array.notnull().sum(over).values)
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
        coords.update(shared_tokens(self.data) if dims == ["example"] else {})
        return self._with(xr.Dataset(reduced, coords=coords), used=self.n_used)
