"""Direct path patching: what one component tells another one, and nobody else (Wang et al. 2022).

For a path from a writer u to a reader v (arXiv 2211.00593), v's input, and only v's, becomes::

    input of v + (u's write in the source run - u's write in the base run)

and everything after v runs on. The reader's layer norm and projections are recomputed on that input,
so the result is the exact edge intervention, whatever the norm, on grouped-query models as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mi_hops.fanout import Intervention, Site
from mi_hops.interventions import Change, add
from mi_hops.metrics import MetricLike, Target, normalised
from mi_hops.model import LensModel, dtype_of
from mi_hops.patching.activation import Direction, PatchJob
from mi_hops.patching.nodes import (
    Node,
    Writes,
    arrival,
    edge_result,
    probe,
    read_hooks,
    readers,
    writers,
)
from mi_hops.patching.pairs import Text
from mi_hops.patching.sweep import Limits, Scored, Sweep, score
from mi_hops.tokens import Where, align, pad
from mi_hops.tokens import positions as positions_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.results import Result


def path_patch(
    model: LensModel,
    clean: Text | Sequence[Text],
    corrupted: Text | Sequence[Text],
    *,
    senders: str | Sequence[str] = "heads",
    receivers: str | Sequence[str] = "logits",
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    positions: Where = slice(None),
    metric: MetricLike = "logit_diff",
    direction: Direction = "denoise",
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Result:
    """Every direct path from senders to receivers, in every pair; other arguments as in `patch`.

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
        ValueError: an unknown component; no path at all; a model whose heads have no write of
            their own (a norm after attention).
        TokenError: pairs that do not correspond token by token.
    """
    import torch
    from tqdm.auto import tqdm

    job = PatchJob.of_pairs(
        model, clean, corrupted, answer=answer, wrong=wrong, metric=metric, direction=direction,
        prepend_bos=prepend_bos, limits=Limits(max_rows=max_rows, memory=memory),
    )  # fmt: skip
    if not job.single:
        raise ValueError("path patching takes one metric, got several; run one after the other")
    sources, targets = writers(model, senders), readers(model, receivers)
    if not any(u.reaches(v) for u in sources for v in targets):
        raise ValueError(
            f"no path leads from {[u.name for u in sources][:5]} to {[v.name for v in targets][:5]}: "
            "readers see what earlier blocks wrote (an MLP also its own block's attention)"
        )
    baselines = job.baselines()
    bases = job.core(baselines).bases
    n = len(bases)
    wide = torch.promote_types(torch.float32, dtype_of(model))
    scores = torch.full((n, len(sources), len(targets)), float("nan"), dtype=wide)
    base = torch.empty(n, dtype=wide)
    for i in tqdm(range(n), disable=not progress, desc="pairs"):
        align(job.sources[i], job.bases[i])
        span = positions_of(job.bases[i], positions)
        ends = (job.sources[i], job.bases[i])
        writes = Writes(model, ends, sources)
        changes = torch.stack([_change(writes, u, span) for u in sources])
        scores[i], base[i] = _pair(model, bases[i], changes, span[0], sources, targets, job.limits)
    other = score(model, job.other_scored(baselines))[:, 0]
    effect = normalised(scores, other[:, None, None], base[:, None, None], undefined="nan")
    change = scores - base[:, None, None]
    return edge_result(
        job, {"effect": effect, "score": scores, "change": change}, job.by_run(base, other),
        sources, targets, examples=examples, title=f"Direct paths; {job.names[0]}",
        method="direct path patching",
    )  # fmt: skip


def _change(writes: Writes, node: Node, span: Sequence[int]) -> Float[Tensor, "pos d_model"]:
    """Source write less base write within the span, zero outside."""
    import torch

    found = writes(node, 0) - writes(node, 1)
    kept = torch.zeros_like(found)
    kept[list(span)] = found[list(span)]
    return kept


def _adds(changes: Float[Tensor, "row pos d_model"]) -> Change:
    return lambda x: x + changes.to(x)


def _pair(
    model: LensModel,
    base: Scored,
    changes: Float[Tensor, "sender pos d_model"],
    first: int,
    sources: Sequence[Node],
    targets: Sequence[Node],
    limits: Limits,
) -> tuple[Float[Tensor, "sender receiver"], Float[Tensor, ""]]:
    """Scores of all paths in one pair, NaN where there is none, and the base score.

    Readers of one block are swept together, so that no more than one block's inputs are held.
    """
    import torch

    sweep = Sweep(model, [base])
    tokens = pad([base.prompt.ids]).tokens
    where = tuple(range(first, len(base.prompt)))
    scores: Tensor | None = None
    intact = None
    by_place: dict[tuple[str, int], list[int]] = {}
    for j, target in enumerate(targets):
        by_place.setdefault((target.role, target.layer), []).append(j)
    for members in by_place.values():
        reader = targets[members[0]]
        senders = [i for i, u in enumerate(sources) if u.reaches(reader)]
        if not senders:
            continue
        items = []
        if reader.role == "logits":
            last = Site("resid_post", reader.layer - 1, where)
            items = [Intervention((last,), add(changes[i][list(where)])) for i in senders]
        else:
            entry, name = read_hooks(reader)
            more = _adds(changes[senders])
            with torch.no_grad():
                values = probe(model, tokens, reader.layer, entry, more, [name])[name]
            items = [arrival(targets[j], values[s], where) for s in range(len(senders))
                     for j in members]  # fmt: skip
        found = sweep.run(items, limits)
        if scores is None:
            scores = torch.full((len(sources), len(targets)), float("nan"), dtype=found.base.dtype)
        intact = found.base[0, 0]
        rows, columns = torch.tensor(senders)[:, None], torch.tensor(members)
        scores[rows, columns] = found.rows[:, 0].reshape(len(senders), len(members))
    if scores is None or intact is None:
        raise ValueError("no path leads from any sender to any receiver")
    return scores, intact
