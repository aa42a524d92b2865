"""Choose a cell of an injection grid on one half of the facts and report it on the other.

The published tables choose and report on the same rows, which flatters the chosen cell: the best of
180 noisy cells is partly the luckiest. A cell chosen here has not seen what it is reported on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mi_hops.injection.encodings import Encoding
from mi_hops.injection.memory import Chooser, MemoryInjection, read_place
from mi_hops.result.result import Result, difference_ci, proportion_ci, summarise_change

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Attributes:
        encoding, layer, strength: its labels in the grid; a group of layers is "1+2".
        score: mean of the metric that chose it, over the examples that it was chosen on.
        n: how many these were.
        settings: how the grid injected, from its provenance.
    """

    encoding: Encoding
    layer: int | str
    strength: float
    score: float
    n: int
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def labels(self) -> dict[str, Any]:
        """Dimension -> label, for ``result.sel(**cell.labels)``."""
        return {"encoding": self.encoding, "layer": self.layer, "strength": self.strength}

    def injection(
        self, *, memory: Chooser = "bridge", absent: Literal["raise", "leave"] = "raise"
    ) -> MemoryInjection:
        """This cell as a repair, injected where and as the grid did.

        Args:
            memory, absent: as in `memory.MemoryInjection`.

        Raises:
            ValueError: a cell that `select_cell` did not choose from an injection grid.
        """
        if self.settings.get("method") != "injection_grid":
            raise ValueError(
                "this cell does not know how its grid injected; choose it with select_cell from the "
                "result of injection_grid"
            )
        layers = [int(layer) for layer in str(self.layer).split("+")]
        heads = self.settings["heads"]
        if isinstance(heads, Mapping):
            heads = {layer: heads[str(layer)] for layer in layers}
        return MemoryInjection(
            layers, self.strength, encoding=self.encoding, heads=heads, memory=memory,
            absent=absent, positions=read_place(self.settings["positions"]),
            **{k: self.settings[k] for k in ("kind", "relative", "pooling", "leading_space")},
        )  # fmt: skip


def split_halves(ids: Sequence[Hashable], *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Two random halves of some labels, (to choose on, to report on), in the given order.

    Raises:
        ValueError: fewer than two labels, or repeated ones.
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


def select_cell(
    result: Result,
    *,
    examples: Sequence[Hashable] | None = None,
    memory: str = "bridge",
    metric: str = "first_right",
    tie: str | None = "first_logprob",
    encoding: str | None = None,
) -> Cell:
    """The cell with the highest mean of a metric for one memory.

    Args:
        result: from `grid.injection_grid`.
        examples: the half to choose on; default all.
        tie: metric that decides between cells of equal mean; then the first cell wins.
        encoding: choose within one encoding.

    Raises:
        ValueError: an unknown metric, memory or encoding, or no example.
    """
    means = _means(result, metric, examples, memory, encoding)
    best = means.values == means.values.max()
    if tie is not None and tie in result.data and best.sum() > 1:
        second = _means(result, tie, examples, memory, encoding).values
        best &= second == second[best].max()
    at = np.unravel_index(int(np.flatnonzero(best)[0]), best.shape)
    labels = {str(d): means[d].values[i].item() for d, i in zip(means.dims, at, strict=True)}
    n = result.data.sizes["example"] if examples is None else len(examples)
    return Cell(**labels, score=float(means.values[at]), n=n, settings=result.provenance)


def _means(
    result: Result,
    metric: str,
    examples: Sequence[Hashable] | None,
    memory: str,
    encoding: str | None,
) -> xr.DataArray:
    if metric not in result.data:
        raise ValueError(
            f"no metric {metric!r} in the grid; there are {list(result.data.data_vars)}"
        )
    part = result.sel(memory=memory)
    if examples is not None:
        if not len(examples):
            raise ValueError("examples is empty; there is nothing to choose a cell on")
        part = part.sel(example=list(examples))
    if encoding is not None:
        part = part.sel(encoding=[encoding])
    return part[metric].mean("example").transpose("encoding", "layer", "strength")


def cell_report(
    result: Result,
    cell: Cell,
    *,
    examples: Sequence[Hashable] | None = None,
    metric: str = "first_right",
    prob: str = "first_prob",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What one cell did to each memory's examples: one row a memory.

    Args:
        examples: the half to report on; default all.
        metric: a metric of zeros and ones: its mean is the share put right.
        prob: the probability whose change is summarised.

    Returns:
        Frame indexed by memory: ``n``; ``right_before`` and ``right``, the shares before and after,
        with the exact interval ``right_lower``, ``right_upper``; ``difference`` of the share from
        the bridge's (bridge less this memory, paired bootstrap ``difference_lower`` and
        ``difference_upper``); mean probability ``prob_before`` and ``prob``; where the grid has
        them, the median ``rank`` of the first token (1 = top) and the mean probability of the whole
        answer, ``answer_prob`` (from ``answer_logprob``), each with ``_before``; and all change
        statistics of `results.summarise_change` (the thesis's mean within 2 SD among them).

    Raises:
        ValueError: as `select_cell`.
    """
    import pandas as pd

    chosen = result.sel(**cell.labels)
    if examples is not None:
        chosen = chosen.sel(example=list(examples))
    rows = []
    bridge = chosen[metric].sel(memory="bridge").values
    for name in chosen["memory"].values.tolist():
        right = chosen[metric].sel(memory=name).values
        before, after = chosen[f"{prob}_before"].values, chosen[prob].sel(memory=name).values
        n, k = len(right), int(right.sum())
        low, high = proportion_ci(k, n, level=level)
        gap = difference_ci(
            bridge, right, paired=True, level=level, n_resamples=n_resamples, seed=seed
        )
        change = summarise_change(before, after, level=level, n_resamples=n_resamples, seed=seed)
        row = {
            "memory": name,
            "n": n,
            "right_before": float(chosen[f"{metric}_before"].mean()),
            "right": k / n if n else float("nan"),
            "right_lower": low,
            "right_upper": high,
            **dict(
                zip(
                    ("difference", "difference_lower", "difference_upper"),
                    (float(part) for part in gap),
                    strict=True,
                )
            ),
            "prob_before": float(before.mean()),
            "prob": float(after.mean()),
            **_rank_and_answer(chosen, name),
        }
        for statistic, values in change.drop(index=["n"]).iterrows():
            row[str(statistic)] = values["value"]
            if statistic not in ("n_zero_before",):
                row[f"{statistic}_lower"] = values["lower"]
                row[f"{statistic}_upper"] = values["upper"]
        rows.append(row)
    return pd.DataFrame(rows).set_index("memory")


def _rank_and_answer(chosen: Result, memory: str) -> dict[str, float]:
    found = {}
    for metric, column in (("rank", "rank"), ("answer_logprob", "answer_prob")):
        if metric not in chosen.data:
            continue
        scores = (chosen[f"{metric}_before"].values, chosen[metric].sel(memory=memory).values)
        for name, values in zip((f"{column}_before", column), scores, strict=True):
            typical = np.median(values) if metric == "rank" else np.exp(values).mean()
            found[name] = float(typical)
    return found
