"""How a repair's scores are averaged: one row per query in, one row per statistic out, with intervals.

Everything is averaged over the queries inside a case first, then over cases, the order of the CREME
paper's code (arXiv 2402.14328): a case with many queries weighs no more than one with a single
query. Intervals are percentile bootstraps over cases; exact ones (Clopper-Pearson) for shares where
every case is all right or all wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mi_hops.result.statistics import (
    NO_INTERVAL,
    bootstrap_ci,
    log_change,
    proportion_ci,
    relative_change,
)

COLUMNS = ("value", "lower", "upper", "n_queries", "n_cases", "unit")

#: Share of the cases that `trimmed_mean` leaves out at each end.
TRIM = 0.1


@dataclass
class Scores:
    """What is to be averaged: arrays ``[query]``, NaN where a query has no such value.

    Attributes:
        means: statistic -> (values, unit): mean inside each case, then over cases.
        spreads: statistic -> (values, unit, reduce): mean inside each case, then
            ``reduce(case_values, axis=...)``.
        case_ratios: statistic -> (top, bottom, unit, offset): the mean of one over the mean of
            the other, both over cases, plus an offset.
        query_shares: statistic -> values: share over all queries, whatever their case.
        counts: statistic -> values: how many queries, without an interval.
    """

    means: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict)
    spreads: dict[str, tuple[np.ndarray, str, Callable[..., Any]]] = field(default_factory=dict)
    case_ratios: dict[str, tuple[np.ndarray, np.ndarray, str, float]] = field(default_factory=dict)
    query_shares: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)


def aggregate(
    frame: pd.DataFrame,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Summarise changes of probabilities from a plain table, such as a published run's.

    Args:
        frame: one row per query. Columns ``case``, ``set``, ``before`` and ``after`` (probability of
            the right answer, unrepaired and repaired); optionally ``wrong_before`` and
            ``wrong_after`` (of a competing answer, NaN where there is none) and ``repair``. Other
            columns are ignored.
        level, n_resamples, seed: of the bootstrap over cases.

    Returns:
        Frame indexed by (repair where given,) set and statistic, with columns ``value``, ``lower``,
        ``upper``, ``n_queries`` and ``n_cases`` (which have a value), ``unit``. Intervals are NaN
        below two cases, and for means of r (see `NO_INTERVAL`). With r = (after - before) / before, 0 where before is 0:

        - ``mean_before``, ``mean_after``, ``mean_change``;
        - ``mean_relative_change``: mean r, the CREME paper's number (17.03 is +1703 %);
        - ``median_relative_change``, ``trimmed_mean_relative_change``: of the cases' mean r; the
          trimmed one without the lowest and highest tenth of the cases;
        - ``mean_log_change``: mean ln(after / before) of queries where both are positive;
        - ``share_improved``: share with after > before;
        - ``ratio_of_means_change``: ``mean_after / mean_before - 1``;
        - ``zero_before``: number of queries with before = 0;
        - ``target_over_wrong_before``, ``..._after``: share of *queries* (not averaged inside cases,
          as published) whose right answer is more probable than the wrong one;
        - ``wrong_mean_relative_change``, ``wrong_mean_log_change``: of the wrong answer.

    Raises:
        ValueError: a missing column, no rows, or a probability that is negative or not finite.
    """
    _check(frame)
    return by_group(
        frame,
        lambda part: change_scores(
            *(part[c].to_numpy(float) for c in ("before", "after")),
            *(part[c].to_numpy(float) for c in ("wrong_before", "wrong_after") if c in part),
        ),
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


def change_scores(
    before: np.ndarray,
    after: np.ndarray,
    wrong_before: np.ndarray | None = None,
    wrong_after: np.ndarray | None = None,
) -> Scores:
    """The statistics of `aggregate` for probabilities ``[query]``."""
    relative, logs = relative_change(before, after), log_change(before, after)
    fraction = "fraction of before"
    scores = Scores(
        means={
            "mean_before": (before, "probability"),
            "mean_after": (after, "probability"),
            "mean_change": (after - before, "probability"),
            "mean_relative_change": (relative, fraction),
            "mean_log_change": (logs, "nats"),
            "share_improved": ((after > before).astype(float), "share"),
        },
        spreads={
            "median_relative_change": (relative, fraction, np.median),
            "trimmed_mean_relative_change": (relative, fraction, trimmed_mean),
        },
        case_ratios={
            "ratio_of_means_change": (after, before, "fraction of mean before", -1.0),
        },
        counts={"zero_before": (before == 0).astype(float)},
    )
    if wrong_before is None or wrong_after is None:
        return scores
    known = np.isfinite(wrong_before) & np.isfinite(wrong_after)
    for when, right, wrong in (("before", before, wrong_before), ("after", after, wrong_after)):
        ahead = np.where(known, right > wrong, np.nan)
        scores.query_shares[f"target_over_wrong_{when}"] = ahead
    wrong_relative = np.where(known, relative_change(wrong_before, wrong_after), np.nan)
    scores.means["wrong_mean_relative_change"] = (wrong_relative, fraction)
    scores.means["wrong_mean_log_change"] = (log_change(wrong_before, wrong_after), "nats")
    return scores


def by_group(
    frame: pd.DataFrame, scores_of: Callable[[pd.DataFrame], Scores], **settings: Any
) -> pd.DataFrame:
    """Reduce the scores of each (repair,) set of a long frame.

    Args:
        settings: ``level``, ``n_resamples`` and ``seed``, as in `aggregate`, which describes the result.
    """
    keys = [c for c in ("repair", "set") if c in frame]
    parts = {
        label: reduce_scores(part["case"].to_numpy(), scores_of(part), **settings)
        for label, part in frame.groupby(keys, sort=False, observed=True)
    }
    return pd.concat(parts, names=[*keys, "statistic"])


def reduce_scores(cases: np.ndarray, scores: Scores, **settings: Any) -> pd.DataFrame:
    """One row per statistic, with its bootstrap interval over cases (see `by_group`).

    Args:
        cases: ``[query]``, the case of each query.
    """
    _, codes = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    rows: dict[str, tuple[float, float, float, int, int, str]] = {}

    def exact(shares: np.ndarray, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        # All or nothing in every case: a bootstrap of 100% would claim certainty.
        shares = shares[~np.isnan(shares)]
        if not np.isin(shares, (0, 1)).all():
            return ends
        return proportion_ci(int(shares.sum()), len(shares), level=settings["level"])

    def change(
        moved: np.ndarray, before: Any, after: Any, ends: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        # Where all cases begin alike (all wrong, or all right), what is uncertain is how they end.
        found = np.unique(moved[~np.isnan(moved)])
        begun = np.unique(before[~np.isnan(before)]) if before is not None else np.zeros(0)
        if after is not None and len(begun) == 1 and begun[0] in (0, 1):
            low, high = exact(after, (ends[0] + begun[0], ends[1] + begun[0]))
            return low - begun[0], high - begun[0]
        return ends if len(found) != 1 else (np.nan, np.nan)  # no variation to resample

    def add(name: str, values: np.ndarray, unit: str, value: float, ends: tuple[Any, Any]) -> None:
        known = ~np.isnan(values)
        n_cases = len(np.unique(codes[known]))
        lower, upper = ends if n_cases > 1 else (np.nan, np.nan)
        rows[name] = (value, float(lower), float(upper), int(known.sum()), n_cases, unit)

    if scores.means:
        grid = np.stack([_case_means(codes, v) for v, _ in scores.means.values()], axis=1)
        lower, upper = bootstrap_ci(grid, **settings)
        of = dict(zip(scores.means, grid.T, strict=True))
        for i, (name, (values, unit)) in enumerate(scores.means.items()):
            ends = (lower[i], upper[i])
            if unit == "share" and name.endswith("_change"):
                stem = name.removesuffix("change")
                ends = change(of[name], of.get(f"{stem}before"), of.get(f"{stem}after"), ends)
            elif unit == "share":
                ends = exact(grid[:, i], ends)
            if name.endswith("mean_relative_change"):
                ends = NO_INTERVAL
            add(name, values, unit, _nan_mean(grid[:, i]), ends)
    for name, (values, unit, reduce) in scores.spreads.items():
        found = _case_means(codes, values)
        found = found[~np.isnan(found)]
        value = float(reduce(found, axis=0)) if len(found) else np.nan
        add(name, values, unit, value, bootstrap_ci(found, statistic=reduce, **settings))
    for name, (over, under, unit, offset) in scores.case_ratios.items():
        top, bottom = _case_means(codes, over), _case_means(codes, under)
        value, low, high = _ratio_ci(top, bottom, **settings)
        ends = (low + offset, high + offset)
        if unit.startswith("fraction of before") and (bottom[~np.isnan(bottom)] == 1).all():
            ends = exact(top, ends)
        add(name, over, unit, value + offset, ends)
    for name, values in scores.query_shares.items():
        known = ~np.isnan(values)
        n_cases = codes.max() + 1
        hits = np.bincount(codes[known], weights=values[known], minlength=n_cases)
        counts = np.bincount(codes[known], minlength=n_cases).astype(float)
        hits, counts = hits[counts > 0], counts[counts > 0]
        value, low, high = _ratio_ci(hits, counts, **settings)
        if len(set(counts)) == 1 or value in (0, 1):  # then it is the share of cases as well
            low, high = exact(hits / counts, (low, high))
        add(name, values, "share of queries", value, (low, high))
    for name, values in scores.counts.items():
        add(name, values, "queries", float(np.nansum(values)), (np.nan, np.nan))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS))
    return table.rename_axis("statistic")


def with_interval(name: str, value: float, lower: float, upper: float, n: int) -> dict[str, Any]:
    """A value as columns: ``NAME``, ``NAME_lower``, ``NAME_upper`` and ``NAME_n``."""
    return {name: value, f"{name}_lower": lower, f"{name}_upper": upper, f"{name}_n": n}


def trimmed_mean(values: Any, axis: int = 0) -> np.ndarray:
    """Mean without the lowest and the highest `TRIM` of the values (rounded down)."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(values, TRIM, axis=axis))


def case_table(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of some columns over the queries of each (repair, set, case), and ``n_queries``."""
    keys = [c for c in ("repair", "set", "case") if c in frame]
    groups = frame.groupby(keys, sort=False, observed=True)
    means = groups[list(columns)].mean()
    means.insert(0, "n_queries", groups.size())
    return means


def _check(frame: pd.DataFrame) -> None:
    missing = [c for c in ("case", "set", "before", "after") if c not in frame]
    wrong = [c for c in ("wrong_before", "wrong_after") if c in frame]
    if missing or len(wrong) == 1:
        raise ValueError(
            f"the table has columns {list(frame.columns)}; needed are case, set, before, after, "
            f"and wrong_before and wrong_after both or neither (missing: {missing or 'one of them'})"
        )
    if frame.empty:
        raise ValueError("the table has no rows, so there is nothing to aggregate")
    for name in ["before", "after", *wrong]:
        values = frame[name].to_numpy(float)
        fine = np.isfinite(values) & (values >= 0) | (np.isnan(values) & (name in wrong))
        if not fine.all():
            row = int(np.flatnonzero(~fine)[0])
            raise ValueError(
                f"{name} is {values[row]} in row {row} (case {frame['case'].iloc[row]!r}); expected "
                "a probability: finite and not negative"
            )


def _case_means(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of the queries of each case, NaN where none has a value."""
    known = ~np.isnan(values)
    n_cases = int(codes.max()) + 1
    sums = np.bincount(codes[known], weights=values[known], minlength=n_cases)
    counts = np.bincount(codes[known], minlength=n_cases)
    return np.divide(sums, counts, out=np.full(n_cases, np.nan), where=counts > 0)


def _nan_mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio_ci(top: np.ndarray, bottom: np.ndarray, **settings: Any) -> tuple[float, float, float]:
    """sum(top) / sum(bottom) over cases and its bootstrap interval; NaN where bottom sums to 0."""
    known = ~(np.isnan(top) | np.isnan(bottom))
    pair = np.stack([top[known], bottom[known]], axis=1)

    def ratio(cells: np.ndarray, axis: int) -> np.ndarray:
        sums = cells.sum(axis)
        over, under = sums[..., :1], sums[..., 1:]
        share = np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
        return np.repeat(share, 2, axis=-1)  # one for each of the two cells that are resampled

    lower, upper = bootstrap_ci(pair, statistic=ratio, **settings)
    return float(ratio(pair, 0)[0]), float(lower[0]), float(upper[0])
