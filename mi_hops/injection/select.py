"""Choose a cell of an injection grid on one half of the facts and report it on the other.

The published tables choose and report on the same rows, which is optimistically biased by selection:
the best of 180 noisy cells is partly the luckiest. A cell chosen here has not seen what it is reported
on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mi_hops.injection.encodings import Encoder
from mi_hops.injection.memory import Chooser, MemoryInjection
from mi_hops.injection.place import Absent, Place
from mi_hops.result.result import Result
from mi_hops.result.statistics import difference_ci, proportion_ci, summarise_change


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Attributes:
        encoding, layer, strength: its labels in the grid; `layers` has the layers themselves.
        score: mean of the metric that chose it, over the examples that it was chosen on.
        n: how many these were.
        settings: how the grid injected, from its provenance.
    """

    encoding: str
    layer: int | str
    strength: float
    score: float
    n: int
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def labels(self) -> dict[str, Any]:
        """Dimension -> label, for ``result.sel(**cell.labels)``."""
        return {"encoding": self.encoding, "layer": self.layer, "strength": self.strength}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are injected together.

        Raises:
            ValueError: a cell that `select_cell` did not choose from an injection grid.
        """
        return tuple(self._of_grid()["layers"][str(self.layer)])

    def injection(self, *, memory: Chooser = "bridge", absent: Absent = "raise") -> MemoryInjection:
        """This cell as a repair, with the grid's positions and settings.

        Args:
            memory, absent: as in `MemoryInjection`.

        Raises:
            ValueError: as `layers`.
        """
        place = Place.from_json(self._of_grid())
        return MemoryInjection(
            self.layers,
            self.strength,
            encoding=Encoder(**self.settings["encoders"][self.encoding]),
            positions=place.positions,
            kind=place.kind,
            relative=place.relative,
            memory=memory,
            absent=absent,
        )

    def _of_grid(self) -> Mapping[str, Any]:
        if self.settings.get("method") != "injection_grid":
            raise ValueError(
                "this cell does not know how its grid injected; choose it with select_cell from the "
                "result of injection_grid"
            )
        return self.settings


def select_cell(
    result: Result,
    *,
    examples: Sequence[Hashable] | None = None,
    memory: str = "bridge",
    metric: str = "first_correct",
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

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> grid = mi_hops.injection_grid(model, facts, strengths=(2, 4), layers=(1, 2))
        >>> mi_hops.select_cell(grid).layer in (1, 2)
        True
    """
    if metric not in result.data:
        raise ValueError(
            f"no metric {metric!r} in the grid; there are {list(result.data.data_vars)}"
        )
    part = result.sel(memory=memory)
    if encoding is not None:
        part = part.sel(encoding=[encoding])
    chosen = part["example"].values.tolist() if examples is None else list(examples)
    if not chosen:
        raise ValueError("examples is empty; there is nothing to choose a cell on")
    dims = ("encoding", "layer", "strength")
    means = part.sel(example=chosen).data.mean("example").transpose(*dims, ...)
    scores = means[metric].values
    best = scores == scores.max()
    if tie is not None and tie in means and best.sum() > 1:
        best &= means[tie].values == means[tie].values[best].max()
    at = np.unravel_index(int(np.flatnonzero(best)[0]), best.shape)
    labels = {d: means[d].values[i].item() for d, i in zip(dims, at, strict=True)}
    return Cell(**labels, score=float(scores[at]), n=len(chosen), settings=result.provenance)


def cell_report(
    result: Result,
    cell: Cell,
    *,
    examples: Sequence[Hashable] | None = None,
    metric: str = "first_correct",
    prob: str = "first_prob",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The effect of one cell on the examples: one row per memory.

    Args:
        examples: the half to report on; default all.
        metric: a metric of zeros and ones: its mean is the share corrected.
        prob: the probability whose change is summarised.

    Returns:
        Frame indexed by memory: ``n``; ``correct_before`` and ``correct``, the shares before and after,
        with the exact interval ``correct_lower``, ``correct_upper``; ``difference`` of the share from
        the bridge's (bridge less this memory, paired bootstrap ``difference_lower`` and
        ``difference_upper``); mean probability ``prob_before`` and ``prob``; where the grid has
        them, the median ``rank`` of the first token (1 = top) and the mean probability of the whole
        answer, ``answer_prob`` (from ``answer_logprob``), each with ``_before``; and all change
        statistics of `mi_hops.result.summarise_change` (the thesis's mean within 2 SD among them).

    Raises:
        ValueError: as `select_cell`.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> grid = mi_hops.injection_grid(model, facts, strengths=(2, 4), layers=(1, 2))
        >>> cell = mi_hops.select_cell(grid)
        >>> list(mi_hops.cell_report(grid, cell, n_resamples=50))[:3]
        ['n', 'correct_before', 'correct']
    """
    chosen = result.sel(**cell.labels)
    if examples is not None:
        chosen = chosen.sel(example=list(examples))
    settings: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
    was, probable = chosen[f"{metric}_before"].values, chosen[f"{prob}_before"].values
    rows = {}
    for name in chosen["memory"].values.tolist():
        mine = chosen.sel(memory=name)
        correct, after = mine[metric].values, mine[prob].values
        bridge = chosen[metric].sel(memory="bridge").values
        row = {"n": len(correct), "correct_before": was.mean(), "correct": correct.mean()}
        row |= _ends("correct", proportion_ci(int(correct.sum()), len(correct), level=level))
        difference, *ends = difference_ci(bridge, correct, paired=True, **settings)
        row |= {"difference": difference, **_ends("difference", ends)}
        row |= {"prob_before": probable.mean(), "prob": after.mean()}
        for end in ("_before", ""):
            if "rank" in mine.data:
                row[f"rank{end}"] = np.median(mine[f"rank{end}"].values)
            if "answer_logprob" in mine.data:
                row[f"answer_prob{end}"] = np.exp(mine[f"answer_logprob{end}"].values).mean()
        change = summarise_change(probable, after, **settings).drop(index=["n"])
        for statistic, values in change.iterrows():
            row[str(statistic)] = values["value"]
            if statistic != "n_zero_before":
                row |= _ends(str(statistic), values[["lower", "upper"]])
        rows[name] = {key: value if key == "n" else float(value) for key, value in row.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("memory")


def _ends(name: str, ends: Iterable[Any]) -> dict[str, float]:
    low, high = ends
    return {f"{name}_lower": low, f"{name}_upper": high}
