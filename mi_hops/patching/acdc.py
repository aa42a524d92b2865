"""ACDC: circuits by cutting edge after edge (Conmy et al. 2023, arXiv 2304.14997).

The slow reference for edge attribution: readers are visited from the logits down, and an edge is cut
for good if the circuit without it diverges from the clean run by less than `threshold` more.

Most edges go, so a pass tries several at once: each row is the circuit without one edge more, as if
all before it were cut. Rows count up to the first edge that stays; from there the next pass goes on.
The decisions are those of one edge at a time. A pass starts at the block of the first reader it
changes: what comes before is the same as in the circuit so far. Pairs of one length run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from mi_hops.model import HookedModel
from mi_hops.patching.circuit import Circuit
from mi_hops.patching.circuit_runs import CircuitRunner
from mi_hops.patching.nodes import job_of_nodes
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, get_metric
from mi_hops.sweep.pairs import PairsLike

#: How bad each row is, and by group ``[pair, row, writer, pos, d_model]`` what its writers write.
_Tried = tuple[list[float], list[Tensor]]


@dataclass(frozen=True, repr=False)
class AcdcRun:
    """The result of ACDC.

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
    """Cut every edge whose removal changes the metric by less than `threshold`.

    Args:
        pairs: as in `patch`.
        threshold: in units of the metric (nats for ``"kl"``), mean over pairs.
        start: search among these edges only; default all.
        metric: what must stay; ``"kl"`` is the divergence from the clean run.
        prune: drop edges that lead nowhere in the end.
        limits: ``batch_size`` bounds the edges tried in one pass; fewer where memory runs out.

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
    groups = runner.prepare(job.scored(), job.corrupted, circuits=limits.batch_size)
    begin = Circuit(frozenset(runner.edges)) if start is None else start
    mask = runner.mask(begin.edges)

    def tried(part: Sequence[tuple[int, int]], known: list[Tensor]) -> _Tried:
        """How bad the circuit is with one edge more cut in each row, and its writes."""
        masks = mask.repeat(max(1, len(part)), 1, 1)
        for row, (i, j) in enumerate(part):
            masks[row:, i, j] = False
        first = runner.readers[part[-1][1]] if part else None
        found = [
            group.run(masks, known[n] if known else None, first) for n, group in enumerate(groups)
        ]
        mean = torch.cat([scores for scores, _ in found]).mean(0)
        return (-mean if better else mean).tolist(), [changes for _, changes in found]

    edges = [
        (i, j)
        for j in sorted(range(len(runner.readers)), key=lambda j: -runner.readers[j].stage)
        for i in sorted(range(len(runner.writers)), key=lambda i: -runner.writers[i].stage)
        if mask[i, j]
    ]
    (now,), changes = tried([], [])
    known = [change[:, 0] for change in changes]
    rows = []
    size = most = limits.batch_size
    done = 0
    with progress_bar(label="edges", show=limits.progress, total=len(edges)) as bar:
        while done < len(edges):
            coming = edges[done : done + size]
            part, (found, changes) = next(
                batched_with_oom_backoff(coming, len(coming), partial(tried, known=known))
            )
            size = min(most, 2 * len(part))
            for row, ((i, j), without) in enumerate(zip(part, found, strict=True)):
                keep = without - now >= threshold
                rows.append((runner.writers[i].name, runner.readers[j].name, without - now, keep))
                if keep:  # the rows after it had cut it
                    size = max(1, row + 1)
                    break
                mask[i, j], now = False, without
                known = [change[:, row] for change in changes]
            bar.update(len(rows) - done)
            done = len(rows)
    table = pd.DataFrame(rows, columns=["sender", "receiver", "harm", "kept"])
    circuit = Circuit(frozenset((r.sender, r.receiver) for r in table.itertuples() if r.kept))
    return AcdcRun(circuit.pruned(model) if prune else circuit, table)
