"""One scored sweep: prompts x interventions x metrics, in fan-out passes.

Base prompts with their targets and metrics go in, interventions refer to them by number, and every
row is scored. A metric may append answer tokens to its prompt; attention is causal, so one run
serves every metric whose tokens it starts with, and a metric whose tokens differ gets a run of its
own. Scores are in float32, or in the model's dtype where that is wider.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of
from mi_hops.model.hooks import storing
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.lean import lean_blocks
from mi_hops.model.numeric import wide_dtype
from mi_hops.model.shortcuts import is_touched
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.fanout import fan_out, plan_fan_out
from mi_hops.sweep.interventions import Intervention
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Metric, Target, require_finite
from mi_hops.sweep.passes import Pass
from mi_hops.text.tokens import Batch, Prompt, pad, require_room


@dataclass(frozen=True)
class Scored:
    """A prompt and what it is scored on.

    Attributes:
        metrics: as many for every prompt of a sweep, in one order; their arguments may differ.
    """

    prompt: Prompt
    target: Target
    metrics: tuple[Metric, ...]


# -- which runs serve which prompts and metrics ----------------------------------------------------


@dataclass
class Run:
    """A prompt with appended answer tokens.

    Attributes:
        prompt: index of (the first of) the prompts it serves.
        readings: (prompt, metric, positions in `tokens`) of each score that is read from it.
    """

    prompt: int
    tokens: tuple[int, ...]
    readings: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        """Every position that is read, in order."""
        return sorted({p for _, _, at in self.readings for p in at})

    def scored(self, width: int) -> list[int]:
        """The positions, made `width` many by repeating the last."""
        read = self.positions
        return read + [read[-1]] * (width - len(read))

    def scores(
        self, logits: Float[Tensor, "row scored vocab"], prompts: Sequence[Scored]
    ) -> Iterator[tuple[int, int, Float[Tensor, "row"]]]:
        """(prompt, metric, score of each row), from the logits at `positions` (or `scored`)."""
        column = {p: i for i, p in enumerate(self.positions)}
        for prompt, metric, at in self.readings:
            columns = [column[p] for p in at]
            # Most metrics read everything there is, which needs no copy.
            read = logits if columns == list(range(logits.shape[1])) else logits[:, columns]
            item = prompts[prompt]
            yield prompt, metric, item.metrics[metric].score(read, item.target)


def plan_runs(model: HookedModel, prompts: Sequence[Scored], keys: Sequence[Hashable]) -> list[Run]:
    """The fewest runs that serve all metrics of all prompts.

    Where the model has hooks of the user's, which may look at any position, nothing is read before
    the end of a run.

    Args:
        keys: one per prompt; prompts of one key have the same tokens and may share runs.

    Raises:
        TokenError: a prompt that does not fit the context together with its answer.
    """
    asked: dict[Hashable, list[tuple[tuple[int, ...], int, int, tuple[int, ...]]]] = {}
    for i, (item, key) in enumerate(zip(prompts, keys, strict=True)):
        for m, metric in enumerate(item.metrics):
            plan = metric.plan(item.target)
            at = tuple(item.prompt.last + s for s in plan.scored)
            asked.setdefault(key, []).append((plan.extra, i, m, at))
    runs: list[Run] = []
    touched = is_touched(model)
    for wanted in asked.values():
        serving: dict[tuple[int, ...], Run] = {}  # appended tokens, and every start of them
        for extra, i, m, at in sorted(wanted, key=lambda w: -len(w[0])):
            if extra not in serving:
                prompt = prompts[i].prompt
                require_room(model, prompt.text, len(prompt), len(extra), "of its answer")
                run = Run(i, (*prompt.ids, *extra))
                runs.append(run)
                for end in range(len(extra) * touched, len(extra) + 1):
                    serving.setdefault(extra[:end], run)
            serving[extra].readings.append((i, m, at))
    return runs


# -- interventions on prompts that share their passes ----------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What a sweep returns.

    Attributes:
        base: scores of the prompts as they are.
        rows: scores under each intervention.
    """

    base: Float[Tensor, "prompt metric"]
    rows: Float[Tensor, "intervention metric"]


class Sweep:
    """Prompts made ready for interventions on them, all in one batch.

    An intervention that names its positions never touches appended answer tokens; one that names
    none acts on them as well.

    Raises:
        TokenError: a prompt that does not fit the context together with its answer.
    """

    def __init__(self, model: HookedModel, prompts: Sequence[Scored]) -> None:
        self.model, self.prompts = model, list(prompts)
        self.runs = plan_runs(model, self.prompts, range(len(self.prompts)))
        self.batch: Batch = pad([run.tokens for run in self.runs])
        width = max(len(run.positions) for run in self.runs)
        self.scored = [run.scored(width) for run in self.runs]
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
        rows, _ = self.expand(items)
        return plan_fan_out(self.model, self.batch, rows, scored=self.scored, limits=limits)

    def run(
        self,
        items: Sequence[Intervention],
        limits: Limits | None = None,
        observe: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Scores:
        """Scores of all interventions, on the CPU.

        Args:
            observe: hook name -> function of the prompts' own activation there, ``[prompt, pos,
                ...]``; positions behind a prompt are answer tokens and padding.

        Raises:
            ValueError: a score that is not finite; what `fanout.fan_out` and the metrics refuse.
        """
        firsts = [runs[0] for runs in self._of_prompt]

        def of_prompts(fn: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
            return lambda x: fn(x[firsts])

        rows, origin = self.expand(items)
        out = fan_out(
            self.model,
            self.batch,
            rows,
            scored=self.scored,
            reduce=self._reduce,
            limits=limits or Limits(),
            observe={name: of_prompts(fn) for name, fn in (observe or {}).items()},
        )
        n_metrics = len(self.prompts[0].metrics)
        base = out.base.new_full((len(self.prompts), n_metrics), float("nan"))
        for run, values in zip(self.runs, out.base, strict=True):
            read = [m for _, m, _ in run.readings]
            base[run.prompt, read] = values[read]
        found = out.base.new_full((len(items), n_metrics), float("nan"))
        for i, row, values in zip(origin, rows, out.rows, strict=True):
            read = [m for _, m, _ in self.runs[row.base].readings]
            found[i, read] = values[read]
        for m, metric in enumerate(self.prompts[0].metrics):
            require_finite(metric.name, base[:, m])
            require_finite(metric.name, found[:, m])
        return Scores(base, found)

    def _reduce(self, logits: Tensor, bases: list[int]) -> Tensor:
        n_metrics = len(self.prompts[0].metrics)
        wide = wide_dtype(dtype_of(self.model))
        scores = torch.full((len(bases), n_metrics), float("nan"), dtype=wide)
        for index in sorted(set(bases)):
            rows = [r for r, b in enumerate(bases) if b == index]
            # A whole pass of one prompt needs no copy of its logits.
            part = logits if len(rows) == len(bases) else logits[rows]
            for _, metric, values in self.runs[index].scores(part, self.prompts):
                scores[rows, metric] = values.detach().to("cpu", wide)
        return scores


# -- many prompts, a few of them at a time ---------------------------------------------------------

#: (index of the prompt, its base row, activations of the sources) -> the prompt's interventions.
RowsOf = Callable[[int, int, Mapping[str, Tensor]], Sequence[Intervention]]


@dataclass(frozen=True)
class SweepScores:
    """What `run_sweep` returns.

    Attributes:
        base: scores of the prompts as they are.
        rows: for each prompt, the scores under its interventions, ``[intervention, metric]``.
        sources: scores of the source prompts, where there are any.
    """

    base: Float[Tensor, "prompt metric"]
    rows: list[Float[Tensor, "intervention metric"]]
    sources: Float[Tensor, "source metric"]


def run_sweep(
    model: HookedModel,
    prompts: Sequence[Scored],
    rows_of: RowsOf,
    *,
    limits: Limits,
    sources: Sequence[Scored] = (),
    names: Iterable[str] = (),
    label: str = "prompts",
) -> SweepScores:
    """Every prompt under its own interventions; a part that runs out of memory is halved.

    Args:
        rows_of: makes a prompt's interventions. Its third argument is a mapping that holds, by the
            time a change acts, the sources' activations at `names`, ``[base row, pos, ...]``.
        sources: one prompt for each of `prompts` to take activations from; it is run in the pass of
            its prompt, so its activations cost no pass of their own.
        names: hook names at which the sources' activations are wanted.
        label: of the progress bar.

    Raises:
        ValueError: a score that is not finite; what `fanout.fan_out` and the metrics refuse.
        TokenError: a prompt that does not fit the context together with its answer.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prompt), i))
    many = limits.progress and len(order) > limits.batch_size
    inner = replace(limits, progress=limits.progress and not many)
    wanted = list(names)

    def run(group: Sequence[int]) -> list[Any]:
        sweep = Sweep(
            model, [*(prompts[i] for i in group), *(sources[i] for i in group if sources)]
        )
        shown: dict[str, Tensor] = {}
        items = [item for base, i in enumerate(group) for item in rows_of(i, base, shown)]
        counts = [sum(item.base == base for item in items) for base in range(len(group))]
        shows = storing(shown, wanted, lambda x: x[len(group) :].detach()) if sources else []
        found = sweep.run(items, inner, dict(shows))
        return [counts, found.base, found.rows]

    said = [(s.prompt.ids, s.target.answer, [m.name for m in s.metrics]) for s in prompts]
    beside = [s.prompt.ids for s in sources]
    rows: dict[int, Tensor] = {}
    base: dict[int, Tensor] = {}
    others: dict[int, Tensor] = {}
    with (
        pretransposed_weights(model),  # once, not in every pass
        lean_blocks(model),
        progress_bar(label=label, show=many, total=len(order)) as bar,
    ):
        parts = batched_with_oom_backoff(
            order,
            limits.batch_size,
            run,
            kept=(label, said, beside, wanted, replace(limits, progress=False)),
            model=model,
            texts=lambda group: [prompts[i].prompt.text for i in group],
            around=(pretransposed_weights, lean_blocks),
        )
        for group, (counts, bases, scores) in parts:
            rows |= zip(group, scores.split(counts), strict=True)
            base |= zip(group, bases[: len(group)], strict=True)
            if sources:
                others |= zip(group, bases[len(group) :], strict=True)
            bar.update(len(group))
    every = range(len(prompts))
    return SweepScores(
        torch.stack([base[i] for i in every]),
        [rows[i] for i in every],
        torch.stack([others[i] for i in every]) if sources else torch.empty(0),
    )


def score_and_capture(
    model: HookedModel, prompts: Sequence[Scored], names: Iterable[str]
) -> tuple[Float[Tensor, "prompt metric"], dict[str, Tensor]]:
    """Scores of the prompts as they are, and their activations at hook points, from one pass.

    Returns:
        ``(scores, {name: [prompt, pos, ...]})``, where positions (of a pattern: queries and keys)
        behind a prompt are answer tokens and padding.
    """
    store: dict[str, Tensor] = {}
    found = Sweep(model, prompts).run([], observe=dict(storing(store, names, Tensor.detach)))
    return found.base, store
