"""Points and weights on the unit interval for integrated gradients."""

from __future__ import annotations

from typing import Literal

import numpy as np

Rule = Literal["gauss", "trapezoid"]


def path_points(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """``(point, weight)`` pairs on [0, 1] whose weights sum to 1.

    Args:
        steps: number of points; Gauss-Legendre with n points is exact for polynomials of degree
            2n - 1, the trapezoid rule includes both ends and is exact for degree 1.

    Raises:
        ValueError: an unknown rule, or too few steps for it.
    """
    fewest = {"gauss": 1, "trapezoid": 2}
    if rule not in fewest:
        raise ValueError(f"rule is {rule!r}; expected 'gauss' or 'trapezoid'")
    if steps < fewest[rule]:
        raise ValueError(f"steps is {steps}; rule {rule!r} needs at least {fewest[rule]}")
    if rule == "gauss":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        points, weights = (nodes + 1) / 2, weights / 2
    else:
        points = np.linspace(0, 1, steps)
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
    return list(zip(points.tolist(), weights.tolist(), strict=True))
