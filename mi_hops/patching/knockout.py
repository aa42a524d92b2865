"""Attention knockout: what is lost when some positions may not look at others.

In a window of blocks, queries at some positions lose some keys: their scores are taken for minus
infinity before the softmax, so the pattern is 0 there and the rest of each row sums to 1 again (Geva et
al. 2023, arXiv 2304.14767; of two-hop questions Biran et al. 2024, arXiv 2406.12775).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mi_hops.model import HookedModel
from mi_hops.patching.core import ChangeOf, GridSweep, Metrics
from mi_hops.sweep.interventions import Change
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.pairs import Pairs, PairsLike, as_prompts, one_each
from mi_hops.sweep.sites import PositionsLike, Sites
from mi_hops.text.tokens import Where
from mi_hops.text.tokens import positions as positions_of

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.result.result import Result


def knockout(
    model: HookedModel,
    pairs: PairsLike,
    keys: PositionsLike = "each",
    queries: Where | Sequence[Where] = "last",
    *,
    layers: int | Sequence[int] | None = None,
    window: int = 1,
    heads: int | Sequence[int] | Literal["all"] | None = "all",
    metric: MetricLike | Sequence[MetricLike] = "first_prob",
    limits: Limits | None = None,
) -> Result:
    """Block attention from `queries` to each of `keys`, block by block, in every clean prompt.

    Args:
        pairs: prompts with their answers, ``Pairs(prompts, answer=...)``; corrupted ones are not run.
        keys: positions that are not seen, as in `Sites`: ``"each"`` by itself, or roles by name.
        queries: positions that do not see them, one span, or one for each prompt. Answer tokens that
            a metric appends see them still.
        layers, window: as in `Sites`: blocks one by one, or that many at once around each.
        heads: ``"all"`` at once; None for each by itself, or those named.

    Returns:
        `Result` on ``example`` and the axes of the grid with ``score`` and ``change`` (less the
        intact run's score), and per example the baseline ``intact``.

    Raises:
        ValueError: as in `patch`; queries that would see no key at all, or whose attention to all
            other keys is 0 in the model's dtype.
        TokenError: positions that are not in a prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:3]
        >>> asked = mi_hops.Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
        >>> subjects = {"subject": [f.subject for f in facts]}
        >>> mi_hops.patching.knockout(model, asked, subjects, window=3)["change"].dims
        ('example', 'layer', 'position')
    """
    pairs, limits = Pairs.of(pairs), limits or Limits()
    bases = as_prompts(model, pairs.clean)
    sites = Sites("pattern", layers=layers, positions=keys, heads=heads, window=window)
    grid = sites.grid(model, bases)
    each = one_each("queries", queries, len(bases))
    seeing = [positions_of(prompt, where) for prompt, where in zip(bases, each, strict=True)]
    for prompt, queried, spans in zip(bases, seeing, grid.base, strict=True):
        for label, blocked in zip(grid.labels, spans, strict=True):
            blind = [q for q in queried if set(range(q + 1)) <= set(blocked)]
            if blind:
                raise ValueError(
                    f"without keys {label!r} the query at position {blind[0]} of {prompt.text!r} sees "
                    "nothing at all, and its attention is undefined; leave it a key, or name later "
                    "queries"
                )
    metrics = Metrics.of(metric)
    targets = pairs.targets(model, bases, metrics.reading_answers)
    scored = metrics.scored(bases, targets, metrics.baselines(model, bases))
    sweep = GridSweep(model, bases, grid, metrics, pairs.labels, limits)
    # The patterns of the queries are changed, and the spans of the grid are the keys they lose.
    at_queries = replace(grid, base=tuple((where,) * len(grid.labels) for where in seeing))

    def changes_of(example: int, row: int, shown: Mapping[str, Tensor]) -> ChangeOf:
        return lambda cell, layer, sample: _blocked(grid.base[example][cell.span])

    scores, intact, _ = replace(sweep, grid=at_queries).run(scored, changes_of)
    return sweep.result(
        {"change": scores - intact[:, None], "score": scores},
        {"intact": intact},
        title=f"Attention knockout; {', '.join(metrics.names)}",
        units={},
        skipped=pairs.skipped,
        method="attention knockout",
        window=window,
    )


def _blocked(keys: Sequence[int]) -> Change:
    """Patterns without some keys, as the softmax of the other scores gives them."""
    where = list(keys)

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., where] = 0
        left = x.sum(-1, keepdim=True)
        if bool((left == 0).any()):
            raise ValueError(
                f"without the blocked keys no attention is left: in {x.dtype} they have all the weight "
                "of a query, and what the other keys get is rounded to 0. Load the model in float32 or "
                "bfloat16, whose numbers go nearer to 0, or block fewer keys"
            )
        return x / left

    return change
