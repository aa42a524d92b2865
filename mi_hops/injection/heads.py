"""Which heads matter: ablate them one by one, give a memory to one at a time, or search a few.

A whole memory added to "a head's output" is the same for every head, for head outputs are summed;
so the published head numbers are labels only. Here a head gets the part of the memory that it can
write itself (`encodings.restrict_to_heads`), and ablation takes away what it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mi_hops.injection.cases import InjectionCase, injecting, make_cases, run_cases
from mi_hops.injection.controls import control_texts
from mi_hops.injection.encodings import Encoding, Pooling, encode_columns, restrict_to_heads
from mi_hops.injection.grid import DEFAULT_METRICS
from mi_hops.injection.memory import Place
from mi_hops.injection.select import split_halves
from mi_hops.model import HookedModel, capture, hook_name, provenance, require_layers
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Intervention, ablate
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import Metric, MetricLike, get_metrics
from mi_hops.text.tokens import batches

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

#: Layer -> what its heads write of each fact's memory, ``[fact, d_model]``.
_Parts = dict[int, "Tensor"]


def head_ablation(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    layers: Sequence[int] | None = None,
    positions: Place = "prompt",
    mode: Literal["mean", "zero"] = "mean",
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Scores of two-hop prompts with one head's z taken away.

    Args:
        positions: where the head is ablated (`memory.Place`).
        mode: ``"zero"``, or ``"mean"``: put the mean z of that head over all ablated positions of
            the given facts in its place, so that what all prompts share stays.
        layers, form, metrics, limits: as in `grid.injection_grid`.

    Returns:
        Result with one variable a metric (``example, layer, head``) and the baseline
        ``{metric}_before`` (``example``).

    Raises:
        ValueError: an unknown mode, a layer out of range, or no fact that can be run.
    """
    if mode not in ("mean", "zero"):
        raise ValueError(f"mode is {mode!r}; expected 'mean' or 'zero'")
    wanted = get_metrics(metrics)
    chosen = _layers(model, layers)
    cases, skipped = make_cases(model, facts, form=form, positions=positions, metrics=wanted)
    heads = range(int(model.cfg.n_heads))
    means = _mean_z(model, cases, chosen) if mode == "mean" else {}

    def rows_of(i: int, case: InjectionCase, base: int) -> list[Intervention]:
        return [
            Intervention.at(
                "z", layer, ablate(means[layer][head] if means else None),
                positions=case.where, head=head, base=base,
            )
            for layer in chosen
            for head in heads
        ]  # fmt: skip

    before, after = run_cases(
        model, cases, rows_of, wanted, limits=limits, label="head ablation",
    )  # fmt: skip
    return _result(
        cases, wanted, before, after, {"layer": chosen, "head": heads}, skipped=skipped,
        title=f"{mode} ablation of one head at positions {positions}",
        provenance=provenance(
            model, method="head_ablation", mode=mode, positions=str(positions), form=form
        ),
    )  # fmt: skip


def head_injection(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    strength: float,
    layers: Sequence[int] | None = None,
    encoding: Encoding = "unembed",
    positions: Place = "all",
    controls: Sequence[str] = ("permuted_bridge",),
    relative: bool = False,
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    pooling: Pooling = "set",
    seed: int = 0,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Scores under a memory given to one head at a time, as far as that head can write it.

    Args:
        strength: one factor for all heads; with `relative` in units of the attention output's norm,
            so that every head writes equally much.
        controls: texts of `controls.CONTROLS` (not ``norm_matched``).
        layers, encoding, positions, form, metrics, pooling, seed: as in `grid.injection_grid`.

    Returns:
        As `head_ablation`, with a dimension ``memory`` after ``example``.

    Raises:
        ValueError: see `grid.injection_grid`.
    """
    wanted = get_metrics(metrics)
    chosen = _layers(model, layers)
    cases, skipped, vectors = _prepare(
        model, facts, controls, encoding=encoding, positions=positions, form=form,
        metrics=wanted, pooling=pooling, seed=seed,
    )  # fmt: skip
    heads = range(int(model.cfg.n_heads))
    parts = {
        name: [restrict_to_heads(model, whole, [head]) for head in heads]
        for name, whole in vectors.items()
    }

    def rows_of(i: int, case: InjectionCase, base: int) -> list[Intervention]:
        return [
            injecting(case, base, {layer: part[i, layer]}, strength, relative=relative)
            for of_heads in parts.values()
            for layer in chosen
            for part in of_heads
        ]

    before, after = run_cases(
        model, cases, rows_of, wanted, limits=limits, label="head injection",
    )  # fmt: skip
    return _result(
        cases, wanted, before, after,
        {"memory": list(vectors), "layer": chosen, "head": heads}, skipped=skipped,
        title=f"{encoding} memory given to one head, strength {strength:g}",
        provenance=provenance(
            model, method="head_injection", strength=strength, encoding=encoding, relative=relative,
            positions=str(positions), pooling=pooling, form=form, seed=seed,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class HeadSubset:
    """A few heads that together carry a memory best; from `greedy_heads`.

    Attributes:
        order: (layer, head) in the order in which they were taken in.
        scores: mean of the choosing metric on the choosing half, after each of them.
        result: the other half under the first heads of `order` (dimension ``size``).
    """

    order: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    result: Result

    @property
    def heads(self) -> dict[int, tuple[int, ...]]:
        """Layer -> heads, as `memory.MemoryInjection` takes them."""
        return _by_layer(self.order)


def greedy_heads(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    strength: float,
    max_heads: int = 4,
    layers: Sequence[int] | None = None,
    choose_by: str = "first_logprob",
    encoding: Encoding = "unembed",
    positions: Place = "all",
    controls: Sequence[str] = ("permuted_bridge",),
    relative: bool = False,
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    pooling: Pooling = "set",
    seed: int = 0,
    limits: Limits = Limits(batch_size=8),
) -> HeadSubset:
    """Search, head by head, a small set of heads to give the bridge to; report it on other facts.

    Each round tries every head of `layers` beside those taken already, the bridge injected as far as
    the heads of a layer can write it together, and takes the one with the best mean on one half of
    the facts. It ends after `max_heads`, or where no further head helps that half.

    Args:
        choose_by: name of the metric, among `metrics`, that chooses.
        controls: texts of `controls.CONTROLS` (not ``norm_matched``), given to the same heads.
        seed: of the halves, the controls, and the random heads.
        strength, layers, encoding, positions, relative, form, metrics, pooling: as in
            `head_injection`.

    Returns:
        `HeadSubset`; its result has one variable a metric on ``example`` (the half that did not
        choose), ``memory`` and ``size`` (1 = the first head alone). Beside the bridge and the
        controls stands the memory ``"random heads"``: the bridge, given to as many heads drawn at
        random.

    Raises:
        ValueError: no such metric, `max_heads` below 1, fewer than two facts; see also
            `grid.injection_grid`.
    """
    wanted = get_metrics(metrics)
    names = [m.name for m in wanted]
    if choose_by not in names or max_heads < 1:
        raise ValueError(
            f"choose_by is {choose_by!r} (expected one of {names}) and max_heads {max_heads} "
            "(expected at least 1)"
        )
    at = names.index(choose_by)
    candidates = [(layer, h) for layer in _layers(model, layers) for h in range(model.cfg.n_heads)]
    cases, skipped, vectors = _prepare(
        model, facts, controls, encoding=encoding, positions=positions, form=form,
        metrics=wanted, pooling=pooling, seed=seed,
    )  # fmt: skip
    choosing, reporting = split_halves(range(len(cases)), seed=seed)

    def scores(half: list[int], sets: Sequence[_Parts]) -> tuple[Tensor, Tensor]:
        """Of the half's cases untouched, and under each set of heads' parts."""

        def rows_of(i: int, case: InjectionCase, base: int) -> list[Intervention]:
            return [
                injecting(
                    case, base, {layer: part[half[i]] for layer, part in parts.items()}, strength,
                    relative=relative,
                )
                for parts in sets
            ]  # fmt: skip

        return run_cases(
            model, [cases[i] for i in half], rows_of, wanted, limits=limits, label="greedy heads",
        )  # fmt: skip

    sign = 1 if wanted[at].higher_is_better else -1
    order: list[tuple[int, int]] = []
    found: list[float] = []
    taken: _Parts = {}
    for _ in range(min(max_heads, len(candidates))):
        free = [c for c in candidates if c not in order]
        # A further head changes what is written in its own layer only.
        trials = [
            taken | _written(model, vectors["bridge"], {c[0]: _by_layer([*order, c])[c[0]]})
            for c in free
        ]
        means = scores(choosing, trials)[1][..., at].mean(0)
        best = int((sign * means).argmax())
        if order and sign * (float(means[best]) - found[-1]) <= 0:
            break
        order.append(free[best])
        found.append(float(means[best]))
        taken = trials[best]

    drawn = np.random.default_rng(seed).permutation(len(candidates))[: len(order)]
    strangers = [candidates[i] for i in drawn]
    sizes = range(1, len(order) + 1)
    sets = [
        _written(model, whole, _by_layer(chosen[:size]))
        for whole, chosen in [
            *((v, order) for v in vectors.values()),
            (vectors["bridge"], strangers),
        ]
        for size in sizes
    ]
    before, after = scores(reporting, sets)
    result = _result(
        [cases[i] for i in reporting], wanted, before, after,
        {"memory": [*vectors, "random heads"], "size": sizes}, skipped=skipped,
        title=f"{encoding} memory given to the heads {order}, strength {strength:g}",
        provenance=provenance(
            model, method="greedy_heads", strength=strength, encoding=encoding, relative=relative,
            positions=str(positions), pooling=pooling, form=form, seed=seed, order=order,
            choose_by=choose_by, n_choose=len(choosing),
        ),
    )  # fmt: skip
    return HeadSubset(tuple(order), tuple(found), result)


def _prepare(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    controls: Sequence[str],
    *,
    encoding: Encoding,
    positions: Place,
    form: str | None,
    metrics: Sequence[Metric],
    pooling: Pooling,
    seed: int,
) -> tuple[list[InjectionCase], list[tuple[str, str]], dict[str, Tensor]]:
    """Cases, what was skipped, and memory's name -> vectors ``[case, layer, d_model]``."""
    if "norm_matched" in controls:
        raise ValueError("a random direction is no memory of a head; leave norm_matched out")
    cases, skipped = make_cases(model, facts, form=form, positions=positions, metrics=metrics)
    texts = control_texts(model, [c.fact for c in cases], controls, seed=seed)
    vectors = encode_columns(model, texts, encoding, pooling=pooling)
    return cases, skipped, dict(zip(texts, vectors, strict=True))


def _result(
    cases: Sequence[InjectionCase],
    metrics: Sequence[Metric],
    before: Tensor,
    after: Tensor,
    coords: dict[str, Sequence[Any]],
    **more: Any,
) -> Result:
    """Scores ``[case, row, metric]``, their rows those of a grid of `coords`, under their names."""
    grid = after.reshape(len(cases), *map(len, coords.values()), len(metrics))
    return Result.from_arrays(
        {m.name: (("example", *coords), grid[..., k]) for k, m in enumerate(metrics)},
        coords={"example": [c.fact.id for c in cases], **coords},
        baselines={f"{m.name}_before": ("example", before[:, k]) for k, m in enumerate(metrics)},
        units={m.name: m.unit for m in metrics} | {f"{m.name}_before": m.unit for m in metrics},
        **more,
    )


def _by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(h for at, h in heads if at == layer)
        for layer in dict.fromkeys(layer for layer, _ in heads)
    }


def _written(model: HookedModel, vectors: Tensor, heads: Mapping[int, Sequence[int]]) -> _Parts:
    parts = restrict_to_heads(model, vectors, heads)
    return {layer: parts[:, layer] for layer in heads}


def _layers(model: HookedModel, layers: Sequence[int] | None) -> list[int]:
    chosen = list(range(int(model.cfg.n_layers))) if layers is None else list(layers)
    if not chosen:
        raise ValueError("layers is empty; name at least one, or pass None for all")
    require_layers(model, chosen)
    return chosen


def _mean_z(
    model: HookedModel, cases: Sequence[InjectionCase], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Layer -> mean z ``[head, d_head]`` over the positions to be ablated, each counted once."""
    names = {layer: hook_name("z", layer) for layer in layers}
    sums: dict[int, Tensor] = {}
    count = 0
    with torch.no_grad():
        for chosen, batch in batches([c.prompt.ids for c in cases], 64):
            found, _ = capture(model, batch.tokens, names.values())
            rows, columns = torch.tensor(
                [
                    (r, p)
                    for r, i in enumerate(chosen)
                    for p in cases[i].where or range(len(cases[i].prompt))
                ]
            ).T
            count += len(rows)
            for layer, name in names.items():
                z = found[name]
                part = z[rows.to(z.device), columns.to(z.device)]
                total = part.to(wide_dtype(z.dtype)).sum(0)
                sums[layer] = sums[layer] + total if layer in sums else total
    return {layer: total / count for layer, total in sums.items()}
