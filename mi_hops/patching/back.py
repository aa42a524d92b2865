"""Back-patching: a late state of a prompt, fed back at an earlier block of the same prompt.

If the answer appears then, the blocks that could have made it came too early: what they needed was
resolved only after them (Biran et al. 2024, *Hopping Too Late*, arXiv 2406.12775).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_hops.model import HookedModel, dtype_of, hook_name, provenance
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import Metrics, captured
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Intervention, Site, replace
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.pairs import Pairs, PairsLike, as_prompts
from mi_hops.sweep.runs import run_sweep
from mi_hops.sweep.sites import PositionsLike, Sites

if TYPE_CHECKING:
    from torch import Tensor


def back_patch(
    model: HookedModel,
    pairs: PairsLike,
    positions: PositionsLike = "last",
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    metric: MetricLike = "first_prob",
    limits: Limits | None = None,
) -> Result:
    """Back-patch every state into every earlier block, position by position.

    States are those that enter a block: source s and target t mean that block t gets what enters
    block s; s = number of blocks is what leaves the last one.

    Args:
        pairs: prompts with their answers, ``Pairs(prompts, answer=...)``; corrupted ones are not run.
        positions: as in `Sites`; a pair ``(from, to)`` feeds the state of one place back at another.
        sources: default every block but the first, and the end; `targets`: every block.
        metric: one; ``"rank"`` is 1 where the answer's first token is the model's.

    Returns:
        `Result` on ``example``, where positions are named ``position``, ``source`` and ``target``,
        with ``score`` and ``change`` (less the intact run's score); NaN unless source is later than
        target. Per example the baseline ``intact``.

    Raises:
        ValueError: as in `patch`; no source later than a target, several metrics.
        TokenError: positions that are not in a prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("first_unseen")[:2]
        >>> asked = mi_hops.Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
        >>> mi_hops.patching.back_patch(model, asked, metric="rank")["score"].shape
        (2, 6, 6)
    """
    pairs, limits = Pairs.of(pairs), limits or Limits()
    bases = as_prompts(model, pairs.clean)
    n = int(model.cfg.n_layers)
    late = list(range(1, n + 1)) if sources is None else list(sources)
    early = list(range(n)) if targets is None else list(targets)
    if set(late) - set(range(n + 1)) or len(set(late)) < len(late) or not late:
        raise ValueError(f"sources are {late}; expected some of 0..{n}, each once ({n} is the end)")
    grid = Sites("resid_pre", layers=early, positions=positions).grid(model, bases)
    moves = [(i, j) for i, s in enumerate(late) for j, t in enumerate(early) if s > t]
    if not moves:
        raise ValueError(f"no source of {late} is later than a target of {early}")
    metrics = Metrics.of(metric)
    if not metrics.single:
        raise ValueError(f"expected one metric, got {metrics.names}")
    answers = pairs.targets(model, bases, metrics.reading_answers)
    scored = metrics.scored(bases, answers, metrics.baselines(model, bases))
    states = [hook_name("resid_post", s - 1) if s else hook_name("resid_pre", 0) for s in late]
    n_spans = len(grid.labels)

    def rows_of(example: int, base: int, _: Mapping[str, Tensor]) -> list[Intervention]:
        found = captured(model, [bases[example]], states)
        rows = []
        for taken, put in zip(grid.source[example], grid.base[example], strict=True):
            for i, j in moves:
                value = found[states[i]][0, list(taken)]
                rows.append(Intervention((Site("resid_pre", early[j], put),), replace(value), base))
        return rows

    found = run_sweep(model, scored, rows_of, limits=limits)
    rows = torch.stack(found.rows)[..., 0].unflatten(1, (n_spans, len(moves)))
    shape = (len(bases), n_spans, len(late), len(early))
    scores = torch.full(shape, float("nan"), dtype=wide_dtype(dtype_of(model)))
    where = tuple(np.array(moves).T)
    scores[:, :, where[0], where[1]] = rows.to(scores)
    intact = found.base[:, 0]
    values = {"score": scores, "change": scores - intact[:, None, None, None]}
    dims: tuple[str, ...] = ("example", "position", "source", "target")
    coords: dict[str, Any] = {"example": pairs.labels, "source": late, "target": early}
    if grid.has_positions:
        coords["position"] = list(grid.labels)
    else:
        dims = ("example", "source", "target")
        values = {name: value[:, 0] for name, value in values.items()}
    return Result.from_arrays(
        {name: (dims, value) for name, value in values.items()},
        baselines={"intact": (("example",), intact)},
        coords=coords,
        units=dict.fromkeys(("score", "change", "intact"), metrics.units[0]),
        provenance=provenance(model, method="back-patching", metrics=metrics.names),
        title=f"Back-patching; {metrics.names[0]}",
        skipped=pairs.skipped,
        allow_nonfinite=True,  # no source later than its target
    )
