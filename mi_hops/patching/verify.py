"""How far estimated effects are off: the top cells patched exactly, in fan-out passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mi_hops.result.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class Verification:
    """Estimates beside exact values.

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

    def describe(self) -> str:
        """One line for a figure or a report."""
        return (
            f"{self.n_cells} cells, {self.n_examples} examples patched exactly: rank correlation "
            f"{self.rank_correlation:.3f}, sign agreement {self.sign_agreement:.1%}, largest error "
            f"{self.largest_error:.4g} (largest exact change {self.largest_exact:.4g})"
        )


@dataclass(frozen=True)
class Attribution:
    """Estimated effects, and the means to check them.

    Attributes:
        result: the estimates, labelled; ``change`` is NaN where there is no cell (no edge).
        exact: patches cells exactly, in every example: from their numbers, in C order of the axes
            after ``example``, to the changes ``[example, cell]``.
    """

    result: Result
    exact: Callable[[Sequence[int]], Tensor]

    def verify(self, *, top: int | None = 20) -> Verification:
        """Patch the `top` cells (by size of the mean estimate) exactly, in every pair.

        Args:
            top: how many; None for all cells.

        Returns:
            `Verification`: rank correlation, sign agreement and largest error, and a table.

        Raises:
            ValueError: `top` below 1.
        """
        import pandas as pd

        if top is not None and top < 1:
            raise ValueError(f"top is {top}; expected at least 1 cell, or None for all")
        change = self.result["change"]
        estimated = change.values.reshape(len(change), -1).astype(float)
        size = np.abs(estimated.mean(0))
        order = np.argsort(-size, kind="stable")
        order = order[np.isfinite(size[order])][:top]
        exact = self.exact(order.tolist()).numpy().astype(float)
        guess = estimated[:, order]
        numbers = _compare(guess, exact)
        where = np.unravel_index(order, change.shape[1:])
        labels = {
            dim: change[dim].values[index]
            for dim, index in zip(change.dims[1:], where, strict=True)
        }
        table = pd.DataFrame(
            {
                **labels, "estimated": guess.mean(0), "exact": exact.mean(0),
                "largest_error": np.abs(guess - exact).max(0),
            }
        )  # fmt: skip
        patched = np.full(estimated.shape, np.nan)
        patched[:, order] = exact
        beside = change.copy(data=patched.reshape(change.shape).astype(change.dtype))
        result = Result(
            self.result.data.assign(exact=beside),
            provenance={
                **self.result.provenance,
                "verification": {k: None if np.isnan(v) else v for k, v in numbers.items()}
                | {"n_cells": len(order), "n_examples": len(change)},
            },
            title=self.result.title,
            main=self.result.main,
            skipped=self.result.skipped,
            allow_nonfinite=True,
        )
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
