"""Scoring many prompts as they are, in padded batches, each row under its own repair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import Hook, HookedModel, dtype_of, forward
from mi_hops.model.cache import Prefix, Recorder, new_cache
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.lean import lean_blocks
from mi_hops.model.numeric import wide_dtype
from mi_hops.model.plain import PlainPasses, plain_passes
from mi_hops.model.shortcuts import is_touched, may_be_rewritten
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.metrics import MetricLike, Target, get_metrics, require_finite
from mi_hops.sweep.pairs import Texts, prompts_of
from mi_hops.sweep.repair import LateHooks, Repair, RowHooks, Rows
from mi_hops.sweep.runs import Run, Scored, plan_runs
from mi_hops.sweep.together import pass_cost, plan_batches
from mi_hops.text.tokens import Prompt, pad


def score_prompts(
    model: HookedModel,
    prompts: Texts,
    targets: Sequence[Target],
    metrics: MetricLike | Sequence[MetricLike],
    *,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, Float[Tensor, "row"]]:
    """Score each prompt's target.

    Args:
        targets: one per prompt.
        metrics: names, metrics or functions (see `metrics.get_metric`).
        repair: acts on row r by ``states[r]``; needs `states`, one per prompt, None for a row that
            is left as it is.
        hooks: further hooks, which must act on every row alike; they come before the repair's.

    Returns:
        Metric name -> ``[row]`` on the CPU, in float32 or the model's dtype if wider.

    Raises:
        ValueError: unequal numbers of prompts, targets and states; a repair without states or the
            other way round; a score that is not finite.
        TokenError: a prompt that does not fit the context together with its answer.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.sweep import target_of
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.load_facts("hopland")[:4]
        >>> prompts = [mi_hops.encode(model, f.prompt()) for f in facts]
        >>> targets = [target_of(model, p, f.answer) for p, f in zip(prompts, facts)]
        >>> mi_hops.score_prompts(model, prompts, targets, "first_prob")["first_prob"].shape
        torch.Size([4])
    """
    wanted, prompts = tuple(get_metrics(metrics)), prompts_of(model, prompts)
    if len(targets) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts and {len(targets)} targets; need one each")
    scored = [Scored(p, t, wanted) for p, t in zip(prompts, targets, strict=True)]
    found = score(model, scored, batch_size=batch_size, repair=repair, states=states, hooks=hooks)
    columns = found.reshape(len(prompts), len(wanted)).T
    return {metric.name: column for metric, column in zip(wanted, columns, strict=True)}


def score(
    model: HookedModel,
    prompts: Sequence[Scored],
    *,
    batch_size: int = 64,
    repair: Repair | None = None,
    states: Sequence[Any | None] | None = None,
    hooks: Sequence[Hook] = (),
) -> Float[Tensor, "prompt metric"]:
    """Scores of prompts that carry their own targets and metrics; otherwise as `score_prompts`.

    Rows are padded on the right, and only the scored positions are unembedded. Prompts with the
    same tokens, state and appended answer tokens are run once. Where the model has hooks of the
    user's, which may look at any position, rows of one length are run together instead.
    """
    given = check_states(len(prompts), repair, states)
    wide = wide_dtype(dtype_of(model))
    metrics = prompts[0].metrics if prompts else ()
    scores = torch.empty(len(prompts), len(metrics), dtype=wide)
    keys = [(s.prompt.text, s.prompt.ids, id(t)) for s, t in zip(prompts, given, strict=True)]
    runs = plan_runs(model, prompts, keys)
    under = _Under(model, repair, hooks, touched=is_touched(model))

    def rows_of(part: Sequence[int]) -> list[_Row]:
        return [_Row(runs[i], prompts[runs[i].prompt].prompt, given[runs[i].prompt]) for i in part]

    def run(part: Sequence[int]) -> tuple[list[int], list[int], Tensor]:
        found = [
            each
            for i, row in zip(part, under.logits(rows_of(part)), strict=True)
            for each in runs[i].scores(row[None], prompts)
        ]
        at_prompts, at_metrics, values = zip(*found, strict=True)
        return list(at_prompts), list(at_metrics), torch.cat(values).to("cpu", wide)

    said = [(run.tokens, run.readings) for run in runs], [m.name for m in metrics]
    around = (pretransposed_weights, lean_blocks)
    with torch.no_grad(), pretransposed_weights(model), lean_blocks(model):
        for _, (at_prompts, at_metrics, values) in batched_with_oom_backoff(
            under.order(rows_of(range(len(runs))), batch_size),
            batch_size,
            run,
            kept=("scores", said),
            model=model,
            texts=lambda part: [prompts[runs[i].prompt].prompt.text for i in part],
            around=around,
            alike=(lambda i: len(runs[i].tokens)) if under.touched else None,
        ):
            scores[at_prompts, at_metrics] = values
    for m, each in enumerate(metrics):
        require_finite(each.name, scores[:, m])
    return scores


@dataclass(frozen=True)
class _Row:
    """A run, its prompt, and the repair's state for it."""

    run: Run
    prompt: Prompt
    state: Any


@dataclass(frozen=True)
class _Under:
    """Passes under a repair and further hooks, in which nothing is run twice that need not be."""

    model: HookedModel
    repair: Repair | None
    hooks: Sequence[Hook]
    touched: bool

    def order(self, rows: Sequence[_Row], batch_size: int) -> list[int]:
        """Rows in the order in which least is run, as indices; by length where hooks of the user's look on."""
        if self.touched:
            return sorted(range(len(rows)), key=lambda i: len(rows[i].run.tokens))
        if rows and self._plain(self._own(rows[:1], 0, len(rows[0].run.tokens))):
            # Padding costs nothing there, and what rows of one state begin with alike is computed once.
            of_state = {id(row.state): i for i, row in enumerate(rows)}
            order = range(len(rows))
            return sorted(order, key=lambda i: (of_state[id(rows[i].state)], rows[i].run.tokens))
        planned = plan_batches(_read(rows), batch_size, pass_cost=pass_cost(self.model))
        return [i for parts in planned for part in parts for i in part.rows]

    def logits(self, rows: Sequence[_Row]) -> list[Float[Tensor, "scored vocab"]]:
        """Each row's logits at the positions it is read at, the last repeated as often as the widest needs."""
        width = max(len(row.run.positions) for row in rows)
        at = torch.tensor([row.run.scored(width) for row in rows])
        tokens = pad([row.run.tokens for row in rows]).tokens
        own = self._own(rows, 0, tokens.shape[1])
        if plain := self._plain(own):
            changes = own.changes if isinstance(own, RowHooks) else None
            return list(plain.at(tokens, at, changes))
        if not isinstance(own, LateHooks) or not self._may_split:
            return list(logits_at(self.model, tokens, at, hooks=[*self.hooks, *own]))
        found: dict[int, Tensor] = {}
        for parts in plan_batches(_read(rows), len(rows), pass_cost=pass_cost(self.model)):
            for part in parts:
                some, start = [rows[i] for i in part.rows], part.starts[-1] if part.starts else 0
                found |= zip(part.rows, self._behind(start, some, at[list(part.rows)]), strict=True)
        return [found[i] for i in range(len(rows))]

    @property
    def _may_split(self) -> bool:
        """Whether a pass may begin behind others' tokens."""
        return not self.hooks and not self.touched and may_be_rewritten(self.model)

    def _behind(
        self, start: int, rows: Sequence[_Row], at: Int[Tensor, "row scored"]
    ) -> Float[Tensor, "row scored vocab"]:
        """Logits of rows that have the tokens before `start` in common, which are run once if that pays."""
        tokens = pad([row.run.tokens for row in rows]).tokens
        own = self._own(rows, 0, tokens.shape[1])
        start = min(start, own.start) if isinstance(own, LateHooks) else 0
        if (len(rows) - 1) * start <= pass_cost(self.model):
            return logits_at(self.model, tokens, at, hooks=own)
        cache = prefix_of(self.model, tokens[:1, :start]).view([0], start)
        cache.rows = [0] * len(rows)
        own = self._own(rows, start, tokens.shape[1] - start)
        return logits_at(
            self.model, tokens[:, start:], at - start, hooks=own, cache=cache, grows=True
        )

    def _own(self, rows: Sequence[_Row], offset: int, width: int) -> Sequence[Hook]:
        """The repair's hooks for a pass over these positions."""
        if self.repair is None:
            return ()
        asked = Rows(tuple(row.prompt for row in rows), width, offset)
        return self.repair.hooks(self.model, [row.state for row in rows], asked)

    def _plain(self, own: Sequence[Hook]) -> PlainPasses | None:
        edited = not own or isinstance(own, RowHooks)
        return plain_passes(self.model) if edited and not self.hooks else None


def _read(rows: Sequence[_Row]) -> list[tuple[int, ...]]:
    """The tokens up to the first position that is read: beyond it nothing can be shared."""
    return [row.run.tokens[: row.run.positions[0] + 1] for row in rows]


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


def next_token_logits(
    model: HookedModel, prompts: Sequence[Prompt], *, batch_size: int = 64
) -> list[Float[Tensor, "vocab"]]:
    """Logits after each prompt, in float32 or wider, on the CPU."""
    wide = wide_dtype(dtype_of(model))

    def run(part: Sequence[int]) -> Tensor:
        batch = pad([prompts[i].ids for i in part])
        with torch.no_grad():
            return logits_at(model, batch.tokens, batch.last[:, None])[:, 0].to("cpu", wide)

    found: dict[int, Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    alike = (lambda i: len(prompts[i])) if is_touched(model) else None
    for part, logits in batched_with_oom_backoff(order, batch_size, run, alike=alike):
        found |= zip(part, logits, strict=True)
    return [found[i] for i in range(len(prompts))]


def logits_at(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    positions: Int[Tensor, "row scored"],
    *,
    hooks: Sequence[Hook] = (),
    cache: Any = None,
    grows: bool = False,
) -> Float[Tensor, "row scored vocab"]:
    """Logits at some positions of each row; the others are never multiplied by W_U.

    Args:
        positions: for each row, counted within `tokens` (not from the start of a cache).
        hooks, cache, grows: as in `model.forward`.
    """
    picker = torch.arange(len(positions))[:, None]

    def pick(x: Tensor) -> Tensor:
        return x[picker.to(x.device), positions.to(x.device)]

    # Right before the unembedding: the GPT-2 Bridge reshapes what its final norm returns.
    hooks = [*hooks, ("unembed.hook_in", pick)]
    return forward(model, tokens, hooks=hooks, cache=cache, grows=grows)


def stepping(
    model: HookedModel,
    prompts: Sequence[Prompt],
    repair: Repair | None,
    states: Sequence[Any | None],
) -> Callable[[Int[Tensor, "row pos"]], Float[Tensor, "row vocab"]]:
    """A function of the next tokens of every row, which gives the logits after the last of them.

    The rows have one length; its first call takes the prompts' own tokens.
    """
    cache, rows = new_cache(model, len(prompts)), Rows(tuple(prompts), width=0)

    def step(tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row vocab"]:
        nonlocal rows
        rows = rows.at(rows.offset + rows.width, tokens.shape[1])
        hooks = [] if repair is None else repair.hooks(model, states, rows)
        last = torch.full((len(tokens), 1), rows.width - 1)
        return logits_at(model, tokens, last, hooks=hooks, cache=cache)[:, 0]

    return step


def prefix_of(model: HookedModel, tokens: Int[Tensor, "row pos"]) -> Prefix:
    """Keys and values of tokens that any number of passes may go on from, run once."""
    recorder = Recorder(model, len(tokens), ())
    first = torch.zeros(len(tokens), 1, dtype=torch.long)
    with torch.no_grad():
        logits_at(model, tokens, first, hooks=recorder.hooks, cache=recorder.cache)
    return recorder.prefix()
