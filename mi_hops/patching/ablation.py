"""Ablation: what changes in the answer if one activation is taken away.

Zeros, means over reference prompts, or another prompt's activation take its place, cell by cell,
in fan-out passes. Zeros lie far from anything the model has seen; means and resamples are milder
(Heimersheim and Nanda 2024, arXiv 2404.15255, compare them).

The effect is the share of the score that is lost, of what there is to lose::

    effect = (intact score - ablated score) / (intact score - score where all is lost)

so 0 means that nothing changed and 1 that all is lost; below 0 the ablation helps. All is lost where
corrupted prompts score (then effects compare with those of `patch` in direction ``"noise"``), or,
where none are given, at a score of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import (
    Axes,
    Core,
    Values,
    ValuesOf,
    captured,
    put,
    resolve_metrics,
    scored_alone,
    taken,
    units_of,
)
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.interventions import HEAD_AXIS
from mi_hops.sweep.interventions import ablate as zero
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Metric, MetricLike, Target, normalised
from mi_hops.sweep.pairs import (
    PositionsLike,
    Spans,
    Text,
    as_prompts,
    as_targets,
    one_each,
    resolve_spans,
)
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, Grid, HeadsLike, build_grid, default_positions
from mi_hops.text.tokens import Prompt, TokenError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.result.result import Result
    from mi_hops.sweep.interventions import Change

How = Literal["zero", "mean", "position_mean", "resample"]


def ablate(
    model: HookedModel,
    prompts: Text | Sequence[Text],
    *,
    answer: str | Target | Sequence[str | Target] | None = None,
    wrong: str | Sequence[str] | None = None,
    how: How = "mean",
    reference: Text | Sequence[Text] | None = None,
    corrupted: Text | Sequence[Text] | None = None,
    samples: int = 1,
    seed: int = 0,
    kinds: str | Sequence[str] = "attn_out",
    layers: Sequence[int] | None = None,
    positions: PositionsLike | None = None,
    heads: HeadsLike = None,
    neurons: Sequence[int] | None = None,
    window: int = 1,
    metric: MetricLike | Sequence[MetricLike] = "logit_diff",
    examples: Sequence[str] | None = None,
    prepend_bos: bool = True,
    batch_size: int = 16,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Result:
    """Ablation of every cell of a grid, in every prompt; other arguments as in `activation.patch`.

    Args:
        how: ``"zero"``; ``"mean"``, over all tokens of the reference prompts but BOS, one vector
            for every position; ``"position_mean"``, over the reference prompts at the same span;
            ``"resample"``, the activation at the same span of `samples` other reference prompts,
            drawn without replacement, and the scores averaged.
        reference: prompts that means and resamples come from; default `prompts` themselves. A
            prompt is never its own resample.
        corrupted: prompts, one or one each, on which the answer counts as lost; only scored.
        seed: of the draws.

    Returns:
        `Result` on the axes of `patch` with ``change`` (the ablated run's score less the intact
        one's: negative where the activation helps, if higher is better), ``score`` and ``effect``
        (see above); and per example the baseline ``intact``, with corrupted prompts also
        ``corrupted``. ``effect`` is NaN where intact and corrupted score the same. Without
        corrupted prompts it is NaN where 0 does not mean that all is lost: for metrics in other
        units than probability, share and logits (0 nats or a rank are no loss), and in examples
        whose intact score is not above 0.

    Raises:
        ValueError: as in `patch`; a mean over tokens of attention patterns (their rows differ in
            length) or over one prompt at its own span; fewer other prompts than samples; another
            number of corrupted prompts than one, or one each.
        TokenError: spans of unequal lengths in prompts and reference.
    """
    if how not in ("zero", "mean", "position_mean", "resample"):
        raise ValueError(f"how is {how!r}; expected 'zero', 'mean', 'position_mean' or 'resample'")
    if samples < 1 or (samples > 1 and how != "resample"):
        raise ValueError(f"samples is {samples}; expected at least 1, and 1 unless resampling")
    bases = as_prompts(model, prompts, prepend_bos=prepend_bos)
    where = default_positions(kinds) if positions is None else positions
    spans = resolve_spans(where, bases, bases)
    grid = build_grid(
        model, spans, kinds=kinds, layers=layers, heads=heads, neurons=neurons, window=window
    )
    metrics, names, single = resolve_metrics(metric)
    prompts_scored = scored_alone(model, bases, answer, wrong, metrics)
    spoiled = None
    if corrupted is not None:
        given = one_each("corrupted prompts", corrupted, len(bases))
        worse = as_prompts(model, given, prepend_bos=prepend_bos)
        targets = as_targets(model, worse, answer, wrong, metrics)
        spoiled = [
            replace(item, prompt=prompt, target=target)
            for item, prompt, target in zip(prompts_scored, worse, targets, strict=True)
        ]
    others = bases if reference is None else as_prompts(model, reference, prepend_bos=prepend_bos)
    values_of: ValuesOf
    if how == "zero":
        values_of = _zeros
    elif how == "mean":
        values_of = _means(model, others, grid, batch_size)
    else:
        other_spans = spans if reference is None else resolve_spans(where, others, others)
        if how == "position_mean" and reference is None and len(bases) < 2:
            raise ValueError(
                "the mean over one prompt at its own span is its own activation, so ablating would "
                "change nothing; pass more prompts or a reference, or take how='mean'"
            )
        if how == "position_mean":
            _check_lengths(grid, spans, bases, other_spans, others)
            values_of = _position_means(model, others, other_spans, grid, batch_size)
        else:
            drawn = _draws(len(bases), len(others), samples, seed, own=reference is None)
            _check_lengths(grid, spans, bases, other_spans, others, drawn)
            values_of = _resamples(model, others, other_spans, grid, drawn)
    core = Core(
        model, prompts_scored, spans.base, grid, batch_size,
        Limits(max_rows=max_rows, memory=memory, progress=progress),
    )  # fmt: skip
    scores, intact = core.run(values_of, samples)
    baselines = {"intact": intact}
    if spoiled is not None:
        baselines["corrupted"] = score(model, spoiled, batch_size=batch_size)
    lost = baselines.get("corrupted", _zero(intact, metrics))
    effect = normalised(scores, lost[:, None], intact[:, None], undefined="nan")
    axes = Axes(grid, spans, bases, metrics, names, single, examples)
    return axes.result(
        model,
        {"change": scores - intact[:, None], "score": scores, "effect": effect},
        baselines,
        title=f"Ablation ({how.replace('_', ' ')}): {', '.join(grid.kinds)}; {', '.join(names)}",
        units={"effect": "share lost"},
        settings={
            "method": "ablation", "how": how, "samples": samples, "seed": seed, "window": window,
            "n_reference": len(others), "prepend_bos": prepend_bos,
        },
    )  # fmt: skip


# -- where all is lost ----------------------------------------------------------------------------


#: Units in which a score of 0 says that nothing is left of the answer.
_NOTHING_LEFT_AT_0 = ("probability", "share", "logits")


def _zero(
    intact: Float[Tensor, "example metric"], metrics: Sequence[Metric | None]
) -> Float[Tensor, "example metric"]:
    """0 where an example has something to lose down to there, else NaN."""
    meant = torch.tensor([unit in _NOTHING_LEFT_AT_0 for unit in units_of(metrics)])
    return torch.zeros_like(intact).masked_fill_(~(meant & (intact > 0)), float("nan"))


# -- what takes the place of an activation --------------------------------------------------------


def _zeros(group: Sequence[int]) -> Values:
    def values(example: int, cell: Cell, layer: int, sample: int) -> Change:
        return zero() if cell.neuron is None else put(torch.zeros(()), cell)

    return values


def _means(model: HookedModel, others: Sequence[Prompt], grid: Grid, batch_size: int) -> ValuesOf:
    """One mean vector a hook point, over all tokens but BOS."""
    if any(HEAD_AXIS[kind] == 1 for kind in grid.kinds):
        raise ValueError(
            "the rows of an attention pattern differ in length from token to token, so they have no "
            "mean; use how='position_mean' with prompts of one length, 'zero' or 'resample'"
        )
    wide = wide_dtype(dtype_of(model))
    sums: dict[str, Tensor] = {}
    count = 0
    names = grid.hook_names()
    for part, found in batched_with_oom_backoff(
        others, batch_size, lambda part: captured(model, part, names)
    ):
        for row, prompt in enumerate(part):
            first = int(prompt.has_bos and len(prompt) > 1)
            count += len(prompt) - first
            for name, activation in found.items():
                total = activation[row, first : len(prompt)].to(wide).sum(0)
                sums[name] = sums[name] + total if name in sums else total
    means = {name: total / count for name, total in sums.items()}

    def values(example: int, cell: Cell, layer: int, sample: int) -> Change:
        mean = means[hook_name(cell.kind, layer)]
        return put(mean if cell.unit is None else mean[cell.unit], cell)

    return lambda group: values


def _position_means(
    model: HookedModel, others: Sequence[Prompt], spans: Spans, grid: Grid, batch_size: int
) -> ValuesOf:
    """A mean for each hook point and span, over the reference prompts."""
    wide = wide_dtype(dtype_of(model))
    sums: dict[tuple[str, int], Tensor] = {}
    whole = {(cell.kind, layer, cell.span) for cell in grid.cells for layer in cell.layers}
    placed = list(zip(others, spans.base, strict=True))

    def run(part: Sequence[tuple[Prompt, Any]]) -> dict[str, Tensor]:
        return captured(model, [prompt for prompt, _ in part], grid.hook_names())

    for part, found in batched_with_oom_backoff(placed, batch_size, run):
        for row, (prompt, where) in enumerate(part):
            for kind, layer, span in whole:
                name = hook_name(kind, layer)
                every_head = Cell(kind, (layer,), span)
                value = taken(found[name][row], every_head, where[span], len(prompt)).to(wide)
                key = (name, span)
                sums[key] = sums[key] + value if key in sums else value
    means = {key: total / len(others) for key, total in sums.items()}

    def values(example: int, cell: Cell, layer: int, sample: int) -> Change:
        mean = means[hook_name(cell.kind, layer), cell.span]
        if cell.unit is not None:
            mean = mean[cell.unit] if HEAD_AXIS[cell.kind] == 1 else mean[:, cell.unit]
        return put(mean, cell)

    return lambda group: values


def _resamples(
    model: HookedModel,
    others: Sequence[Prompt],
    spans: Spans,
    grid: Grid,
    drawn: Sequence[Sequence[int]],
) -> ValuesOf:
    def values_of(group: Sequence[int]) -> Values:
        needed = sorted({other for example in group for other in drawn[example]})
        store = captured(model, [others[i] for i in needed], grid.hook_names())
        row = {other: i for i, other in enumerate(needed)}

        def values(example: int, cell: Cell, layer: int, sample: int) -> Change:
            other = drawn[example][sample]
            activation = store[hook_name(cell.kind, layer)][row[other]]
            where = spans.base[other][cell.span]
            return put(taken(activation, cell, where, len(others[other])), cell)

        return values

    return values_of


def _draws(n: int, n_others: int, samples: int, seed: int, *, own: bool) -> list[list[int]]:
    """`samples` reference prompts for each example, none of them itself."""
    available = n_others - own
    if available < samples:
        raise ValueError(
            f"{samples} sample(s) a prompt need as many other prompts, and there are {available}; "
            "pass more prompts, or a reference set"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for example in range(n):
        order = torch.randperm(n_others, generator=generator).tolist()
        drawn.append([i for i in order if not (own and i == example)][:samples])
    return drawn


def _check_lengths(
    grid: Grid,
    spans: Spans,
    bases: Sequence[Prompt],
    other_spans: Spans,
    others: Sequence[Prompt],
    drawn: Sequence[Sequence[int]] | None = None,
) -> None:
    """Every span must have as many tokens where it is taken from as where it is put."""
    by_token = any(HEAD_AXIS[kind] == 1 for kind in grid.kinds)
    if spans.labels != other_spans.labels:
        raise TokenError(
            f"the prompts have {len(bases[0])} positions and the reference {len(others[0])}, which do "
            "not correspond; name positions that all have, e.g. positions={'last': -1}"
        )
    for example, base in enumerate(bases):
        for other in range(len(others)) if drawn is None else drawn[example]:
            for s, label in enumerate(spans.labels):
                here, there = len(spans.base[example][s]), len(other_spans.base[other][s])
                if here != there:
                    raise TokenError(
                        f"position {label!r} covers {here} token(s) of {base.text!r} and {there} of "
                        f"{others[other].text!r}; name a position with equally many in all"
                    )
            if by_token and len(base) != len(others[other]):
                raise TokenError(
                    f"attention patterns of {len(base)} and {len(others[other])} tokens do not "
                    "correspond; use prompts of one length"
                )
