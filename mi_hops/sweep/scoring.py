"""Scoring many prompts in padded batches, each row under its own repair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.model import Hook, HookedModel, dtype_of, forward
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.metrics import Metric, MetricLike, Plan, Target, get_metrics, require_finite
from mi_hops.sweep.repair import Repair, Rows
from mi_hops.text.tokens import Prompt, TokenError, batches

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def score_prompts(
    model: HookedModel,
    prompts: Sequence[Prompt],
    targets: Sequence[Target],
    metrics: MetricLike | Sequence[MetricLike],
    *,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    hooks: Sequence[Hook] | None = None,
) -> dict[str, Float[Tensor, "row"]]:
    """Scores of each prompt's target.

    Rows are padded on the right, and only the scored positions are unembedded. Prompts with the
    same tokens, state and appended answer tokens are run once, for all rows and metrics that read
    them.

    Args:
        targets: one a prompt.
        metrics: names, metrics or functions (see `metrics.get_metric`).
        repair: acts on row r by ``states[r]``; needs `states`, one a prompt, None for a row that
            is left as it is.
        hooks: further hooks, which must act on every row alike; they come before the repair's.

    Returns:
        Metric name -> ``[row]`` on the CPU, in float32 or the model's dtype if wider.

    Raises:
        ValueError: unequal numbers of prompts, targets and states; a repair without states or the
            other way round; a score that is not finite.
        TokenError: a prompt that does not fit the context together with its answer.
    """
    wanted = get_metrics(metrics)
    if len(targets) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts and {len(targets)} targets; need one each")
    given = check_states(len(prompts), repair, states)
    wide = wide_dtype(dtype_of(model))
    scores = {m.name: torch.empty(len(prompts), dtype=wide) for m in wanted}
    runs = _plan_runs(prompts, targets, wanted, given)
    _check_context(model, runs)
    with torch.no_grad():
        for chosen, batch in batches([run.tokens for run in runs], batch_size):
            part = [runs[i] for i in chosen]
            rows = Rows(tuple(run.prompt for run in part), batch.tokens.shape[1])
            active = list(hooks or ())
            if repair is not None:
                active += repair.hooks(model, [run.state for run in part], rows)
            positions = _positions(part)
            logits = logits_at(model, batch.tokens, positions, hooks=active)
            for run, row in zip(part, logits, strict=True):
                for reading in run.readings:
                    at = [run.scored.index(s) for s in reading.scored]
                    score = reading.metric.score(row[None, at], targets[reading.row])
                    scores[reading.metric.name][reading.row] = score[0]
    for name, found in scores.items():
        require_finite(name, found)
    return scores


def check_states(
    n: int, repair: Repair | None, states: Sequence[Any | None] | None
) -> list[Any | None]:
    """One state for each of `n` rows; all None without a repair.

    Raises:
        ValueError: a repair without states or the other way round, or a wrong number of them.
    """
    if (repair is None) != (states is None):
        raise ValueError(
            "repair and states go together: states = repair.fit(model, facts), one for each row"
        )
    if states is None:
        return [None] * n
    if len(states) != n:
        raise ValueError(f"got {n} prompts and {len(states)} states; need one each")
    return list(states)


def logits_at(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    positions: Int[Tensor, "row scored"],
    *,
    hooks: Sequence[Hook] = (),
    cache: Any = None,
) -> Float[Tensor, "row scored vocab"]:
    """Logits at some positions of each row; the others are never multiplied by W_U.

    Args:
        positions: for each row, counted within `tokens` (not from the start of a cache).
        hooks, cache: as in `model.forward`.
    """
    picker = torch.arange(len(positions))[:, None]

    def pick(x: Tensor) -> Tensor:
        return x[picker.to(x.device), positions.to(x.device)]

    # Right before the unembedding: the GPT-2 Bridge reshapes what its final norm returns.
    return forward(model, tokens, hooks=[*hooks, ("unembed.hook_in", pick)], cache=cache)


# -- which runs serve which rows and metrics ------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    row: int
    metric: Metric
    scored: tuple[int, ...]


class _Run:
    """One sequence to run, and what is read from it."""

    def __init__(self, prompt: Prompt, extra: tuple[int, ...], state: Any) -> None:
        self.prompt, self.extra, self.state = prompt, extra, state
        self.tokens = (*prompt.ids, *extra)
        self.readings: list[_Reading] = []
        self.scored: list[int] = []

    def read(self, row: int, metric: Metric, plan: Plan) -> None:
        self.readings.append(_Reading(row, metric, plan.scored))
        self.scored = sorted({*self.scored, *plan.scored})


def _plan_runs(
    prompts: Sequence[Prompt],
    targets: Sequence[Target],
    metrics: Sequence[Metric],
    states: Sequence[Any | None],
) -> list[_Run]:
    # Attention is causal, so a run that appends more tokens serves all that append a part of them.
    wanted: dict[tuple[Any, ...], list[tuple[int, Metric, Plan]]] = {}
    for row, (prompt, target, state) in enumerate(zip(prompts, targets, states, strict=True)):
        for metric in metrics:
            plan = metric.plan(target)
            wanted.setdefault((prompt.text, prompt.ids, id(state)), []).append((row, metric, plan))
    runs: list[_Run] = []
    for asked in wanted.values():
        by_extra: dict[tuple[int, ...], _Run] = {}
        for row, metric, plan in sorted(asked, key=lambda a: -len(a[2].extra)):
            if plan.extra not in by_extra:
                run = _Run(prompts[row], plan.extra, states[row])
                runs.append(run)
                for end in range(len(plan.extra) + 1):
                    by_extra.setdefault(plan.extra[:end], run)
            by_extra[plan.extra].read(row, metric, plan)
    return runs


def _check_context(model: HookedModel, runs: Sequence[_Run]) -> None:
    limit = int(model.cfg.n_ctx)
    for run in runs:
        if len(run.tokens) > limit:
            raise TokenError(
                f"prompt of {len(run.prompt)} tokens and {len(run.extra)} of its answer exceed the "
                f"model's context of {limit}: {run.prompt.text[:60]!r}..."
            )


def _positions(runs: Sequence[_Run]) -> Int[Tensor, "row scored"]:
    width = max(len(run.scored) for run in runs)

    def row(run: _Run) -> Iterator[int]:
        # Rows that read fewer positions repeat their first; the copies are not looked at.
        for i in range(width):
            yield run.prompt.last + run.scored[i if i < len(run.scored) else 0]

    return torch.tensor([list(row(run)) for run in runs])
