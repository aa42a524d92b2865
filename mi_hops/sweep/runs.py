"""Running interventions on many prompts at once and scoring every row by several metrics.

What all exact methods of this package share: base prompts with their targets go in, interventions
refer to them by number, and scores come out, in fan-out passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mi_hops.model import HookedModel, dtype_of
from mi_hops.model.numeric import wide_dtype
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.fanout import FanOut, Intervention, Pass, Reduce, fan_out, plan_fan_out
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Metric, Target, require_finite
from mi_hops.text.tokens import Batch, Prompt, TokenError, pad

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A prompt and what it is scored on.

    Attributes:
        metrics: as many for every prompt of a sweep, in one order; their arguments may differ.
    """

    prompt: Prompt
    target: Target
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Scores:
    """What a sweep returns.

    Attributes:
        base: scores of the prompts as they are, ``[prompt, metric]``.
        rows: scores under each intervention, ``[intervention, metric]``.
    """

    base: Float[Tensor, "prompt metric"]
    rows: Float[Tensor, "intervention metric"]


@dataclass(frozen=True)
class _Run:
    """A prompt with the answer tokens that some metrics append, and what each of these reads."""

    prompt: int
    tokens: tuple[int, ...]
    readings: tuple[tuple[int, tuple[int, ...]], ...]  # (metric, positions in the tokens)


class Sweep:
    """Prompts made ready for interventions on them.

    Interventions must name their positions, so that appended answer tokens are never touched.

    Raises:
        TokenError: a prompt that does not fit the context together with its answer.
    """

    def __init__(self, model: HookedModel, prompts: Sequence[Scored]) -> None:
        self.model, self.prompts = model, list(prompts)
        self.runs = [run for i, item in enumerate(self.prompts) for run in _runs(i, item)]
        limit = int(model.cfg.n_ctx)
        for run in self.runs:
            if len(run.tokens) > limit:
                raise TokenError(
                    f"{len(run.tokens)} tokens of prompt and answer exceed the model's context of "
                    f"{limit}: {self.prompts[run.prompt].prompt.text[:60]!r}..."
                )
        self.batch: Batch = pad([run.tokens for run in self.runs])
        width = max(len({p for _, at in run.readings for p in at}) for run in self.runs)
        self.scored = [_filled(run, width) for run in self.runs]
        self._of_prompt: list[list[int]] = [[] for _ in self.prompts]
        for i, run in enumerate(self.runs):
            self._of_prompt[run.prompt].append(i)

    def expand(self, items: Sequence[Intervention]) -> tuple[list[Intervention], list[int]]:
        """One row for each run of an intervention's prompt, and the intervention of each row."""
        rows, origin = [], []
        for i, item in enumerate(items):
            for run in self._of_prompt[item.base]:
                rows.append(item if item.base == run else replace(item, base=run))
                origin.append(i)
        return rows, origin

    def plan(self, items: Sequence[Intervention], limits: Limits) -> list[Pass]:
        """The forward passes that `run` would make."""
        return plan_fan_out(
            self.model, self.batch, self.expand(items)[0], scored=self.scored,
            max_rows=limits.max_rows, memory=limits.memory, reuse_prefix=limits.reuse_prefix,
        )  # fmt: skip

    def run(
        self,
        items: Sequence[Intervention],
        limits: Limits | None = None,
        observe: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Scores:
        """Scores of all interventions, on the CPU, in float32 or the model's dtype if wider.

        Args:
            observe: hook name -> function of the prompts' own activation there, ``[prompt, pos,
                ...]``; positions behind a prompt are answer tokens and padding.

        Raises:
            ValueError: a score that is not finite; what `fanout.fan_out` and the metrics refuse.
        """
        limits = limits or Limits()
        rows, origin = self.expand(items)
        out: FanOut = fan_out(
            self.model, self.batch, rows, scored=self.scored, reduce=self._reduce(),
            max_rows=limits.max_rows, memory=limits.memory, reuse_prefix=limits.reuse_prefix,
            progress=limits.progress, observe=self._of_prompts(observe),
        )  # fmt: skip
        n_metrics = len(self.prompts[0].metrics)
        base = torch.full((len(self.prompts), n_metrics), float("nan"), dtype=out.base.dtype)
        for run, values in zip(self.runs, out.base, strict=True):
            read = [m for m, _ in run.readings]
            base[run.prompt, read] = values[read]
        found = torch.full((len(items), n_metrics), float("nan"), dtype=out.base.dtype)
        for i, row, values in zip(origin, rows, out.rows, strict=True):
            read = [m for m, _ in self.runs[row.base].readings]
            found[i, read] = values[read]
        for m, metric in enumerate(self.prompts[0].metrics):
            require_finite(metric.name, base[:, m])
            require_finite(metric.name, found[:, m])
        return Scores(base, found)

    def _of_prompts(
        self, observe: Mapping[str, Callable[[Tensor], None]] | None
    ) -> dict[str, Callable[[Tensor], None]]:
        firsts = [runs[0] for runs in self._of_prompt]

        def of_prompts(fn: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            return lambda x: fn(x[firsts])

        return {name: of_prompts(fn) for name, fn in (observe or {}).items()}

    def _reduce(self) -> Reduce:
        wide = wide_dtype(dtype_of(self.model))
        n_metrics = len(self.prompts[0].metrics)

        def reduce(logits: Tensor, bases: list[int]) -> Tensor:
            scores = torch.full((len(bases), n_metrics), float("nan"), dtype=wide)
            for run_index in sorted(set(bases)):
                rows = [r for r, b in enumerate(bases) if b == run_index]
                run = self.runs[run_index]
                item = self.prompts[run.prompt]
                # A whole pass of one prompt needs no copy of its logits.
                part = logits if len(rows) == len(bases) else logits[rows]
                for m, at in run.readings:
                    columns = [self.scored[run_index].index(p) for p in at]
                    read = part if columns == list(range(part.shape[1])) else part[:, columns]
                    values = item.metrics[m].score(read, item.target)
                    scores[rows, m] = values.detach().to("cpu", wide)
            return scores

        return reduce


def score(
    model: HookedModel, prompts: Sequence[Scored], batch_size: int = 64
) -> Float[Tensor, "prompt metric"]:
    """Scores of the prompts as they are."""
    parts = batched_with_oom_backoff(
        prompts, batch_size, lambda part: Sweep(model, part).run([]).base
    )
    return torch.cat([found for _, found in parts])


def score_and_capture(
    model: HookedModel, prompts: Sequence[Scored], names: Iterable[str]
) -> tuple[Float[Tensor, "prompt metric"], dict[str, Tensor]]:
    """Scores of the prompts as they are, and their activations at hook points, from one pass.

    Returns:
        ``(scores, {name: [prompt, pos, ...]})``, where positions (of a pattern: queries and keys)
        behind a prompt are answer tokens and padding.
    """
    store: dict[str, Tensor] = {}
    found = Sweep(model, prompts).run([], observe=keep_in(store, names))
    return found.base, store


def keep_in(
    store: dict[str, Tensor], names: Iterable[str], first: int = 0
) -> dict[str, Callable[[Tensor], None]]:
    """What to observe so that `store` holds the activations of the prompts from number `first` on."""

    def keep(name: str) -> Callable[[Tensor], None]:
        def fn(x: Tensor) -> None:
            store[name] = x[first:].detach()

        return fn

    return {name: keep(name) for name in names}


def _runs(index: int, item: Scored) -> list[_Run]:
    # Attention is causal, so a run that appends more tokens serves all that append a part of them.
    prompt = item.prompt
    plans = [metric.plan(item.target) for metric in item.metrics]
    runs: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for m in sorted(range(len(plans)), key=lambda m: -len(plans[m].extra)):
        extra = plans[m].extra
        serving = next((e for e in runs if e[: len(extra)] == extra), extra)
        at = tuple(prompt.last + s for s in plans[m].scored)
        runs.setdefault(serving, []).append((m, at))
    return [_Run(index, (*prompt.ids, *extra), tuple(readings)) for extra, readings in runs.items()]


def _filled(run: _Run, width: int) -> list[int]:
    """The positions a run reads; rows that read fewer repeat their last."""
    read = sorted({p for _, at in run.readings for p in at})
    return read + [read[-1]] * (width - len(read))
