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

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from mi_hops.model import HookedModel, dtype_of, hook_name
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import (
    ChangeOf,
    ChangesOf,
    GridSweep,
    Metrics,
    put,
    require_effect,
    taken,
)
from mi_hops.result.result import Result
from mi_hops.sweep.batching import each_captured
from mi_hops.sweep.interventions import HEAD_AXIS, Change, zero
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike
from mi_hops.sweep.normalising import normalised
from mi_hops.sweep.pairs import Pairs, PairsLike, Texts, as_prompts
from mi_hops.sweep.scoring import score
from mi_hops.sweep.sites import Cell, Grid, Sites, SitesLike
from mi_hops.text.tokens import Prompt, TokenError

How = Literal["zero", "mean", "position_mean", "resample"]


def ablate(
    model: HookedModel,
    pairs: PairsLike,
    sites: SitesLike = "attn_out",
    *,
    how: How = "mean",
    reference: Texts | None = None,
    samples: int = 1,
    seed: int = 0,
    metric: MetricLike | Sequence[MetricLike] = "logit_diff",
    limits: Limits | None = None,
) -> Result:
    """Ablate every cell of a grid in every clean prompt; other arguments as in `patch`.

    Args:
        pairs: clean prompts with their answers, ``Pairs(prompts, answer=...)``. Corrupted prompts
            are those on which the answer counts as lost; they are only scored.
        how: ``"zero"``; ``"mean"``, over all tokens of the reference prompts but BOS, one vector
            for every position; ``"position_mean"``, over the reference prompts at the same span;
            ``"resample"``, the activation at the same span of `samples` other reference prompts,
            drawn without replacement, and the scores averaged.
        reference: prompts that means and resamples come from; default the clean prompts themselves.
            A prompt is never its own resample.
        seed: of the draws.

    Returns:
        `Result` on the axes of `patch` with ``change`` (the ablated run's score less the intact
        one's: negative where the activation helps, if higher is better), ``score`` and ``effect``
        (see above); and per example the baseline ``intact``, with corrupted prompts also
        ``corrupted``. ``effect`` is NaN where intact and corrupted score the same. Without
        corrupted prompts it is NaN where 0 does not mean that all is lost: for metrics in other
        units than probability, share and logits (0 nats or a rank are no loss), and in examples
        whose intact score is not above 0; if it would be NaN everywhere, it is left out.

    Raises:
        ValueError: as in `patch`; a mean over tokens of attention patterns (their rows differ in
            length) or over one prompt at its own span; fewer other prompts than samples.
        TokenError: spans of unequal lengths in prompts and reference.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:3]
        >>> asked = mi_hops.Pairs([f.prompt() for f in facts], answer=[f.answer for f in facts])
        >>> mi_hops.ablate(model, asked, "z", metric="first_prob")["change"].dims
        ('example', 'layer', 'head')
    """
    if how not in ("zero", "mean", "position_mean", "resample"):
        raise ValueError(f"how is {how!r}; expected 'zero', 'mean', 'position_mean' or 'resample'")
    if samples < 1 or (samples > 1 and how != "resample"):
        raise ValueError(f"samples is {samples}; expected at least 1, and 1 unless resampling")
    pairs, sites, limits = Pairs.of(pairs), Sites.of(sites), limits or Limits()
    bases = as_prompts(model, pairs.clean)
    grid = sites.grid(model, bases)
    metrics = Metrics.of(metric)
    targets = pairs.targets(model, bases, metrics.reading_answers)
    baselines = metrics.baselines(model, bases)
    scored = metrics.scored(bases, targets, baselines)
    corrupted = as_prompts(model, pairs.corrupted) if pairs.corrupted else []
    worse = []
    if corrupted:
        pairs.require_different(bases, corrupted)
        targets = pairs.targets(model, corrupted, metrics.reading_answers)
        worse = metrics.scored(corrupted, targets, baselines)
    sweep = GridSweep(model, bases, grid, metrics, pairs.labels, limits)
    own = reference is None
    others = bases if reference is None else as_prompts(model, reference)
    changes_of: ChangesOf = _zeros
    if how == "mean":
        changes_of = _means(model, others, grid, limits.batch_size)
    elif how != "zero":
        there = grid if own else sites.grid(model, others)
        drawn = None
        if how == "resample":
            drawn = _draws(len(bases), len(others), samples, seed, own=own)
        elif own and len(bases) < 2:
            raise ValueError(
                "the mean over one prompt at its own span is its own activation, so ablating would "
                "change nothing; pass more prompts or a reference, or take how='mean'"
            )
        _check_lengths(grid, bases, there, others, drawn)
        if drawn is None:
            changes_of = _position_means(model, others, there, limits.batch_size)
        else:
            changes_of = _resamples(model, others, there, drawn, sweep.groups())
    scores, intact, _ = sweep.run(scored, changes_of, samples=samples)
    lost = score(model, worse, batch_size=limits.batch_size) if worse else _zero(intact, metrics)
    effect = normalised(scores, lost[:, None], intact[:, None], undefined="nan")
    values = {"change": scores - intact[:, None], "score": scores}
    if worse:
        require_effect(effect, "the clean and the corrupted prompts score the same in every pair")
    if not effect.isnan().all():
        values["effect"] = effect
    return sweep.result(
        values,
        {"intact": intact, **({"corrupted": lost} if worse else {})},
        title=f"Ablation ({how.replace('_', ' ')}): {', '.join(grid.kinds)}; {', '.join(metrics.names)}",
        units={"effect": "share lost"},
        skipped=pairs.skipped,
        method="ablation",
        how=how,
        samples=samples,
        seed=seed,
        window=sites.window,
        n_reference=len(others),
    )


# -- where all is lost ----------------------------------------------------------------------------


#: Units in which a score of 0 says that nothing is left of the answer.
_NOTHING_LEFT_AT_0 = ("probability", "share", "logits")


def _zero(
    intact: Float[Tensor, "example metric"], metrics: Metrics
) -> Float[Tensor, "example metric"]:
    """0 where an example has something to lose down to there, else NaN."""
    meant = torch.tensor([unit in _NOTHING_LEFT_AT_0 for unit in metrics.units])
    return torch.zeros_like(intact).masked_fill_(~(meant & (intact > 0)), float("nan"))


# -- what takes the place of an activation --------------------------------------------------------


def _zeros(example: int, row: int, shown: Mapping[str, Tensor]) -> ChangeOf:
    def change_of(cell: Cell, layer: int, sample: int) -> Change:
        return zero() if cell.neuron is None else put(torch.zeros(()), cell)

    return change_of


def _means(model: HookedModel, others: Sequence[Prompt], grid: Grid, batch_size: int) -> ChangesOf:
    """One mean vector per hook point, over all tokens but BOS."""
    if any(HEAD_AXIS[kind] == 1 for kind in grid.acting):
        raise ValueError(
            "the rows of an attention pattern differ in length from token to token, so they have no "
            "mean; use how='position_mean' with prompts of one length, 'zero' or 'resample'"
        )
    wide = wide_dtype(dtype_of(model))
    sums: dict[str, Tensor] = {}
    count = 0
    names = grid.hook_names()
    for i, found in each_captured(model, others, names, batch_size):
        n, first = len(others[i]), int(others[i].has_bos and len(others[i]) > 1)
        count += n - first
        for name, activation in found.items():
            total = reduce(activation[first:n].to(wide), "pos ... -> ...", "sum")
            sums[name] = sums[name] + total if name in sums else total
    means = {name: total / count for name, total in sums.items()}

    def change_of(cell: Cell, layer: int, sample: int) -> Change:
        mean = means[hook_name(cell.kind, layer)]
        return put(mean if cell.unit is None else mean[cell.unit], cell)

    return lambda example, row, shown: change_of


def _position_means(
    model: HookedModel, others: Sequence[Prompt], grid: Grid, batch_size: int
) -> ChangesOf:
    """A mean for each hook point and span, over the reference prompts."""
    wide = wide_dtype(dtype_of(model))
    sums: dict[tuple[str, int], Tensor] = {}
    whole = {(cell.kind, layer, cell.span) for cell in grid.cells for layer in cell.layers}
    for i, found in each_captured(model, others, grid.hook_names(), batch_size):
        for kind, layer, span in whole:
            name = hook_name(kind, layer)
            every_head = Cell(kind, (layer,), span)
            value = taken(found[name], every_head, grid.base[i][span], len(others[i])).to(wide)
            key = (name, span)
            sums[key] = sums[key] + value if key in sums else value
    means = {key: total / len(others) for key, total in sums.items()}

    def change_of(cell: Cell, layer: int, sample: int) -> Change:
        mean = means[hook_name(cell.kind, layer), cell.span]
        if cell.unit is not None:
            mean = mean[cell.unit] if HEAD_AXIS[cell.kind] == 1 else mean[:, cell.unit]
        return put(mean, cell)

    return lambda example, row, shown: change_of


def _resamples(
    model: HookedModel,
    others: Sequence[Prompt],
    grid: Grid,
    drawn: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
) -> ChangesOf:
    """Activations of the reference prompts that were drawn, captured for a group of examples."""
    group_of = {example: group for group in groups for example in group}
    held: dict[int, dict[str, Tensor]] = {}
    names = grid.hook_names()

    def changes_of(example: int, row: int, shown: Mapping[str, Tensor]) -> ChangeOf:
        if not held.keys() >= set(drawn[example]):
            held.clear()
            needed = sorted({other for i in group_of[example] for other in drawn[i]})
            prompts = [others[i] for i in needed]
            for i, found in each_captured(model, prompts, names, len(needed)):
                held[needed[i]] = found
        own = [held[other] for other in drawn[example]]

        def change_of(cell: Cell, layer: int, sample: int) -> Change:
            other, activation = drawn[example][sample], own[sample][hook_name(cell.kind, layer)]
            where = grid.base[other][cell.span]
            return put(taken(activation, cell, where, len(others[other])), cell)

        return change_of

    return changes_of


def _draws(n: int, n_others: int, samples: int, seed: int, *, own: bool) -> list[list[int]]:
    """`samples` reference prompts for each example, none of them itself."""
    available = n_others - own
    if available < samples:
        raise ValueError(
            f"{samples} sample(s) per prompt need as many other prompts, and there are {available}; "
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
    bases: Sequence[Prompt],
    there: Grid,
    others: Sequence[Prompt],
    drawn: Sequence[Sequence[int]] | None,
) -> None:
    """Every span must have as many tokens where it is taken from as where it is put."""
    if grid.labels != there.labels:
        raise TokenError(
            f"the prompts have {len(bases[0])} positions and the reference {len(others[0])}, which do "
            "not correspond; name positions that all have, e.g. positions={'last': -1}"
        )
    for example, base in enumerate(bases):
        for other in range(len(others)) if drawn is None else drawn[example]:
            for label, put_at, taken_at in zip(
                grid.labels, grid.base[example], there.base[other], strict=True
            ):
                if len(put_at) != len(taken_at):
                    raise TokenError(
                        f"position {label!r} covers {len(put_at)} token(s) of {base.text!r} and "
                        f"{len(taken_at)} of {others[other].text!r}; name a position with equally "
                        "many in all"
                    )
            if "pattern" in grid.acting and len(base) != len(others[other]):
                raise TokenError(
                    f"attention patterns of {len(base)} and {len(others[other])} tokens do not "
                    "correspond; use prompts of one length"
                )
