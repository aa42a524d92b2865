"""How far estimated effects are off: the top cells patched exactly, in fan-out passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange
from torch import Tensor

from mi_hops.result.result import Result


@dataclass(frozen=True, repr=False)
class Verification:
    """Estimates compared with exact values.

    Attributes:
        rank_correlation: Spearman's, over cells, of the means over examples; NaN for fewer than
            three cells or where one side does not vary.
        sign_agreement: share of (example, cell) whose exact and estimated changes have one sign;
            changes below a millionth of the largest are left out.
        largest_error: largest ``|estimated - exact|`` of an example and cell, unit of the metric.
        largest_exact: largest exact change, to compare it with.
        n_cells, n_examples: what the numbers rest on.
        table: a row per cell, best estimate first: its labels, ``estimated`` and ``exact`` (means
            over examples) and ``largest_error``.
        result: the estimates with the exact changes beside them (``exact``, NaN where none was
            patched) and the numbers above in the provenance, under ``verification``.
    """

    rank_correlation: float
    sign_agreement: float
    largest_error: float
    largest_exact: float
    n_cells: int
    n_examples: int
    table: pd.DataFrame
    result: Result

    def __repr__(self) -> str:
        return f"Verification: {self.describe()}"

    def describe(self) -> str:
        """One line for a figure or a report."""
        return (
            f"{self.n_cells} cells, {self.n_examples} examples patched exactly: rank correlation "
            f"{self.rank_correlation:.3f}, sign agreement {self.sign_agreement:.1%}, largest error "
            f"{self.largest_error:.4g} (largest exact change {self.largest_exact:.4g})"
        )


class Attribution(Result):
    """Estimated effects: a `Result` that can be checked against exact patching.

    It plots, saves and indexes like any `Result`; ``change`` is NaN where there is no cell (no
    edge). A copy that was pickled, or selected or averaged, no longer holds the model, so `verify`
    first.

    Args:
        result: the estimates.
        exact: patches cells exactly, in every example: from their numbers, in C order of the axes
            after ``example``, to the changes ``[example, cell]``.
    """

    def __init__(self, result: Result, exact: Callable[[Sequence[int]], Tensor] | None) -> None:
        self.__dict__.update(result.__dict__)
        self._exact = exact

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:  # type: ignore[override]
        """The estimates, as a `Result`: a file does not hold the model that checks them."""
        return Result.load(path)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = Result.__new__(Result)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_exact"})
        return Attribution, (plain, None)

    def verify(self, *, top: int | None = 20) -> Verification:
        """Patch the `top` cells (by size of the mean estimate) exactly, in every pair.

        Args:
            top: how many; None for all cells.

        Raises:
            ValueError: `top` below 1, or estimates that were pickled, which have no model.
        """
        if top is not None and top < 1:
            raise ValueError(f"top is {top}; expected at least 1 cell, or None for all")
        if self._exact is None:
            raise ValueError("these estimates were pickled without their model; attribute again")
        change = self["change"]
        estimated = rearrange(change.values.astype(float), "example ... -> example (...)")
        size = np.abs(estimated.mean(0))
        order = np.argsort(-size, kind="stable")
        order = order[np.isfinite(size[order])][:top]
        exact = self._exact(order.tolist()).numpy().astype(float)
        guess = estimated[:, order]
        numbers = _compare(guess, exact)
        where = np.unravel_index(order, change.shape[1:])
        labels = {
            dim: change[dim].values[index]
            for dim, index in zip(change.dims[1:], where, strict=True)
        }
        found = {"estimated": guess.mean(0), "exact": exact.mean(0)}
        table = pd.DataFrame(labels | found | {"largest_error": np.abs(guess - exact).max(0)})
        patched = np.full(estimated.shape, np.nan)
        patched[:, order] = exact
        beside = change.copy(data=patched.reshape(change.shape).astype(change.dtype))
        told = {k: None if np.isnan(v) else v for k, v in numbers.items()}
        told |= {"n_cells": len(order), "n_examples": len(change)}
        result = self.assign({"exact": beside}, provenance={"verification": told})
        return Verification(
            **numbers, n_cells=len(order), n_examples=len(change), table=table, result=result
        )


def _compare(guess: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """The numbers of `Verification`, from changes ``[example, cell]``."""
    from scipy.stats import spearmanr

    largest = float(np.abs(exact).max())
    clear = (np.abs(exact) > 1e-6 * largest) & (np.abs(guess) > 1e-6 * np.abs(guess).max())
    agree = (np.sign(exact) == np.sign(guess))[clear]
    means = guess.mean(0), exact.mean(0)
    varied = len(means[0]) > 2 and all(np.ptp(m) > 0 for m in means)
    return {
        "rank_correlation": float(spearmanr(*means).statistic) if varied else float("nan"),
        "sign_agreement": float(agree.mean()) if len(agree) else float("nan"),
        "largest_error": float(np.abs(guess - exact).max()),
        "largest_exact": largest,
    }
