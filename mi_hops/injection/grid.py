"""Layer x strength x encoding grids of injections over sets of facts, in fan-out passes.

Every cell of the grid for a fact is one row of a batch that grows on the way up, so nothing below
the injected layer is computed twice (`mi_hops.sweep.fanout`). Controls run in the same passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.facts.fact import TwoHopFact
from mi_hops.injection.cases import DEFAULT_METRICS, Cases
from mi_hops.injection.controls import CONTROLS, Controls, ControlsLike, norm_matched
from mi_hops.injection.encodings import Encoder, EncoderLike, restrict_to_heads
from mi_hops.injection.memory import require_fit
from mi_hops.injection.place import Place, PlaceLike
from mi_hops.model import HookedModel, provenance, require_hooks, require_layers
from mi_hops.model.hooks import hook_name
from mi_hops.result.result import Result
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import MetricLike, target_of
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode

#: The strengths of the published grids.
STRENGTHS = tuple(float(s) for s in range(1, 16))


def injection_grid(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    layers: Sequence[int | Sequence[int]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    encodings: Sequence[EncoderLike] = ("unembed",),
    positions: PlaceLike = "everywhere",
    controls: ControlsLike = CONTROLS,
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Inject the bridge, and controls, into two-hop prompts at every layer and strength.

    Facts whose prompt, names or position cannot be tokenised or found are skipped, with the reason.

    Args:
        layers: default each layer of the model; a sequence among them is a group that is injected
            into together, at the one strength ("1+2+3" in the result; its
            ``provenance["layers"]`` holds the layers of each label).
        strengths: factors of the vector; of a relative `Place`, of the activation's norm.
        encodings: names of encodings, or `Encoder`s.
        positions: where, all places of a list together (see `place.Positions`); or a `Place`, which
            also says at which activation, and whether strengths are relative.
        controls: memories besides the bridge: names of `CONTROLS`, which may be none, or `Controls`.
        form: form of the two-hop prompt; default each fact's first.
        metrics: scores of the answer; the default ones read its first token. ``"answer_logprob"``
            and ``"greedy"`` read all its tokens.
        limits: facts and rows in one pass.

    Returns:
        Result with one variable per metric, dimensions ``example, memory, encoding, layer,
        strength``, one value per fact and cell; the baseline ``{metric}_before`` (``example``) is
        the prompt untouched, and ``{metric}_explicit`` the second-hop prompt that names the bridge
        (NaN where a fact has none). Coordinates ``text`` (``example, memory``) and ``answer`` say
        what was injected and asked for.

    Raises:
        ValueError: an unknown layer, encoding, control or kind, memories that do not fit the facts,
            heads for other layers, no strength, or no fact that can be run.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("first_unseen")[:4]
        >>> grid = mi_hops.injection_grid(
        ...     model, facts, layers=[1, 2], strengths=(2, 4), positions="last", controls=()
        ... )
        >>> grid["first_prob"].dims
        ('example', 'memory', 'encoding', 'layer', 'strength')
    """
    place, given = Place.of(positions), Controls.of(controls)
    encoders = {encoder.name: encoder for encoder in map(Encoder.of, encodings)}
    factors = [float(s) for s in strengths]
    twice = len(encoders) < len(encodings) or len(set(factors)) < len(factors)
    if not factors or not encoders or twice:
        raise ValueError(
            f"strengths {factors} and encodings {list(encodings)}: expected at least one strength and "
            "one encoding, each once"
        )
    groups = _layer_groups(model, layers)
    every = sorted({layer for group in groups.values() for layer in group})
    require_hooks(model, [hook_name(place.kind, layer) for layer in every])
    for encoder in encoders.values():
        require_fit(encoder, place, every, factors)
    cases = Cases.of(model, facts, place, form=form, metrics=metrics)
    texts = given.texts(model, cases.facts, facts)
    names = [*texts, *(["norm_matched"] if given.norm_matched else [])]
    vectors = {
        name: _with_random(model, cases.vectors(texts, encoder), encoder, given)
        for name, encoder in encoders.items()
    }
    rows = [
        {layer: (vectors[encoder][memory, :, layer], factor) for layer in group}
        for memory, encoder, group, factor in product(
            range(len(names)), encoders, groups.values(), factors
        )
    ]
    before, after = cases.run(rows, limits=limits, label="injection grid")
    injected = [[texts[n][i] if n in texts else "" for n in names] for i in range(len(cases))]
    return cases.result(
        before,
        after,
        {
            "memory": names,
            "encoding": list(encoders),
            "layer": list(groups),
            "strength": factors,
        },
        more_coords={
            "text": (("example", "memory"), injected),
            "answer": ("example", [fact.answer for fact in cases.facts]),
        },
        baselines=_explicit(cases, form),
        title=f"memory injection at {place.kind}, positions {place.positions}",
        provenance=provenance(
            model,
            method="injection_grid",
            **place.as_json(),
            layers={str(label): list(group) for label, group in groups.items()},
            encoders={name: vars(encoder) for name, encoder in encoders.items()},
            form=form,
            seed=given.seed,
        ),
    )


def _layer_groups(
    model: HookedModel, layers: Sequence[int | Sequence[int]] | None
) -> dict[int | str, tuple[int, ...]]:
    """Label -> the layers that are injected into together; labels of one type."""
    every: Any = range(int(model.cfg.n_layers)) if layers is None else layers
    groups = [(g,) if isinstance(g, Integral) else tuple(g) for g in every]
    if not groups or not all(groups) or len(set(groups)) < len(groups):
        raise ValueError(
            f"layers is {layers}; expected at least one, no empty group, and each group once"
        )
    require_layers(model, [layer for group in groups for layer in group])
    if all(len(group) == 1 for group in groups):
        return {group[0]: group for group in groups}
    return {"+".join(map(str, group)): group for group in groups}


def _with_random(
    model: HookedModel,
    vectors: Float[Tensor, "memory fact layer d_model"],
    encoder: Encoder,
    controls: Controls,
) -> Float[Tensor, "memory fact layer d_model"]:
    """The vectors, and where asked for random directions of the first memory's lengths."""
    if not controls.norm_matched:
        return vectors
    heads = encoder.heads
    within = None if heads is None else partial(restrict_to_heads, model, heads=heads)
    random = norm_matched(vectors[0], controls.seed, within=within)
    return torch.cat([vectors, random[None]])


def _explicit(cases: Cases, form: str | None) -> dict[str, Float[Tensor, "fact"]]:
    """Scores of the second-hop prompts, NaN where there is none or the answer merges with it."""
    model, metrics = cases.model, cases.scored[0].metrics
    found = {}
    for i, fact in enumerate(cases.facts):
        key = form if form is not None else next(iter(fact.prompts))
        with suppress(ValueError):
            prompt = encode(model, fact.second_prompt(key))
            found[i] = (prompt, target_of(model, prompt, fact.answer))
    out = {m.name: torch.full((len(cases),), float("nan"), dtype=torch.float64) for m in metrics}
    if found:
        prompts, targets = zip(*found.values(), strict=True)
        for name, scores in score_prompts(model, prompts, targets, metrics).items():
            out[name][list(found)] = scores.double()
    return {f"{name}_explicit": scores for name, scores in out.items()}
