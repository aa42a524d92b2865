"""How often a 95% interval of a change of probability holds the true value, by statistic and sample size.

``python -m benchmarks.interval_coverage [--draws 400]`` draws samples from populations whose value is
known, and writes ``docs/benchmarks/interval-coverage.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from scipy.stats import norm, trim_mean

import mi_hops
from benchmarks.harness import keep, kept, table, write

PAGE = "interval-coverage"
SIZES = (20, 50, 150)
RESAMPLES = 1000

Interval = Callable[[np.ndarray, np.random.Generator], tuple[float, float]]


def within_2sd(r: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of what lies within two standard deviations of the mean."""
    far = np.abs(r - r.mean(axis, keepdims=True)) > 2 * r.std(axis, keepdims=True)
    return np.nanmean(np.where(far, np.nan, r), axis)


def trimmed(r: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean without the lowest and the highest tenth."""
    return trim_mean(r, 0.1, axis=axis)


def percentile(statistic: Callable[..., np.ndarray]) -> Interval:
    """The percentile bootstrap, this package's."""

    def interval(x: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
        draws = statistic(x[rng.integers(0, len(x), (RESAMPLES, len(x)))], axis=-1)
        return tuple(np.quantile(draws, (0.025, 0.975)))

    return interval


def bca(x: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Of the mean: percentiles corrected for bias and skewness (Efron 1987)."""
    draws = x[rng.integers(0, len(x), (RESAMPLES, len(x)))].mean(-1)
    bias = norm.ppf(np.clip((draws < x.mean()).mean(), 1e-6, 1 - 1e-6))
    left = (x.sum() - x) / (len(x) - 1)  # means without one
    away = left.mean() - left
    skew = (away**3).sum() / (6 * (away**2).sum() ** 1.5 + 1e-300)
    z = bias + norm.ppf((0.025, 0.975))
    return tuple(np.quantile(draws, norm.cdf(bias + z / (1 - skew * z))))


def studentised(x: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Of the mean: quantiles of (mean* - mean) / error*."""
    rows = x[rng.integers(0, len(x), (RESAMPLES, len(x)))]
    t = (rows.mean(-1) - x.mean()) / np.maximum(rows.std(-1, ddof=1), 1e-300)
    low, high = np.quantile(t, (0.975, 0.025))
    return x.mean() - low * x.std(ddof=1), x.mean() - high * x.std(ddof=1)


#: (what, its value in all of the population, interval of a sample); of r, or of ln(after / before).
TRIED: list[tuple[str, str, Callable[..., np.ndarray], Interval]] = [
    ("mean, percentile", "r", np.mean, percentile(np.mean)),
    ("mean, BCa", "r", np.mean, bca),
    ("mean, studentised", "r", np.mean, studentised),
    ("mean within 2 SD, percentile", "r", within_2sd, percentile(within_2sd)),
    ("trimmed mean, percentile", "r", trimmed, percentile(trimmed)),
    ("median, percentile", "r", np.median, percentile(np.median)),
    ("mean ln(after / before), percentile", "log", np.mean, percentile(np.mean)),
]


def populations() -> dict[str, np.ndarray]:
    """Ratios after / before: of real edits of failed questions, and made ones."""
    model = mi_hops.load_model("hops-gpt2")
    gap = mi_hops.find_gap(model, mi_hops.load_facts("hopland"))
    failed = [fact for fact in gap.failed if fact.split != "train"]
    queries = mi_hops.build_sets(model, failed, gap=gap, per_case=1).of("correction")
    scores = mi_hops.evaluate(model, mi_hops.CremeRepair(), queries, failed, generate=False)
    before, after = (scores.frame[f"mean_token_prob_{when}"] for when in ("before", "after"))
    rng = np.random.default_rng(0)
    made = {f"lognormal, sigma {s}": np.exp(rng.normal(0, s, 200_000)) for s in (1, 2, 3)}
    return {f"CREME on {len(failed):,} failures of hops-gpt2": (after / before).to_numpy()} | made


def coverage(ratios: np.ndarray, draws: int, seed: int) -> dict[str, list[float]]:
    """What was tried -> share of samples whose interval holds the population's value, by size."""
    rng = np.random.default_rng(seed)
    values = {"r": ratios - 1, "log": np.log(ratios)}
    true = {name: float(statistic(values[of])) for name, of, statistic, _ in TRIED}
    found: dict[str, list[float]] = {name: [] for name, *_ in TRIED}
    for n in SIZES:
        hits = dict.fromkeys(found, 0)
        for _ in range(draws):
            rows = rng.integers(0, len(ratios), n)
            for name, of, _, interval in TRIED:
                low, high = interval(values[of][rows], rng)
                hits[name] += low <= true[name] <= high
        for name, count in hits.items():
            found[name].append(count / draws)
    return found


def page() -> str:
    """One table for each population."""
    text = (
        "Samples of size n are drawn from a population whose true value is known; the tables show how "
        "often a nominal 95% interval contains it. r = (after - before) / before is the relative change. "
        "A few extreme values dominate the mean of r. Most samples contain none of them, and then no "
        "interval computed from the sample can reach the true mean. So this package gives such a mean "
        "no interval, and reports the median, the trimmed mean and the mean log change beside it.\n\n"
    )
    for found in kept(PAGE).values():
        rows = [
            [what, *(f"{share:.0%}" for share in shares)] for what, shares in found["rows"].items()
        ]
        heads = ("statistic, interval", *(f"n = {n}" for n in SIZES))
        text += f"## {found['title']}\n\n{found['draws']} samples of each size.\n\n{table(heads, rows)}\n\n"
    return text


def main() -> None:
    """Draw, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=400)
    draws = parser.parse_args().draws
    for i, (title, ratios) in enumerate(populations().items()):
        rows = coverage(ratios, draws, seed=i)
        print(title, rows, flush=True)
        keep(PAGE, f"{i}", {"title": title, "draws": draws, "rows": rows})
    write(PAGE, "Coverage of intervals", page(), script="interval_coverage")


if __name__ == "__main__":
    main()
