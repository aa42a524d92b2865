"""How far estimated effects are off: the top cells patched exactly, in fan-out passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from mi_hops.patching.activation import PatchJob
    from mi_hops.results import Result


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
    """

    rank_correlation: float
    sign_agreement: float
    largest_error: float
    largest_exact: float
    n_cells: int
    n_examples: int
    table: pd.DataFrame

    def describe(self) -> str:
        """One line for a figure or a report."""
        return (
            f"{self.n_cells} cells, {self.n_examples} examples patched exactly: rank correlation "
            f"{self.rank_correlation:.3f}, sign agreement {self.sign_agreement:.1%}, largest error "
            f"{self.largest_error:.4g} (largest exact change {self.largest_exact:.4g})"
        )


def verify(job: PatchJob, estimate: Result, *, top: int | None = 20) -> Verification:
    """Patch the `top` cells of an estimate exactly, in every example (see `Verification`).

    Raises:
        ValueError: `top` below 1.
    """
    import pandas as pd
    from scipy.stats import spearmanr

    grid = job.grid
    n = len(job.bases)
    estimated = estimate["change"].values.reshape(n, len(grid.cells))
    if top is not None and top < 1:
        raise ValueError(f"top is {top}; expected at least 1 cell, or None for all")
    order = np.argsort(-np.abs(estimated.mean(0)), kind="stable")[:top]
    chosen = replace(grid, cells=tuple(grid.cells[i] for i in order))
    scores, base = replace(job.core(job.baselines()), grid=chosen).run(job.values_of)
    exact = (scores - base[:, None])[..., 0].numpy().astype(float)
    guess = estimated[:, order].astype(float)
    largest = float(np.abs(exact).max())
    clear = (np.abs(exact) > 1e-6 * largest) & (np.abs(guess) > 1e-6 * np.abs(guess).max())
    agree = (np.sign(exact) == np.sign(guess))[clear]
    means = guess.mean(0), exact.mean(0)
    varied = len(order) > 2 and all(np.ptp(m) > 0 for m in means)
    where = np.unravel_index(order, grid.shape)
    labels = {
        dim: np.asarray(grid.coords[dim])[index]
        for dim, index in zip(grid.dims, where, strict=True)
    }
    table = pd.DataFrame(
        {
            **labels, "estimated": means[0], "exact": means[1],
            "largest_error": np.abs(guess - exact).max(0),
        }
    )  # fmt: skip
    return Verification(
        rank_correlation=float(spearmanr(*means).statistic) if varied else float("nan"),
        sign_agreement=float(agree.mean()) if len(agree) else float("nan"),
        largest_error=float(np.abs(guess - exact).max()),
        largest_exact=largest,
        n_cells=len(order),
        n_examples=n,
        table=table,
    )
