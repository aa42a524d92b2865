"""ACDC: circuits by cutting edge after edge (Conmy et al. 2023, arXiv 2304.14997).

The slow reference for edge attribution: readers are visited from the logits down, and an edge is cut
for good if the circuit without it diverges from the clean run by less than `threshold` more. Every
edge costs a run of every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mi_hops.model import HookedModel
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.circuit import Circuit, CircuitRunner
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, Target, get_metric
from mi_hops.sweep.pairs import Text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AcdcRun:
    """What ACDC found.

    Attributes:
        circuit: the edges that stayed.
        table: a row per edge in the order of visiting: ``sender``, ``receiver``, ``harm`` (by how
            much cutting it made the circuit worse, unit of the metric, mean over pairs), ``kept``.
    """

    circuit: Circuit
    table: pd.DataFrame


def acdc(
    model: HookedModel,
    clean: Text | Sequence[Text],
    corrupted: Text | Sequence[Text],
    *,
    threshold: float,
    start: Circuit | None = None,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    metric: MetricLike = "kl",
    prune: bool = True,
    prepend_bos: bool = True,
    progress: bool = False,
) -> AcdcRun:
    """Cut every edge whose loss harms the metric by less than `threshold`.

    Args:
        threshold: in units of the metric (nats for ``"kl"``), mean over pairs.
        start: search among these edges only; default all.
        metric: what must stay; ``"kl"`` is the divergence from the clean run.
        prune: drop edges that lead nowhere in the end.

    Raises:
        ValueError: several metrics, or a threshold that is not positive.
        TokenError: pairs that do not correspond token by token.
    """
    import pandas as pd

    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected more than 0")
    job = PatchJob.of_pairs(
        model, clean, corrupted, answer=answer, wrong=wrong, metric=metric, direction="noise",
        prepend_bos=prepend_bos, limits=Limits(),
    )  # fmt: skip
    better = metric != "kl" and get_metric(metric).higher_is_better
    bases = job.core(job.baselines()).bases
    runner = CircuitRunner(model)
    pairs = [
        runner.prepare(base, corrupt) for base, corrupt in zip(bases, job.corrupted, strict=True)
    ]
    begin = Circuit(frozenset(runner.edges)) if start is None else start
    mask = runner.mask(begin)

    def badness() -> float:
        mean = torch.stack([pair.scores(mask[None])[0] for pair in pairs]).mean()
        return float(-mean if better else mean)

    edges = [
        (i, j)
        for j in sorted(range(len(runner.readers)), key=lambda j: -runner.readers[j].stage)
        for i in sorted(range(len(runner.writers)), key=lambda i: -runner.writers[i].stage)
        if mask[i, j]
    ]
    now = badness()
    rows = []
    for i, j in progress_bar(edges, label="edges", show=progress):
        mask[i, j] = False
        without = badness()
        keep = without - now >= threshold
        rows.append((runner.writers[i].name, runner.readers[j].name, without - now, keep))
        if keep:
            mask[i, j] = True
        else:
            now = without
    table = pd.DataFrame(rows, columns=["sender", "receiver", "harm", "kept"])
    circuit = Circuit(frozenset((r.sender, r.receiver) for r in table.itertuples() if r.kept))
    return AcdcRun(circuit.pruned(model) if prune else circuit, table)
