"""ACDC: circuits by cutting edge after edge (Conmy et al. 2023, arXiv 2304.14997).

The slow reference for edge attribution: readers are visited from the logits down, and an edge is cut
for good if the circuit without it diverges from the clean run by less than `threshold` more. Every
edge costs a run of every pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mi_hops.model import HookedModel
from mi_hops.patching.circuit import Circuit, CircuitRunner
from mi_hops.patching.nodes import job_of_nodes
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, get_metric
from mi_hops.sweep.pairs import PairsLike

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class AcdcRun:
    """What ACDC found.

    Attributes:
        circuit: the edges that stayed.
        table: a row per edge in the order of visiting: ``sender``, ``receiver``, ``harm`` (by how
            much cutting it made the circuit worse, unit of the metric, mean over pairs), ``kept``.
    """

    circuit: Circuit
    table: pd.DataFrame

    def __repr__(self) -> str:
        return f"AcdcRun: {len(self.table)} edges visited; {self.circuit!r}"


def acdc(
    model: HookedModel,
    pairs: PairsLike,
    *,
    threshold: float,
    start: Circuit | None = None,
    metric: MetricLike = "kl",
    prune: bool = True,
    limits: Limits | None = None,
) -> AcdcRun:
    """Cut every edge whose loss harms the metric by less than `threshold`.

    Args:
        pairs: as in `patch`.
        threshold: in units of the metric (nats for ``"kl"``), mean over pairs.
        start: search among these edges only; default all.
        metric: what must stay; ``"kl"`` is the divergence from the clean run.
        prune: drop edges that lead nowhere in the end.
        limits: its ``progress`` shows a bar; a pass holds one circuit.

    Raises:
        ValueError: several metrics, or a threshold that is not positive.
        TokenError: pairs that do not correspond token by token.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected more than 0")
    limits = limits or Limits()
    job = job_of_nodes(model, pairs, metric=metric, limits=limits)
    better = metric != "kl" and get_metric(metric).higher_is_better
    runner = CircuitRunner(model)
    ready = [
        runner.prepare(base, corrupt)
        for base, corrupt in zip(job.scored(), job.corrupted, strict=True)
    ]
    begin = Circuit(frozenset(runner.edges)) if start is None else start
    mask = runner.mask(begin)

    def badness() -> float:
        mean = torch.stack([pair.scores(mask[None])[0] for pair in ready]).mean()
        return float(-mean if better else mean)

    edges = [
        (i, j)
        for j in sorted(range(len(runner.readers)), key=lambda j: -runner.readers[j].stage)
        for i in sorted(range(len(runner.writers)), key=lambda i: -runner.writers[i].stage)
        if mask[i, j]
    ]
    now = badness()
    rows = []
    for i, j in progress_bar(edges, label="edges", show=limits.progress):
        mask[i, j] = False
        without = badness()
        keep = without - now >= threshold
        rows.append((runner.writers[i].name, runner.readers[j].name, without - now, keep))
        if keep:
            mask[i, j] = True
        else:
            now = without
    import pandas as pd

    table = pd.DataFrame(rows, columns=["sender", "receiver", "harm", "kept"])
    circuit = Circuit(frozenset((r.sender, r.receiver) for r in table.itertuples() if r.kept))
    return AcdcRun(circuit.pruned(model) if prune else circuit, table)
