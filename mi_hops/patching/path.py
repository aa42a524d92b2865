"""Direct path patching: what one component tells another one, and no other (Wang et al. 2022).

For a path from a writer u to a reader v (arXiv 2211.00593), v's input, and only v's, becomes::

    input of v + (u's write in the source run - u's write in the base run)

and everything after v runs on. The reader's layer norm and projections are recomputed on that input,
so the result is the exact edge intervention, whatever the norm, on grouped-query models as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.activation import PatchJob
from mi_hops.patching.core import require_effect
from mi_hops.patching.nodes import (
    Node,
    Writes,
    arrival,
    edge_result,
    job_of_nodes,
    probe,
    readers,
    writers,
)
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.interventions import Intervention, Site, add
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import normalised
from mi_hops.sweep.pairs import PairsLike
from mi_hops.sweep.passes import rows_within
from mi_hops.sweep.runs import Scored, Scores, Sweep
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Direction
from mi_hops.text.tokens import Where, pad
from mi_hops.text.tokens import positions as positions_of


def path_patch(
    model: HookedModel,
    pairs: PairsLike,
    senders: str | Sequence[str] = "heads",
    receivers: str | Sequence[str] = "logits",
    *,
    positions: Where = slice(None),
    metric: MetricLike = "logit_diff",
    direction: Direction = "denoise",
    limits: Limits | None = None,
) -> Result:
    """Patch every direct path from senders to receivers in every pair; other arguments as in `patch`.

    Args:
        senders: writers by name or group (see `nodes.writers`): ``"heads"``, ``"L3H2"``, ``"MLP1"``.
        receivers: readers by name or group (see `nodes.readers`): ``"q"``, ``"L4H0.k"``, ``"mlps"``,
            ``"logits"``.
        positions: where the sender's write is replaced, as one span; default everywhere.

    Returns:
        `Result` on ``example``, ``sender`` and ``receiver`` with ``effect``, ``score`` and
        ``change`` as in `patch`, NaN where no path leads from sender to receiver; baselines
        ``clean`` and ``corrupted`` per example.

    Raises:
        ValueError: as in `patch`; an unknown component; no path at all; a model whose heads have no
            write of their own (a norm after attention).
        TokenError: pairs that do not correspond token by token.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> pairs = mi_hops.contrast(model, mi_hops.Hopland().two_hop_facts("seen_parts")[:40])
        >>> mi_hops.path_patch(model, pairs.select([0]), "heads", "logits")["change"].dims
        ('example', 'sender', 'receiver')
    """
    job = job_of_nodes(model, pairs, metric=metric, direction=direction, limits=limits)
    nodes = writers(model, senders), readers(model, receivers)
    wanted = reached(*nodes)
    if not wanted.any():
        raise ValueError(
            f"no path leads from {[u.name for u in nodes[0]][:5]} to {[v.name for v in nodes[1]][:5]}"
            ": readers see what earlier blocks wrote (an MLP also its own block's attention)"
        )
    spans = [positions_of(prompt, positions) for prompt in job.bases]
    scores, base = exact_paths(job, *nodes, wanted, spans)
    other = score(model, job.other_scored())[:, 0]
    effect = normalised(scores, other[:, None, None], base[:, None, None], undefined="nan")
    require_effect(effect, job.why_no_effect(base, other))
    return edge_result(
        job,
        {"effect": effect, "score": scores, "change": scores - base[:, None, None]},
        job.by_run(base, other),
        nodes,
        title="Direct paths",
        method="direct path patching",
    )


def reached(sources: Sequence[Node], targets: Sequence[Node]) -> Bool[Tensor, "sender receiver"]:
    """True where a path leads from sender to receiver."""
    writing, reading = (torch.tensor([node.stage for node in side]) for side in (sources, targets))
    return writing[:, None] < reading


def exact_paths(
    job: PatchJob,
    sources: Sequence[Node],
    targets: Sequence[Node],
    wanted: Bool[Tensor, "sender receiver"],
    spans: Sequence[Sequence[int]],
) -> tuple[Float[Tensor, "example sender receiver"], Float[Tensor, "example"]]:
    """Scores of the wanted paths in every pair, NaN of the others, and the base scores.

    Args:
        wanted: paths that there are, at least one of them.
        spans: where the senders' writes are replaced, pair by pair.
    """
    bases = job.scored()
    limits = replace(job.limits, progress=False)
    wide = wide_dtype(dtype_of(job.model))
    scores = torch.full((len(bases), *wanted.shape), float("nan"), dtype=wide)
    base = torch.empty(len(bases), dtype=wide)
    for i in progress_bar(range(len(bases)), label="pairs", show=job.limits.progress):
        writes = Writes(job.model, (job.sources[i], job.bases[i]), sources)
        changes = torch.stack([_change(writes, u, spans[i]) for u in sources])
        pair = _Pair(job.model, bases[i], changes, min(spans[i]), limits)
        base[i] = pair.run(targets, wanted, scores[i])
    return scores, base


def _change(writes: Writes, node: Node, span: Sequence[int]) -> Float[Tensor, "pos d_model"]:
    """Source write less base write within the span, zero outside."""
    found = writes(node, 0) - writes(node, 1)
    kept = torch.zeros_like(found)
    kept[list(span)] = found[list(span)]
    return kept


@dataclass(frozen=True)
class _Pair:
    """One pair of prompts.

    Attributes:
        changes: of each sender's write, ``[sender, pos, d_model]``.
        first: the first position they touch.
    """

    model: HookedModel
    base: Scored
    changes: Float[Tensor, "sender pos d_model"]
    first: int
    limits: Limits

    def run(
        self,
        targets: Sequence[Node],
        wanted: Bool[Tensor, "sender receiver"],
        scores: Float[Tensor, "sender receiver"],
    ) -> Float[Tensor, ""]:
        """Write the wanted paths' scores into `scores`; returns the base score.

        Readers of one block are swept together, and as many senders at a time as fit into a pass,
        so that no more than one block's inputs are held for these; fewer where memory runs out.
        """
        sweep, limits = Sweep(self.model, [self.base]), self.limits
        width = len(self.base.prompt)
        most = limits.max_rows or rows_within(self.model, width, 1, limits.memory)
        by_place: dict[tuple[str, int], list[int]] = {}
        for j, target in enumerate(targets):
            by_place.setdefault((target.role, target.layer), []).append(j)
        intact = None
        for members in by_place.values():
            senders = wanted[:, members].any(1).nonzero().flatten().tolist()

            def run(part: Sequence[int], members: list[int] = members) -> tuple[Any, Scores]:
                paths = [(i, j) for i in part for j in members if wanted[i, j]]
                return paths, sweep.run(self._interventions(part, paths, targets), limits)

            for _, (paths, found) in batched_with_oom_backoff(senders, most, run):
                intact = found.base[0, 0]
                rows, columns = zip(*paths, strict=True)
                scores[list(rows), list(columns)] = found.rows[:, 0]
        assert intact is not None  # at least one path is wanted
        return intact

    def _interventions(
        self, senders: Sequence[int], paths: Sequence[tuple[int, int]], targets: Sequence[Node]
    ) -> list[Intervention]:
        """One for each path from these senders to readers of one role and block."""
        where = tuple(range(self.first, len(self.base.prompt)))
        reader = targets[paths[0][1]]
        if reader.role == "logits":
            last = Site("resid_post", reader.layer - 1, where)
            return [Intervention((last,), add(self.changes[i][list(where)])) for i, _ in paths]
        tokens = pad([self.base.prompt.ids]).tokens
        values = probe(self.model, tokens, reader, self.changes[list(senders)])
        row = {i: s for s, i in enumerate(senders)}
        return [arrival(targets[j], values[row[i]], where) for i, j in paths]
