"""Bootstrap intervals of a labelled array over one of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.statistics import Statistic, bootstrap_ci, point_estimate

if TYPE_CHECKING:
    import xarray as xr


def interval(
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


def as_mask(groups: Any, size: int) -> np.ndarray:
    """True and False for each of `size` examples."""
    mask = np.asarray(groups)
    if mask.shape != (size,) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"groups must be {size} times true or false, got {mask.dtype}{mask.shape}")
    return mask.astype(bool)


def averaging_note(statistic: str, dims: Sequence[str], counts: np.ndarray) -> str:
    """``mean over n=12 examples``, ``mean over n=3 to 5 (layer x head)``."""
    counts = counts[counts > 0]  # cells without a value have no n
    low, high = (int(counts.min()), int(counts.max())) if counts.size else (0, 0)
    what = f"{dims[0]}{'' if high == 1 else 's'}" if len(dims) == 1 else f"({' x '.join(dims)})"
    return f"{statistic} over n={low if low == high else f'{low} to {high}'} {what}"
