"""Intervals against scipy and hand-made numbers; every way to tell a change, by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats

from mi_hops.result import statistics
from mi_hops.result.statistics import (
    bootstrap_ci,
    difference_ci,
    point_estimate,
    proportion_ci,
    summarise_change,
)


@pytest.fixture
def sample():
    return np.random.default_rng(3).gamma(2.0, size=(60, 2, 3))


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_bootstrap_agrees_with_scipy(sample, statistic):
    lower, upper = bootstrap_ci(sample, n_resamples=9999, statistic=statistic)
    oracle = scipy.stats.bootstrap(
        (sample,), statistic, axis=0, n_resamples=9999, method="percentile", rng=1, batch=500
    ).confidence_interval
    width = oracle.high - oracle.low
    assert lower.shape == (2, 3)
    assert (abs(lower - oracle.low) < 0.06 * width).all()
    assert (abs(upper - oracle.high) < 0.06 * width).all()


def test_the_fast_mean_is_the_plain_mean_of_the_same_resamples(sample):
    fast = bootstrap_ci(sample, seed=5)
    plain = bootstrap_ci(sample, seed=5, statistic=lambda a, axis: a.mean(axis=axis))
    np.testing.assert_allclose(fast, plain)


def test_seed_axis_and_blocks(sample, monkeypatch):
    first = bootstrap_ci(sample, seed=1)
    np.testing.assert_array_equal(first, bootstrap_ci(sample, seed=1))
    assert (np.asarray(first) != bootstrap_ci(sample, seed=2)).all()
    np.testing.assert_allclose(first, bootstrap_ci(np.moveaxis(sample, 0, -1), seed=1, axis=-1))
    unpaired = difference_ci(sample, sample[:20], seed=1)
    monkeypatch.setattr(statistics, "_CHUNK", 600)  # one cell at a time, few resamples at a time
    narrow = bootstrap_ci(sample, seed=1)
    assert np.asarray(narrow).shape == (2, 2, 3)
    np.testing.assert_allclose(first, narrow)
    np.testing.assert_allclose(unpaired, difference_ci(sample, sample[:20], seed=1))


def test_the_global_generator_is_left_alone(sample):
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    bootstrap_ci(sample)
    difference_ci(sample, sample)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    # 400 samples side by side would share their resamples, which is allowed: each covers or not.
    lower, upper = bootstrap_ci(rng.normal(1.0, 2.0, size=(50, 400)), level=0.9, n_resamples=500)
    hits = ((lower <= 1.0) & (upper >= 1.0)).mean()
    assert 0.83 < hits < 0.95


def test_missing_values_are_left_out():
    values = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, 3.0], [np.nan, np.nan], [6.0, 6.0]])
    for statistic in ("mean", "median"):
        assert point_estimate(values, statistic) == pytest.approx(
            [3.0, 10 / 3] if statistic == "mean" else [2.5, 3.0]
        )
        lower, upper = bootstrap_ci(values, statistic=statistic)
        assert (lower >= 1).all() and (upper <= 6).all() and (lower < upper).all()
    ends = bootstrap_ci(values)
    loop = bootstrap_ci(
        values, statistic=lambda a, axis: np.ma.masked_invalid(a).mean(axis).filled(np.nan)
    )
    np.testing.assert_allclose(ends, loop)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_none_and_one_have_no_interval(statistic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (np.zeros((0, 2)), np.ones((1, 2))):
            assert np.isnan(bootstrap_ci(values, statistic=statistic)).all()
        column = np.array([[np.nan], [4.0], [np.nan]])
        assert np.isnan(bootstrap_ci(column, statistic=statistic)).all()
        assert point_estimate(column, statistic) == 4.0
        assert np.isnan(point_estimate(np.zeros((0, 2)), statistic)).all()
        lower, upper = bootstrap_ci(np.full(9, 0.25), statistic=statistic)
    assert lower == upper == 0.25


def test_paired_and_unpaired_differences():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(80, 2)) * 5
    b = a - np.array([1.0, 0.0]) + rng.normal(size=(80, 2)) * 0.1
    estimate, lower, upper = difference_ci(a, b, paired=True)
    np.testing.assert_allclose(estimate, (a - b).mean(0))
    np.testing.assert_allclose((lower, upper), bootstrap_ci(a - b, seed=0), atol=0.02)
    assert (upper - lower < 0.1).all()
    mean, low, high = difference_ci(a, b[:50], n_resamples=9999)
    oracle = scipy.stats.bootstrap(
        (a, b[:50]),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        method="percentile",
        rng=1,
        batch=500,
    ).confidence_interval
    np.testing.assert_allclose(mean, a.mean(0) - b[:50].mean(0))
    np.testing.assert_allclose((low, high), oracle, atol=0.06 * (high - low).max())
    assert np.isnan(difference_ci(a, b[:1])[1]).all()
    with pytest.raises(ValueError, match="do not fit"):
        difference_ci(a, b[:50], paired=True)


def test_a_sample_against_itself_is_not_certain():
    values = np.random.default_rng(0).normal(size=40)
    estimate, lower, upper = difference_ci(values, values)
    assert estimate == 0 and lower < -0.1 and upper > 0.1
    assert np.abs(difference_ci(values, values, paired=True)).max() == 0


def test_clopper_pearson():
    low, high = proportion_ci(0, 10)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 10))
    assert proportion_ci(3, 7)[0] == pytest.approx(scipy.stats.beta.ppf(0.025, 3, 5))
    assert proportion_ci(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="not a proportion"):
        proportion_ci(4, 3)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="level is 95"):
        bootstrap_ci([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="n_resamples"):
        bootstrap_ci([1.0, 2.0], n_resamples=0)
    with pytest.raises(ValueError, match="statistic 'mode'"):
        bootstrap_ci([1.0, 2.0], statistic="mode")


def test_every_way_to_tell_a_change_by_hand():
    # r: nine times -0.5, then 99 (a tiny denominator), then 0 for the zero denominator.
    before = [0.4] * 9 + [0.001, 0.0]
    after = [0.2] * 9 + [0.1, 0.3]
    table = summarise_change(before, after)
    value = table["value"]
    assert value["n"] == 11 and value["n_zero_before"] == 1
    assert value["mean_relative_change"] == pytest.approx((-4.5 + 99 + 0) / 11)
    # mean 8.59, population sd 28.6: only 99 lies further off than two of them
    assert value["mean_relative_change_within_2sd"] == pytest.approx(-4.5 / 10)
    assert table.loc["mean_relative_change_within_2sd", "n"] == 10
    assert value["median_relative_change"] == -0.5
    assert value["share_improved"] == pytest.approx(2 / 11)
    assert tuple(table.loc["share_improved", ["lower", "upper"]]) == proportion_ci(2, 11)
    logs = (9 * math.log(0.5) + math.log(100)) / 10
    assert value["mean_log_change"] == pytest.approx(logs)
    assert table.loc["mean_log_change", "n"] == 10
    assert value["ratio_of_means_change"] == pytest.approx(2.2 / 3.601 - 1)
    assert value["mean_change"] == pytest.approx((2.2 - 3.601) / 11)
    means = ["mean_relative_change", "mean_relative_change_within_2sd"]
    assert table.loc[means, ["lower", "upper"]].isna().all(axis=None)  # no honest one
    told = table.drop(["n", "n_zero_before", *means])
    assert ((told["lower"] <= told["value"]) & (told["value"] <= told["upper"])).all()


def test_trimming_uses_the_population_deviation_once():
    # r = 0, 0, 0, 0, 0.25, 1: the 1 lies 0.792 from the mean; two population deviations are 0.731,
    # two sample deviations 0.801. Another pass would drop the 0.25 too.
    table = summarise_change([1.0] * 6, [1.0, 1.0, 1.0, 1.0, 1.25, 2.0])
    assert table.loc["mean_relative_change_within_2sd", "value"] == pytest.approx(0.05)
    assert table.loc["mean_relative_change_within_2sd", "n"] == 5


def test_change_of_means_is_bootstrapped_in_pairs():
    rng = np.random.default_rng(0)
    before = rng.random(100)
    ratio = summarise_change(before, before * 1.5).loc["ratio_of_means_change"]
    np.testing.assert_allclose([ratio["value"], ratio["lower"], ratio["upper"]], 0.5)
    after = rng.random(100)
    row = summarise_change(before, after, n_resamples=5000).loc["mean_change"]
    np.testing.assert_allclose(
        (row["lower"], row["upper"]), bootstrap_ci(after - before, n_resamples=5000), atol=0.01
    )


@pytest.mark.parametrize("n", [0, 1])
def test_changes_of_none_and_one(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = summarise_change([0.5] * n, [0.25] * n)
    assert table.loc["n", "value"] == n
    told = table.drop(["n", "n_zero_before", "share_improved"])
    assert told["lower"].isna().all()
    assert told["value"].isna().all() if n == 0 else told.loc["mean_change", "value"] == -0.25


def test_all_zero_before_has_no_ratio():
    table = summarise_change([0.0, 0.0], [0.1, 0.2])
    assert table.loc["mean_relative_change", "value"] == 0
    assert np.isnan(table.loc["ratio_of_means_change", "value"])
    assert np.isnan(table.loc["mean_log_change", "value"])


def test_changes_refuse_bad_numbers():
    with pytest.raises(ValueError, match=r"after\[1\] is nan"):
        summarise_change([0.1, 0.2], [0.1, math.nan])
    with pytest.raises(ValueError, match=r"before\[0\] is -0.1"):
        summarise_change([-0.1], [0.1])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\)"):
        summarise_change([0.1, 0.2], [0.1])
