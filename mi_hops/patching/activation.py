"""Activation patching: what changes in the answer if one activation is that of another run.

`patch` runs a *base* prompt and puts in activations of a *source* prompt, cell by cell. All cells
of a sweep go through the fan-out forward, so a layer x position grid is one pass or a few. Every
value equals that of one forward pass with one hook.

The effect is the share of the way from the base run to the other one (as the normalised logit
difference of Wang et al. 2022, arXiv 2211.00593, for any metric)::

    effect = (score - score of the base) / (score of the other run - score of the base)

so 0 means that nothing changed and 1 that the whole way was gone: restored when denoising (base =
corrupted), as broken as the corrupted run when noising (base = clean).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.layout import copied_bytes, pretransposed_weights
from mi_hops.patching.core import (
    Axes,
    Core,
    Values,
    captured,
    next_token_logits,
    put,
    resolve_metrics,
    scored,
    taken,
)
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import KL, MetricLike, Target, normalised
from mi_hops.sweep.pairs import (
    PositionsLike,
    Text,
    as_prompts,
    as_targets,
    resolve_spans,
)
from mi_hops.sweep.passes import row_bytes
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, HeadsLike, activation_width, build_grid, default_positions
from mi_hops.text.tokens import align

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.result.result import Result
    from mi_hops.sweep.interventions import Change

Direction = Literal["denoise", "noise"]


def patch(
    model: HookedModel,
    clean: Text | Sequence[Text],
    corrupted: Text | Sequence[Text],
    *,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] = "resid_pre",
    layers: Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    heads: HeadsLike = None,
    neurons: Sequence[int] | None = None,
    window: int = 1,
    metric: MetricLike | Sequence[MetricLike] = "logit_diff",
    direction: Direction = "denoise",
    source: Text | Sequence[Text] | None = None,
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    batch_size: int = 16,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Result:
    """Activation patching of every cell of a grid, in every pair of prompts.

    Args:
        clean, corrupted: one prompt each, or equally many.
        answer: the answer to the clean prompt, on which both runs are scored; one for all pairs or
            one each. None if no metric reads it.
        wrong: the competing answer, where the metric compares two (``logit_diff``).
        kinds: one activation kind of `fanout.HEAD_AXIS`, or several that share their axes (then
            the result has an axis ``kind``).
        layers: blocks to visit; default all.
        positions: where to patch (see `pairs.PositionsLike`); default every token by itself, for
            kinds with heads all tokens at once. A pair ``(from, to)`` takes from one place of the
            source prompt and puts at another of the base prompt. For ``pattern`` positions are
            those of the query.
        heads: for q, k, v, z and pattern: each head by itself (default), ``"all"`` at once, or
            those listed. Key/value heads are counted as they are (axis ``kv_head`` where there are
            fewer of them).
        neurons: for mlp_pre and mlp_post: hidden units to patch one by one; default all at once.
        window: blocks patched together, centred on the layer and cut off at the ends.
        metric: a metric, its name, a function ``[row, vocab] -> [row]`` of the last position's
            logits, ``"kl"`` (from the clean run's distribution, pair by pair), or several of these
            (then the result has an axis ``metric``).
        direction: ``"denoise"`` puts clean activations into the corrupted run, ``"noise"``
            corrupted ones into the clean run.
        source: take the activations from this third prompt (one, or one a pair) instead.
        examples: labels of the pairs; default their numbers.
        batch_size: pairs in one fan-out at the most; bounds the activations held.
        max_rows, memory: bounds of a pass, as in `fanout.fan_out`.

    Returns:
        `Result` on ``example``, then ``kind``, ``layer``, ``position``, ``head`` and ``metric`` as
        far as they vary, with ``effect`` (see above; NaN in examples whose two runs score the
        same, where it means nothing), ``score`` (the patched run's) and ``change`` (less the base
        run's); and per example the baselines ``clean`` and ``corrupted``. Nothing is averaged.

    Raises:
        ValueError: unequal numbers of prompts, an unknown kind or metric, a layer, head or neuron
            that does not exist, a metric of the wrong shape, scores that are not finite.
        TokenError: prompts or spans of unequal lengths, an absent span, an empty answer.
        MissingHookError: a hook point the model has not got.
    """
    job = PatchJob(
        model, clean, corrupted, answer=answer, wrong=wrong, kinds=kinds, layers=layers,
        positions=positions, heads=heads, neurons=neurons, window=window, metric=metric,
        direction=direction, source=source, prepend_bos=prepend_bos, batch_size=batch_size,
        limits=Limits(max_rows=max_rows, memory=memory, progress=progress),
    )  # fmt: skip
    return job.run(examples)


@dataclass(frozen=True)
class PatchPlan:
    """What a sweep will take, reckoned before anything runs.

    Attributes:
        cells: interventions in each pair.
        rows: rows of all passes beside those of the prompts themselves.
        forwards: forward passes in all, those that read activations and baselines included.
        widest: most intervention rows in one pass.
        activation_bytes: source activations held at once.
        pass_bytes: estimate for the widest pass, the rows of its prompts included.
        weight_bytes: copies of weights while the sweep runs (`mi_hops.model.layout`).
    """

    cells: int
    rows: int
    forwards: int
    widest: int
    activation_bytes: int
    pass_bytes: int
    weight_bytes: int

    @property
    def bytes(self) -> int:
        """Estimated peak beside the weights."""
        return self.activation_bytes + self.pass_bytes + self.weight_bytes


def plan_patch(
    model: HookedModel,
    clean: Text | Sequence[Text],
    corrupted: Text | Sequence[Text],
    *,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] = "resid_pre",
    layers: Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    heads: HeadsLike = None,
    neurons: Sequence[int] | None = None,
    window: int = 1,
    metric: MetricLike | Sequence[MetricLike] = "logit_diff",
    direction: Direction = "denoise",
    source: Text | Sequence[Text] | None = None,
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    batch_size: int = 16,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> PatchPlan:
    """Rows, forward passes and bytes of `patch` with the same arguments; nothing runs.

    `examples` and `progress` are taken so that the arguments of `patch` fit as they are.

    Raises:
        ValueError: what `patch` would refuse before running.
    """
    job = PatchJob(
        model, clean, corrupted, answer=answer, wrong=wrong, kinds=kinds, layers=layers,
        positions=positions, heads=heads, neurons=neurons, window=window, metric=metric,
        direction=direction, source=source, prepend_bos=prepend_bos, batch_size=batch_size,
        limits=Limits(max_rows=max_rows, memory=memory),
    )  # fmt: skip
    return job.plan()


class PatchJob:
    """A patching sweep with everything resolved and checked, before anything runs.

    Attributes:
        bases, sources: the prompts that are run and those that activations come from.
        spans, grid: where, and which cells.
    """

    def __init__(
        self,
        model: HookedModel,
        clean: Text | Sequence[Text],
        corrupted: Text | Sequence[Text],
        *,
        answer: str | Target | Sequence[str | Target] | None,
        wrong: str | Sequence[str] | None,
        kinds: str | Sequence[str],
        layers: Sequence[int] | None,
        positions: PositionsLike | None,
        heads: HeadsLike,
        neurons: Sequence[int] | None,
        window: int,
        metric: MetricLike | Sequence[MetricLike],
        direction: Direction,
        source: Text | Sequence[Text] | None,
        prepend_bos: bool,
        batch_size: int,
        limits: Limits,
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise ValueError(f"direction is {direction!r}; expected 'denoise' or 'noise'")
        self.model, self.direction, self.limits = model, direction, limits
        self.batch_size, self.window, self.prepend_bos = batch_size, window, prepend_bos
        self.third = source is not None
        self.clean = as_prompts(model, clean, prepend_bos=prepend_bos)
        self.corrupted = as_prompts(model, corrupted, prepend_bos=prepend_bos)
        n = len(self.clean)
        if len(self.corrupted) != n:
            raise ValueError(f"got {n} clean and {len(self.corrupted)} corrupted prompts")
        ends = (self.clean, self.corrupted)
        other, self.bases = ends if direction == "denoise" else ends[::-1]
        self.sources = other
        if source is not None:
            third = as_prompts(model, source, prepend_bos=prepend_bos)
            self.sources = third * n if len(third) == 1 else third
            if len(self.sources) != n:
                raise ValueError(f"got {len(third)} source prompts for {n} pairs; give one, or {n}")
        self.metrics, self.names, self.single = resolve_metrics(metric)
        self.clean_targets = as_targets(model, self.clean, answer, wrong, self.metrics)
        self.corrupted_targets = as_targets(model, self.corrupted, answer, wrong, self.metrics)
        where = default_positions(kinds) if positions is None else positions
        self.spans = resolve_spans(where, self.sources, self.bases)
        self.grid = build_grid(
            model, self.spans, kinds=kinds, layers=layers, heads=heads, neurons=neurons,
            window=window,
        )  # fmt: skip
        if "pattern" in self.grid.kinds:  # their keys correspond token by token
            for origin, base in zip(self.sources, self.bases, strict=True):
                align(origin, base)

    @classmethod
    def of_pairs(
        cls,
        model: HookedModel,
        clean: Text | Sequence[Text],
        corrupted: Text | Sequence[Text],
        *,
        answer: str | Target | Sequence[str | Target] | None,
        wrong: str | Sequence[str] | None,
        metric: MetricLike,
        direction: Direction,
        prepend_bos: bool,
        limits: Limits,
    ) -> PatchJob:
        """Pairs, answers and a metric for methods that have no cells, but nodes and edges.

        The grid is the embedding of all tokens, so the prompts must correspond token by token.
        """
        job = cls(
            model, clean, corrupted, answer=answer, wrong=wrong, kinds="resid_pre", layers=[0],
            positions="all", heads=None, neurons=None, window=1, metric=metric,
            direction=direction, source=None, prepend_bos=prepend_bos, batch_size=1, limits=limits,
        )  # fmt: skip
        job.require_one_metric()
        return job

    def require_one_metric(self) -> None:
        """Refuse a list of metrics.

        Raises:
            ValueError: naming them.
        """
        if not self.single:
            raise ValueError(f"expected one metric, got the list {self.names}; run each by itself")

    def require_gradient(self) -> None:
        """Refuse a metric whose gradient is 0 in a base run whatever the model does.

        Raises:
            ValueError: a divergence from the base run itself: ``"kl"`` where the base is the clean
                run, or a `KL` whose baseline is that of a base prompt.
        """
        metric, own = self.metrics[0], []
        if metric is None and self.direction == "noise":
            own = list(range(len(self.bases)))
        elif isinstance(metric, KL):
            logits = next_token_logits(self.model, self.bases)
            dtype = dtype_of(self.model)
            own = [i for i, x in enumerate(logits) if metric.measures_from(x.to(dtype))]
        if own:
            raise ValueError(
                f"metric 'kl' measures from the base run itself in {len(own)} of {len(self.bases)} "
                f"pairs (first: {own[:5]}; the name 'kl' measures from the clean run, which is the "
                "base where direction is 'noise'): there it is at its minimum, its gradient is 0, "
                "and estimates would rank rounding; average the gradient over the path "
                "(method='integrated', of edges steps=5), or take the other direction or metric"
            )

    def plan(self) -> PatchPlan:
        """Rows, passes and bytes; nothing runs."""
        baselines = None
        if None in self.metrics:  # any logits will do
            baselines = [torch.zeros(int(self.model.cfg.d_vocab))] * len(self.bases)
        core, others = self.core(baselines), self.other_scored(baselines)
        widest, fullest, rows, forwards, held = 0, 0, 0, 0, 0
        n_scored = 1
        width = max(len(p) for p in self.bases)
        for group in core.groups():
            riding = [] if self.third else [others[i] for i in group]
            sweep = Sweep(self.model, [*(core.bases[i] for i in group), *riding])
            items = core.interventions(group, _nothing)
            passes = sweep.plan(items, self.limits)
            most = max(len(p.members) for p in passes)
            widest, fullest = max(widest, most), max(fullest, most + len(sweep.runs))
            rows += sum(len(p.members) for p in passes)
            forwards += len(passes) + self.third  # a third source's activations
            longest = max(len(self.sources[i]) for i in group)
            held = max(held, len(group) * self._activation_bytes(longest))
            n_scored = max(n_scored, len(sweep.scored[0]))
            width = max(width, sweep.batch.tokens.shape[1])
        if self.third:
            forwards += math.ceil(len(self.clean) / self.batch_size)  # the other run's score
        if None in self.metrics:
            forwards += (len(self.clean) + 63) // 64
        return PatchPlan(
            cells=len(self.grid.cells),
            rows=rows,
            forwards=forwards,
            widest=widest,
            activation_bytes=held,
            pass_bytes=fullest * row_bytes(self.model, width, n_scored),
            weight_bytes=copied_bytes(self.model),
        )

    def run(self, examples: Sequence[str] | None = None) -> Result:
        """The sweep."""
        baselines = self.baselines()
        core = self.core(baselines)
        others = self.other_scored(baselines)
        with pretransposed_weights(self.model):
            if self.third:
                scores, base = core.run(self.values_of)
                other = score(self.model, others, batch_size=self.batch_size)
            else:
                scores, base, other = core.run_from(others, self._values)
        denoise = self.direction == "denoise"
        effect = normalised(scores, other[:, None], base[:, None], undefined="nan")
        change = scores - base[:, None]
        axes = Axes(
            self.grid, self.spans, self.bases, self.metrics, self.names, self.single, examples
        )
        taken_from = "a third prompt" if self.third else ("clean" if denoise else "corrupted")
        put_into = "corrupted" if denoise else "clean"
        return axes.result(
            self.model,
            {"effect": effect, "score": scores, "change": change},
            self.by_run(base, other),
            title=(
                f"Activation patching, {taken_from} into {put_into}: {', '.join(self.grid.kinds)}; "
                f"{', '.join(self.names)}"
            ),
            units={"effect": self.share},
            settings={
                "method": "activation patching", "direction": self.direction,
                "third_source": self.third, "window": self.window,
                "prepend_bos": self.prepend_bos,
            },
        )  # fmt: skip

    def baselines(self) -> list[Tensor] | None:
        """The clean logits that ``"kl"`` compares with; None where it is not asked for."""
        return next_token_logits(self.model, self.clean) if None in self.metrics else None

    def by_run(self, base: Tensor, other: Tensor) -> dict[str, Tensor]:
        """Scores of the base prompts and of the other run, under ``clean`` and ``corrupted``."""
        clean, corrupted = (other, base) if self.direction == "denoise" else (base, other)
        return {"clean": clean, "corrupted": corrupted}

    @property
    def share(self) -> str:
        """The unit of an effect."""
        return "share restored" if self.direction == "denoise" else "share lost"

    def other_scored(self, baselines: Sequence[Tensor] | None) -> list[Scored]:
        """The prompts of the run that the base is not, to be scored."""
        if self.direction == "denoise":
            return scored(self.clean, self.clean_targets, self.metrics, baselines)
        return scored(self.corrupted, self.corrupted_targets, self.metrics, baselines)

    def values_of(self, group: Sequence[int]) -> Values:
        """The source activations of some pairs, as the changes that cells make."""
        sources = [self.sources[i] for i in group]
        return self._values(group, captured(self.model, sources, self.grid.hook_names()))

    def _values(self, group: Sequence[int], store: Mapping[str, Tensor]) -> Values:
        order = {example: row for row, example in enumerate(group)}

        def values(example: int, cell: Cell, layer: int, sample: int) -> Change:
            where = self.spans.source[example][cell.span]

            def change(x: Tensor) -> Tensor:
                activation = store[hook_name(cell.kind, layer)][order[example]]
                return put(taken(activation, cell, where, len(self.sources[example])), cell)(x)

            return change

        return values

    def core(self, baselines: Sequence[Tensor] | None) -> Core:
        """The grid on the base prompts; `baselines` are the clean logits for ``"kl"``."""
        targets = self.corrupted_targets if self.direction == "denoise" else self.clean_targets
        bases = scored(self.bases, targets, self.metrics, baselines)
        return Core(self.model, bases, self.spans.base, self.grid, self.batch_size, self.limits)

    def _activation_bytes(self, length: int) -> int:
        """Of one source prompt, at all hook points that are read."""
        layers = {(cell.kind, layer) for cell in self.grid.cells for layer in cell.layers}
        size = dtype_of(self.model).itemsize
        return sum(activation_width(self.model, k, length) * length * size for k, _ in layers)


def _nothing(example: int, cell: Cell, layer: int, sample: int) -> Change:
    return lambda x: x
