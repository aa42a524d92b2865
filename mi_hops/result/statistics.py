"""Statistics over examples: bootstrap and exact intervals, and ways to report a heavy-tailed change.

Plain arrays in, plain arrays (or a small frame) out. Intervals are percentile bootstraps over
examples: a whole example is resampled with all its cells, so that cells stay comparable, and every
statistic sees the same resamples for one seed. NaN means "not measured". `scipy.stats.bootstrap`
computes the same for complete data; here a mean over a grid of cells is one matrix product, and
missing values, single values and empty samples are answered rather than refused.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

#: ``"mean"``, ``"median"`` (both skip NaN), or a function ``f(array, axis=...)`` that reduces the axis.
Statistic = Literal["mean", "median"] | Callable[..., Any]

#: Of a mean of relative changes: there is none. A few of the values carry such a mean, a sample
#: mostly lacks them, and no bootstrap knows what is not in its sample: intervals "of 95%" hold the true
#: mean far less often (``docs/benchmarks/interval-coverage.md``). Medians, trimmed means and mean log
#: changes have honest ones.
NO_INTERVAL = (np.nan, np.nan)

_CHUNK = 2**22  # numbers held at once while resampling


def bootstrap_ci(
    values: Any,
    *,
    axis: int = 0,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    statistic: Statistic | Callable[..., Any] = np.mean,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic along one axis.

    Rows of the axis are drawn with replacement, each with all its cells, from a generator of its own.

    Args:
        values: Numbers, any shape. For means and medians NaN is "not measured" and left out.
        axis: The axis resampled (examples).
        level: Coverage aimed at, between 0 and 1.
        n_resamples: Number of resamples.
        seed: Seed of the generator.
        statistic: ``"mean"`` or `np.mean`, ``"median"`` or `np.median`, or ``f(array, axis=...)``.

    Returns:
        (lower, upper), each with the shape of `values` without the axis. NaN where there are fewer
        than two values: one value says nothing about spread.

    Raises:
        ValueError: `level` or `n_resamples` out of range.
    """
    _check_settings(level, n_resamples)
    array = np.moveaxis(np.asarray(to_numpy(values), dtype=float), axis, 0)
    cells = array.reshape(len(array), int(np.prod(array.shape[1:])))
    named = _named(statistic)
    few = (~np.isnan(cells)).sum(axis=0) < 2
    lower, upper = _ends(
        lambda part: _resample(cells[:, part], named, n_resamples, np.random.default_rng(seed)),
        few,
        level,
        n_resamples,
    )
    return lower.reshape(array.shape[1:]), upper.reshape(array.shape[1:])


def point_estimate(values: Any, statistic: Statistic | Callable[..., Any] = "mean") -> np.ndarray:
    """The statistic over the first axis, NaN left out; NaN where nothing is left.

    Arguments as in `bootstrap_ci`; the two belong together.
    """
    array = np.asarray(to_numpy(values), dtype=float)
    if not len(array):
        return np.full(array.shape[1:], np.nan)
    return _statistic(_named(statistic), array, 0)


def difference_ci(
    a: Any,
    b: Any,
    *,
    paired: bool = False,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean(a) - mean(b) over the first axis, with its percentile bootstrap interval.

    Args:
        a, b: [n_a, ...] and [n_b, ...]; NaN is left out. Paired, n_a = n_b and differences are
            resampled; unpaired, the two sides are resampled each on its own.
        paired, level, n_resamples, seed: As in `bootstrap_ci`.

    Returns:
        (estimate, lower, upper), each [...]. The interval is NaN where a side has fewer than two.

    Raises:
        ValueError: Shapes that do not fit, `level` or `n_resamples` out of range.
    """
    _check_settings(level, n_resamples)
    a, b = (np.asarray(to_numpy(side), dtype=float) for side in (a, b))
    if a.shape[1:] != b.shape[1:] or (paired and len(a) != len(b)):
        raise ValueError(f"shapes {a.shape} and {b.shape} do not fit (paired={paired})")
    shape = a.shape[1:]
    sides = [a - b] if paired else [a, b]
    flat = [side.reshape(len(side), int(np.prod(shape))) for side in sides]
    # Spawned, so that equal inputs do not move together and cancel.
    streams = np.random.SeedSequence(seed).spawn(len(flat))

    def draw(part: slice) -> np.ndarray:
        draws = [
            _resample(cells[:, part], "mean", n_resamples, np.random.default_rng(stream))
            for cells, stream in zip(flat, streams, strict=True)
        ]
        return draws[0] if paired else draws[0] - draws[1]

    few = np.any([(~np.isnan(cells)).sum(axis=0) < 2 for cells in flat], axis=0)
    lower, upper = _ends(draw, few, level, n_resamples)
    means = [_quiet_mean(cells, 0) for cells in flat]
    estimate = means[0] if paired else means[0] - means[1]
    return estimate.reshape(shape), lower.reshape(shape), upper.reshape(shape)


def proportion_ci(k: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a proportion: k of n. (0, 1) where n = 0.

    Raises:
        ValueError: Not 0 <= k <= n, or `level` out of range.
    """
    from scipy.special import betaincinv

    _check_settings(level, 1)
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a proportion; expected 0 <= k <= n")
    if n == 0:
        return 0.0, 1.0
    # Quantiles of beta distributions: those of scipy.stats.binomtest, which searches for each.
    tail = (1 - level) / 2
    low = betaincinv(k, n - k + 1, tail) if k else 0.0
    high = betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
    return float(low), float(high)


def summarise_change(
    before: Any, after: Any, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Change of positive numbers (probabilities) from `before` to `after`, summarised in several ways.

    Relative change r = (after - before) / before is unbounded above and dominated by tiny denominators,
    so its mean never stands alone. r is 0 where before is 0, as in the published CREME code.

    Args:
        before, after: [example], not negative, paired.
        level, n_resamples, seed: For the intervals. All rows share one set of resamples.

    Returns:
        Frame indexed by statistic with columns ``value``, ``lower``, ``upper``, ``n`` (examples that
        enter) and ``unit``. The interval of ``share_improved`` is Clopper-Pearson's, the others are
        percentile bootstraps over examples, NaN below two examples and for means of r (see
        `NO_INTERVAL`). Rows:

        - ``n``, ``n_zero_before``: how many examples, and how many with before = 0;
        - ``mean_relative_change``: mean r, the CREME paper's number;
        - ``mean_relative_change_within_2sd``: mean of the r with ``|r - mean(r)| <= 2 sd(r)``, population
          sd, one pass: the memory-injection thesis's number;
        - ``median_relative_change``: median r;
        - ``share_improved``: share with after > before;
        - ``mean_log_change``: mean of ln(after / before) over examples where both are positive, nats;
        - ``ratio_of_means_change``: mean(after) / mean(before) - 1;
        - ``mean_change``: mean(after - before), in the unit of the input.

    Raises:
        ValueError: Shapes differ or are not [example], or a number is negative or not finite.
    """
    import pandas as pd

    _check_settings(level, n_resamples)
    pre, post = (np.asarray(to_numpy(side), dtype=float) for side in (before, after))
    if pre.ndim != 1 or pre.shape != post.shape:
        raise ValueError(f"expected two arrays [example], got {pre.shape} and {post.shape}")
    for name, side in (("before", pre), ("after", post)):
        bad = np.flatnonzero(~(np.isfinite(side) & (side >= 0)))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {side[bad[0]]}; expected finite, not negative")
    n = len(pre)
    relative, logs = relative_change(pre, post), log_change(pre, post)
    statistics: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, str]] = {
        "mean_relative_change": (lambda i: relative[i].mean(-1), n, "fraction of before"),
        "mean_relative_change_within_2sd": (
            lambda i: _mean_within_2sd(relative[i]),
            int(_kept(relative).sum()) if n else 0,
            "fraction of before",
        ),
        "median_relative_change": (lambda i: np.median(relative[i], -1), n, "fraction of before"),
        "mean_log_change": (
            lambda i: _quiet_mean(logs[i], -1),
            int((~np.isnan(logs)).sum()),
            "nats",
        ),
        "ratio_of_means_change": (
            lambda i: _ratio(post[i].mean(-1), pre[i].mean(-1)) - 1,
            n,
            "fraction of mean before",
        ),
        "mean_change": (lambda i: (post[i] - pre[i]).mean(-1), n, "as given"),
    }
    draws: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    if n > 1:
        for rows in _index_chunks(n, n_resamples, np.random.default_rng(seed), n):
            for name, (statistic, _, _) in statistics.items():
                draws[name].append(statistic(rows))
    improved = int((post > pre).sum())
    low, high = proportion_ci(improved, n, level=level)
    nothing = (np.nan, np.nan)
    table: dict[str, tuple[float, float, float, int, str]] = {
        "n": (n, *nothing, n, "examples"),
        "n_zero_before": (int((pre == 0).sum()), *nothing, n, "examples"),
    }
    everyone = np.arange(n)
    for name, (statistic, count, unit) in statistics.items():
        value = float(statistic(everyone)) if n else np.nan
        lower, upper = nothing
        if count > 1 and not name.startswith("mean_relative_change"):
            ends = _percentiles(np.concatenate(draws[name])[:, None], level, np.array([False]))
            lower, upper = ends[:, 0].tolist()
        table[name] = (value, lower, upper, count, unit)
        if name == "median_relative_change":
            table["share_improved"] = (improved / n if n else np.nan, low, high, n, "share")
    columns = ["value", "lower", "upper", "n", "unit"]
    frame = pd.DataFrame.from_dict(table, orient="index", columns=columns)
    return frame.rename_axis("statistic")


def split_halves(ids: Sequence[Hashable], *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Two random halves of some labels (to choose on, to report on), each in the given order.

    Raises:
        ValueError: fewer than two labels, or repeated ones.

    Examples:
        >>> import mi_hops
        >>> mi_hops.split_halves(["a", "b", "c", "d"])
        (['a', 'c'], ['b', 'd'])
    """
    labels = list(ids)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(
            f"expected at least two distinct labels to split, got {len(labels)} "
            f"({len(set(labels))} distinct)"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    first = set(order[: (len(labels) + 1) // 2].tolist())
    return (
        [label for i, label in enumerate(labels) if i in first],
        [label for i, label in enumerate(labels) if i not in first],
    )


def relative_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(after - before) / before [example]; 0 where before is 0."""
    return np.divide(after - before, before, out=np.zeros(len(before)), where=before > 0)


def log_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """log(after / before) [example], in nats; NaN where either is 0."""
    both = (before > 0) & (after > 0)
    logs = np.full(len(before), np.nan)
    logs[both] = np.log(after[both]) - np.log(before[both])
    return logs


def _kept(r: np.ndarray) -> np.ndarray:
    """Which of r [..., example] lie within two population standard deviations of their mean."""
    kept = np.abs(r - r.mean(-1, keepdims=True)) <= 2 * r.std(-1, keepdims=True)
    # Rounding can put every member of a constant sample "outside" a standard deviation of about 0.
    return kept | ~kept.any(-1, keepdims=True)


def _mean_within_2sd(r: np.ndarray) -> np.ndarray:
    kept = _kept(r)
    return np.where(kept, r, 0.0).sum(-1) / kept.sum(-1)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is not positive."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


def _quiet_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean without NaN; NaN, and no warning, where nothing is left."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(axis), known.sum(axis))


def _check_settings(level: float, n_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; expected at least 1")


def _named(statistic: Statistic | Callable[..., Any]) -> Statistic:
    """`mean` and `median` by name, also where numpy's functions were given."""
    if statistic is np.mean or statistic is np.nanmean:
        return "mean"
    if statistic is np.median or statistic is np.nanmedian:
        return "median"
    if not callable(statistic) and statistic not in ("mean", "median"):
        raise ValueError(f"statistic {statistic!r}; expected mean, median or f(array, axis=...)")
    return statistic


def _statistic(statistic: Statistic, values: np.ndarray, axis: int) -> np.ndarray:
    if callable(statistic):
        return np.asarray(statistic(values, axis=axis))
    if statistic == "mean":
        return _quiet_mean(values, axis)
    if not np.isnan(values).any():
        return np.asarray(np.median(values, axis=axis))
    # NaN sorts to the end: the median lies in the middle of the others.
    ordered = np.sort(values, axis=axis)
    count = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    middle = [
        np.take_along_axis(ordered, np.maximum(at, 0), axis)
        for at in ((count - 1) // 2, count // 2)
    ]
    return np.squeeze((middle[0] + middle[1]) / 2, axis)


def _index_chunks(
    n: int, n_resamples: int, rng: np.random.Generator, width: int
) -> Iterator[np.ndarray]:
    """Resampled indices [some resamples, n], few enough at once for `width` numbers per resample."""
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, n_resamples, size):
        yield rng.integers(0, n, size=(min(size, n_resamples - start), n))


def _resample(
    cells: np.ndarray, statistic: Statistic, n_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Statistic of each resample of cells [n, cell] -> [n_resamples, cell]."""
    n, width = cells.shape
    if n < 2 or width == 0:
        return np.full((1, width), np.nan)
    # A mean is a product with how often each example was drawn: one matrix product for all cells.
    # Infinities would turn to NaN in it (0 * inf), so they take the longer way.
    if statistic != "mean" or np.isinf(cells).any():
        chunks = _index_chunks(n, n_resamples, rng, n * width)
        return np.concatenate([_statistic(statistic, cells[rows], 1) for rows in chunks])
    known = ~np.isnan(cells)
    filled = np.where(known, cells, 0.0)
    draws = []
    for rows in _index_chunks(n, n_resamples, rng, n):
        flat = rows + n * np.arange(len(rows))[:, None]
        weights = np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)
        counts = (
            np.full((len(rows), width), float(n)) if known.all() else weights @ known.astype(float)
        )
        draws.append(_ratio(weights @ filled, counts))
    return np.concatenate(draws)


def _ends(
    draw: Callable[[slice], np.ndarray], few: np.ndarray, level: float, n_resamples: int
) -> np.ndarray:
    """Percentile ends [2, cell], a block of cells at a time to bound the memory of the draws.

    `draw` gives the draws [resample, cell] of a block, from the same resamples for every block.
    """
    size = max(1, 4 * _CHUNK // n_resamples)
    blocks = [slice(start, start + size) for start in range(0, max(len(few), 1), size)]
    return np.concatenate([_percentiles(draw(b), level, few[b]) for b in blocks], axis=1)


def _percentiles(draws: np.ndarray, level: float, few: np.ndarray) -> np.ndarray:
    """Ends [2, cell] of the central `level` of draws [resample, cell], NaN where marked `few`.

    A resample without a single value (all NaN) is left out.
    """
    ends = np.full((2, draws.shape[1]), np.nan)
    use = ~few & ~np.isnan(draws).all(axis=0)
    if use.any():
        quantile = np.nanquantile if np.isnan(draws[:, use]).any() else np.quantile
        ends[:, use] = quantile(draws[:, use], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def to_numpy(array: Any) -> np.ndarray:
    r"""Arrays, lists, and torch tensors from any device; 16-bit floats as float32.

    Lists that numpy's text type would change (``"a\x00"`` loses its end, numbers beside text become
    text) stay objects.
    """
    if hasattr(array, "detach"):  # a tensor: bfloat16 has no numpy type
        array = array.detach().cpu()
        array = (array.float() if str(array.dtype).endswith("bfloat16") else array).numpy()
    made = np.asarray(array)
    if made.dtype.kind == "U" and not isinstance(array, np.ndarray):
        objects = np.asarray(array, dtype=object)
        if not all(a == b for a, b in zip(objects.flat, made.flat, strict=True)):
            return objects
    return made.astype(np.float32) if made.dtype == np.float16 else made
