"""Estimates, their intervals, and how they are written.

An estimate is a mapping of ``value``, ``low``, ``high`` (95% interval) and ``n``, as ``summary.json``
holds it; None where a number does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from mi_hops.facts.unusable import describe_reasons
from mi_hops.result.statistics import bootstrap_ci, proportion_ci

Estimate = Mapping[str, Any]

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Headline:
    """A number that a study is read for.

    Attributes:
        name: what it is, in the table that a terminal shows; "" keeps it out of there.
        value: the number.
        spread: its interval and n.
        text: what it says, a sentence of the report; "" keeps it out of there.
    """

    name: str
    value: str
    spread: str = ""
    text: str = ""


# -- making estimates -----------------------------------------------------------------------------


def estimate(value: Any, low: Any, high: Any, n: Any) -> dict[str, Any]:
    """An estimate of plain numbers; what is not finite becomes None."""
    numbers = (None if x is None or not isfinite(x) else float(x) for x in (value, low, high))
    return dict(zip(("value", "low", "high"), numbers, strict=True)) | {"n": int(n)}


def share(k: float, n: int) -> dict[str, Any]:
    """K of n, with its exact interval."""
    if not n:
        return estimate(None, None, None, 0)
    return estimate(k / n, *proportion_ci(int(k), int(n)), n)


def share_of(values: Any) -> dict[str, Any]:
    """The share of ones among zeros and ones, with its exact interval; NaN is left out."""
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    return share(known.sum(), len(known))


def mean(values: Any) -> dict[str, Any]:
    """A mean over facts, with its bootstrap interval; NaN is left out."""
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    if not len(known):
        return estimate(None, None, None, 0)
    return estimate(known.mean(), *bootstrap_ci(known), len(known))


def sign(given: Estimate) -> int:
    """1 or -1 where the interval lies above or below zero, else 0."""
    low, high = given["low"], given["high"]
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


# -- writing them ---------------------------------------------------------------------------------


def percent(given: Estimate, *, n: bool = True) -> str:
    """``37.8% [35.1, 40.5], n = 1290``."""
    if given["value"] is None:
        return "no case"
    text = f"{given['value']:.1%}".replace("-", _MINUS)
    return f"{text} {_spread(given, _hundredth, n)}"


def points(given: Estimate, unit: str = "percentage points") -> str:
    """A difference of shares: ``+12.5 percentage points [+3.1, +22.0]``."""
    if given["value"] is None:
        return "no case"
    return " ".join(filter(None, (_point(given["value"]), unit, _spread(given, _point, False))))


def number(given: Estimate, *, n: bool = True, signed: bool = True) -> str:
    """``-0.078 [-0.122, -0.034], n = 100``; large and small numbers with three digits."""
    if given["value"] is None:
        return "no case"
    text = figures(given["value"], signed=signed)
    return f"{text} {_spread(given, lambda end: figures(end, signed=signed), n)}"


def share_headline(name: str, given: Estimate, text: str = "") -> Headline:
    """A headline of a share, in percent."""
    if given["value"] is None:
        return Headline(name, "no case", "", text)
    return Headline(name, f"{given['value']:.1%}", _spread(given, _hundredth, True, ""), text)


def number_headline(name: str, given: Estimate, text: str) -> Headline:
    """A headline of a signed number."""
    if given["value"] is None:
        return Headline(name, "no case", "", text)
    spread = _spread(given, lambda end: figures(end, signed=True), True, "")
    if "n_other" in given:
        spread += f" and {given['n_other']}"
    return Headline(name, figures(given["value"], signed=True), spread, text)


def figures(value: float | None, *, signed: bool = False) -> str:
    """A number as a table shows it: three decimals, or three digits where these say nothing."""
    if value is None or not isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if value == 0 or 0.001 <= abs(value) < 100:
        text = f"{value:{sign}.3f}"
    elif 0.0001 <= abs(value) < 0.001:
        text = f"{value:{sign}.4f}"
    elif abs(value) >= 100:
        text = f"{value:{sign},.0f}"
    else:
        text = f"{value:{sign}.1e}"
    return text.replace("-", _MINUS)


def _hundredth(end: float) -> str:
    return f"{100 * end:.1f}".replace("-", _MINUS)


def _point(value: float) -> str:
    return (
        f"{100 * value + 0.0:+.1f}".replace("-0.0", "0.0")
        .replace("+0.0", "0.0")
        .replace("-", _MINUS)
    )


def _spread(given: Estimate, show: Any, n: bool, none: str = "(no interval)") -> str:
    """``[35.1, 40.5], n = 1290``."""
    ends = (given["low"], given["high"])
    known = all(end is not None and isfinite(end) for end in ends)
    parts = [f"[{show(ends[0])}, {show(ends[1])}]" if known else none]
    if n:
        parts.append(f"n = {given['n']}")
    return ", ".join(part for part in parts if part)


def layers(numbers: Sequence[int]) -> str:
    """``layers 2 to 4``, ``layer 5``, ``layers 1, 4``."""
    if not numbers:
        return "no layer"
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    return f"layers {span(numbers)}"


def span(numbers: Sequence[int]) -> str:
    """``2 to 4``, ``5``, ``1, 4``."""
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def left_out(counts: Mapping[str, int]) -> str:
    """``; 3 left out (2: no bridge; 1: unequal lengths)``, or nothing."""
    return f"; {sum(counts.values())} left out ({describe_reasons(counts)})" if counts else ""
