"""What a result may hold: labels as xarray takes them, and finite numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.statistics import to_numpy

if TYPE_CHECKING:
    import xarray as xr


def as_labels(given: Any) -> Any:
    """A coordinate as xarray takes it: labels, or (dimensions, labels)."""
    if isinstance(given, tuple) and len(given) == 2 and not np.isscalar(given[1]):
        dims, labels = given
        names = (dims,) if isinstance(dims, str) else dims
        if isinstance(names, Iterable) and all(isinstance(name, str) for name in names):
            return (dims, to_numpy(labels))
    return given if np.isscalar(given) else to_numpy(given)


def check_finite(name: str, array: xr.DataArray) -> None:
    """Refuse NaN and infinities, naming the first one's labels."""
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
        f"{array.size}; fix or skip them, or pass allow_nonfinite=True if NaN means not measured"
    )
