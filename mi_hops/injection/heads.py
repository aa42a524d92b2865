"""A few heads that together carry a memory best.

A whole memory added to "a head's output" is the same for every head, for head outputs are summed;
so the published head numbers are labels only. Here heads get the part of the memory that they can
write themselves (`encodings.restrict_to_heads`). One head at a time is a grid over encoders, and
taking heads away is `mi_hops.ablate` of ``"z"``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.cases import DEFAULT_METRICS, Cases, Row
from mi_hops.injection.controls import Controls, ControlsLike
from mi_hops.injection.encodings import restrict_to_heads
from mi_hops.injection.memory import MemoryInjection
from mi_hops.model import HookedModel, provenance, require_layers
from mi_hops.result.result import Result
from mi_hops.result.statistics import split_halves
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, get_metrics


def greedy_heads(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    injection: MemoryInjection,
    *,
    max_heads: int = 4,
    choose_by: str = "first_logprob",
    controls: ControlsLike = ("permuted_bridge",),
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Greedily search a small set of heads to inject the bridge into; report it on other facts.

    Each round tries every head of the injection's layers besides those taken already, the bridge
    injected as far as the heads of a layer can write it together, and takes the one with the best
    mean on one half of the facts. It ends after `max_heads`, or where no further head helps.

    Args:
        injection: of the bridge, at ``attn_out``, without heads; its layers are searched, each at its
            strength. With ``relative=True`` all heads write equally much.
        choose_by: name of the metric, among `metrics`, that chooses.
        controls: texts of `CONTROLS` (not ``norm_matched``), given to the same heads, or `Controls`.
            Their seed is also that of the halves and of the random heads.
        form, metrics, limits: as in `injection_grid`.

    Returns:
        Result on the half that did not choose: one variable per metric on ``example, memory,
        size``, where size 1 is the first head alone, and the baseline ``{metric}_before``. Among the
        memories is ``"random heads"``: the bridge, given to as many heads drawn at random. On
        ``size`` lie ``layer`` and ``head`` of the head taken in, and ``chosen_at``, the mean that it
        brought on the choosing half. `chosen_heads` gives the heads as an `Encoder` takes them.

    Raises:
        ValueError: no such metric, `max_heads` below 1, fewer than two facts, another injection than
            such a one; see also `injection_grid`.
    """
    wanted = get_metrics(metrics)
    names = [m.name for m in wanted]
    if choose_by not in names or max_heads < 1:
        raise ValueError(
            f"choose_by is {choose_by!r} (expected one of {names}) and max_heads {max_heads} "
            "(expected at least 1)"
        )
    given, encoder, place = Controls.of(controls), injection.encoder, injection.place
    if given.norm_matched:
        raise ValueError(
            "a random direction cannot be a memory of single heads; leave norm_matched out"
        )
    if encoder.heads is not None or injection.memory != "bridge" or place.kind != "attn_out":
        raise ValueError(
            "heads are searched for an injection of the bridge at attn_out, without heads"
        )
    require_layers(model, injection.strengths)
    cases = Cases.of(model, facts, place, form=form, metrics=wanted)
    texts = given.texts(model, cases.facts, facts)
    vectors = dict(zip(texts, cases.vectors(texts, encoder), strict=True))

    def row(whole: Float[Tensor, "fact layer d_model"], heads: Sequence[tuple[int, int]]) -> Row:
        each = _by_layer(heads)
        parts = restrict_to_heads(model, whole, each)
        return {layer: (parts[:, layer], injection.strengths[layer]) for layer in each}

    choosing, reporting = split_halves(range(len(cases)), seed=given.seed)
    at = names.index(choose_by)
    sign = 1 if wanted[at].higher_is_better else -1
    candidates = [(layer, h) for layer in injection.strengths for h in range(model.cfg.n_heads)]
    order: list[tuple[int, int]] = []
    means: list[float] = []
    taken: Row = {}
    while len(order) < min(max_heads, len(candidates)):
        free = [c for c in candidates if c not in order]
        # A further head changes what is written in its own layer only.
        beside = [[*(head for head in order if head[0] == c[0]), c] for c in free]
        trials: list[Row] = [{**taken, **row(vectors["bridge"], heads)} for heads in beside]
        _, after = cases.run(trials, limits=limits, label="greedy heads", only=choosing)
        found = after[..., at].mean(0)
        best = int((sign * found).argmax())
        if order and sign * (float(found[best]) - means[-1]) <= 0:
            break
        order.append(free[best])
        means.append(float(found[best]))
        taken = trials[best]

    drawn = np.random.default_rng(given.seed).permutation(len(candidates))[: len(order)]
    sizes = range(1, len(order) + 1)
    sets = [(whole, order) for whole in vectors.values()]
    sets.append((vectors["bridge"], [candidates[i] for i in drawn]))
    rows = [row(whole, heads[:size]) for whole, heads in sets for size in sizes]
    before, after = cases.run(rows, limits=limits, label="greedy heads", only=reporting)
    return cases.result(
        before,
        after,
        {"memory": [*vectors, "random heads"], "size": sizes},
        more_coords={
            "layer": ("size", [layer for layer, _ in order]),
            "head": ("size", [head for _, head in order]),
            "chosen_at": ("size", means),
        },
        only=reporting,
        title=f"heads {order}: {injection.name}",
        provenance=provenance(
            model,
            method="greedy_heads",
            strengths={str(layer): s for layer, s in injection.strengths.items()},
            encoder=vars(encoder),
            **place.as_json(),
            form=form,
            seed=given.seed,
            choose_by=choose_by,
            n_choose=len(choosing),
        ),
    )


def chosen_heads(result: Result, size: int | None = None) -> dict[int, tuple[int, ...]]:
    """Layer -> heads chosen by `greedy_heads`, as ``Encoder(heads=...)`` takes them.

    Args:
        size: how many heads; default all that were taken.
    """
    pairs = zip(result["layer"].values.tolist(), result["head"].values.tolist(), strict=True)
    return _by_layer(list(pairs)[:size])


def _by_layer(heads: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    return {at: tuple(h for layer, h in heads if layer == at) for at, _ in heads}
