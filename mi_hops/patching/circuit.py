"""Circuits: sets of edges, and what is left of a behaviour when all others are cut.

A circuit is run exactly: every reader's input is the corrupted run's, plus, for the circuit's edges
only, what each writer now writes beyond its corrupted write. All edges give the clean run, none the
corrupted one, all but one the direct path patching of that one. Faithfulness of a circuit (Wang et
al. 2022; Hanna et al. 2024)::

    (score of the circuit - score of the corrupted run) / (score of the clean run - of the corrupted)
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

import torch
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, n_heads_of, provenance
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.circuit_runs import CircuitRunner, ReadyPairs
from mi_hops.patching.core import require_effect
from mi_hops.patching.nodes import Edge, Node, job_of_nodes, readers
from mi_hops.result.files import read_object, replacing
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import normalised
from mi_hops.sweep.pairs import PairsLike
from mi_hops.sweep.scoring import score

_FORMAT = "mi_hops circuit 1"


@dataclass(frozen=True, repr=False)
class Circuit:
    """A set of edges, each (writer, reader) by name (see `nodes`)."""

    edges: frozenset[Edge]

    def __repr__(self) -> str:
        shown = ", ".join(f"{u} -> {v}" for u, v in sorted(self.edges)[:5])
        return f"Circuit: {len(self)} edges{': ' * bool(self.edges)}{shown}"

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def nodes(self) -> list[str]:
        """Names of the components the edges join, in alphabetical order."""
        ends = {name for edge in self.edges for name in edge}
        return sorted({name.split(".")[0] for name in ends})

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the edges as JSON.

        Raises:
            FileExistsError: `path` exists and `overwrite` is False.
            ValueError: another suffix than ``.json``.
        """
        content = {"format": _FORMAT, "edges": sorted(map(list, self.edges))}
        with replacing(path, suffix=".json", overwrite=overwrite) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """A circuit that `save` wrote.

        Raises:
            ValueError: a file that is none.
        """
        found = read_object(path)
        edges = found.get("edges")
        if found.get("format") != _FORMAT or not isinstance(edges, list):
            raise ValueError(
                f"{path} is no saved Circuit (its keys: {sorted(found)[:5]}); a graph of EAP-IG's code "
                "is read by load_eap_ig"
            )
        if not all(isinstance(e, list) and [type(x) for x in e] == [str, str] for e in edges):
            raise ValueError(f"{path} has edges that are not pairs of names")
        return cls(frozenset((u, v) for u, v in edges))

    def pruned(self, model: HookedModel) -> Circuit:
        """The circuit without dead ends: every remaining edge is on a path from embedding to logits.

        A key or value head leads on to all query heads that share it.
        """
        after = next_writers(model)

        def fed_by(writing: set[str]) -> set[str]:
            return {w for u, v in self.edges if u in writing for w in after.get(v, ())}

        fed = _closure({"embed"}, fed_by)
        edges = {(u, v) for u, v in self.edges if u in fed}

        def leading_to(reading: set[str]) -> set[str]:
            sending = {u for u, v in edges if v in reading}
            return {v for v, shaped in after.items() if sending & set(shaped)}

        useful = _closure({"logits"}, leading_to)
        return Circuit(frozenset((u, v) for u, v in edges if v in useful))


def _closure(found: set[str], more: Callable[[set[str]], set[str]]) -> set[str]:
    """The names, with all that follows from them by `more`."""
    while not (new := more(found)) <= found:
        found = found | new
    return found


def extract(
    model: HookedModel,
    scores: Result,
    n_edges: int,
    *,
    by: Literal["size", "serving"] = "size",
    select: Literal["top", "greedy"] = "top",
    prune: bool = True,
) -> Circuit:
    """The `n_edges` best edges of an edge attribution, by the mean of ``change`` over examples.

    Args:
        scores: of edges: what `attribute_edges` or `path_patch` gave.
        select: ``"top"`` takes the best edges wherever they are; ``"greedy"`` grows the circuit
            from the logits, each time by the best edge into what it already holds, so that small
            circuits hang together (Hanna et al. 2024).
        by: ``"size"`` takes the largest changes of either sign, ``"serving"`` only those that move
            the score the way the other run does: towards the corrupted run's mean score when
            corrupted, towards the clean one's when restored.
        prune: drop edges that then lead nowhere; the circuit may be smaller than asked for.

    Raises:
        ValueError: scores of no edges; fewer than one edge, or more than there are.
    """
    if not {"sender", "receiver"} <= set(scores.data.dims):
        raise ValueError(
            f"edges have a sender and a receiver, and these scores are on {list(scores.data.dims)}; "
            "pass those of attribute_edges or path_patch"
        )
    mean = scores["change"].mean("example").transpose("sender", "receiver")
    edges = mean.to_series().dropna()
    if not 1 <= n_edges <= len(edges):
        raise ValueError(f"n_edges is {n_edges}; expected 1 to {len(edges)}, the edges scored")
    if by == "serving":
        # Not by the sign of the change alone: of a rank or a divergence, lower is better.
        way = float(scores["clean"].mean() - scores["corrupted"].mean())
        way = -way if scores.provenance.get("direction") == "noise" else way
        edges = edges[edges * way > 0]
    elif by != "size":
        raise ValueError(f"by is {by!r}; expected 'size' or 'serving'")
    if select not in ("top", "greedy"):
        raise ValueError(f"select is {select!r}; expected 'top' or 'greedy'")
    ranked = (-edges.abs()).sort_values(kind="stable").index.tolist()
    best = ranked[:n_edges] if select == "top" else _grown(model, ranked, n_edges)
    circuit = Circuit(frozenset(best))
    return circuit.pruned(model) if prune else circuit


def _grown(model: HookedModel, ranked: Sequence[Edge], n_edges: int) -> list[Edge]:
    """Edges added from the logits down, each the best one whose reader matters already."""
    into = defaultdict(list)  # writer -> the readers that shape it
    for reader, shaped in next_writers(model).items():
        for writer in shaped:
            into[writer].append(reader)
    waiting = defaultdict(list)  # reader that does not matter yet -> ranks of the edges into it
    for rank, (_, reader) in enumerate(ranked):
        waiting[reader].append(rank)
    open_ranks = waiting.pop("logits", [])
    taken: list[Edge] = []
    while open_ranks and len(taken) < n_edges:
        best = ranked[heappop(open_ranks)]
        taken.append(best)
        for reader in into[best[0]]:
            for rank in waiting.pop(reader, ()):
                heappush(open_ranks, rank)
    return taken


def faithfulness(
    model: HookedModel,
    pairs: PairsLike,
    circuits: Sequence[Circuit],
    *,
    metric: MetricLike = "logit_diff",
    limits: Limits | None = None,
) -> Result:
    """How much of the metric circuits preserve when all other edges are patched from the corrupted run.

    Args:
        pairs: as in `patch`.
        circuits: their edges must be edges of the model.
        limits: ``batch_size`` (here 8 by default) bounds the circuits in one pass; fewer run
            together where memory runs out.

    Returns:
        `Result` on ``example`` and ``circuit`` (its number), with ``faithfulness`` (1 = as the
        clean run, 0 = as the corrupted one; NaN where these score the same) and ``score``; a label
        ``edges`` along ``circuit`` gives their sizes; baselines ``clean`` and ``corrupted``.

    Raises:
        ValueError: no circuits, an edge the model does not have, several metrics, or a residual
            stream that is not the sum of what is written to it (a hook that scales it).
        TokenError: pairs that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> whole = mi_hops.patching.Circuit(frozenset(mi_hops.patching.all_edges(model)))
        >>> kept = mi_hops.faithfulness(model, pairs.select([0]), [whole])
        >>> round(float(kept["faithfulness"][0, 0]), 2)
        1.0
    """
    limits = limits or Limits(batch_size=8)
    job = job_of_nodes(model, pairs, metric=metric, limits=limits)
    if not circuits:
        raise ValueError("got 0 circuits; need 1 or more")
    bases = job.scored()
    runner = CircuitRunner(model)
    masks = torch.stack([runner.mask(c.edges) for c in circuits])
    scores = torch.empty(len(bases), len(circuits), dtype=wide_dtype(dtype_of(model)))
    for i in progress_bar(range(len(bases)), label="pairs", show=limits.progress):
        (alone,) = runner.prepare([bases[i]], [job.corrupted[i]])

        def run(part: Sequence[int], ready: ReadyPairs = alone) -> Tensor:
            return ready.run(masks[list(part)])[0][0]

        parts = batched_with_oom_backoff(range(len(circuits)), limits.batch_size, run)
        scores[i] = torch.cat([found for _, found in parts])
    clean, corrupted = (score(model, run)[:, 0] for run in (bases, job.other_scored()))
    share = normalised(scores, clean[:, None], corrupted[:, None], undefined="nan")
    require_effect(share, job.why_no_effect(clean, corrupted))
    unit = job.metrics.units[0]
    return Result.from_arrays(
        {
            "faithfulness": (("example", "circuit"), share),
            "score": (("example", "circuit"), scores),
        },
        baselines={"clean": ("example", clean), "corrupted": ("example", corrupted)},
        coords={
            "example": job.pairs.labels,
            "circuit": range(len(circuits)),
            "edges": (("circuit",), [len(c) for c in circuits]),
        },
        units={
            "faithfulness": "share kept",
            **dict.fromkeys(("score", "clean", "corrupted"), unit),
        },
        provenance=provenance(
            model,
            method="circuit faithfulness",
            metrics=job.metrics.names,
            edges_of_model=len(runner.edges),
        ),
        title=f"Faithfulness of circuits; {job.one_metric}",
        skipped=job.pairs.skipped,
        allow_nonfinite=True,  # no scale
    )


def next_writers(model: HookedModel) -> dict[str, list[str]]:
    """Reader, but for the logits -> the writers it shapes: of a key or value, all heads that share it."""
    found: dict[str, list[str]] = {}
    for v in readers(model, "all"):
        if v.role == "mlp":
            found[v.name] = [v.name]
        elif v.head is not None:
            shared = int(model.cfg.n_heads) // n_heads_of(model, v.role)
            group = range(v.head * shared, (v.head + 1) * shared)
            found[v.name] = [Node("head", v.layer, h).name for h in group]
    return found
