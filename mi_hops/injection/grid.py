"""Layer x strength x encoding grids of injections over sets of facts, in fan-out passes.

Every cell of the grid for a fact is one row of a batch that grows on the way up, so nothing below
the injected layer is computed twice (`mi_hops.sweep.fanout`). Controls run in the same passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.injection.cases import InjectionCase, injecting, make_cases, run_cases
from mi_hops.injection.controls import CONTROLS, control_texts, norm_matched
from mi_hops.injection.encodings import (
    Encoding,
    Heads,
    Pooling,
    check_encoding,
    encode_columns,
    restrict_to_heads,
)
from mi_hops.injection.memory import KINDS, Place, plain_place
from mi_hops.model import HookedModel, provenance, require_layers
from mi_hops.result.result import Result
from mi_hops.sweep.interventions import Intervention
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.metrics import (
    METRICS,
    Metric,
    MetricLike,
    NextToken,
    Target,
    get_metrics,
    target_of,
)
from mi_hops.sweep.scoring import score_prompts
from mi_hops.text.tokens import encode

if TYPE_CHECKING:
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

#: The strengths of the published grids.
STRENGTHS = tuple(float(s) for s in range(1, 16))


def _first_right(logits: Tensor, target: Target) -> Tensor:
    return (logits.argmax(-1) == target.answer[0]).to(logits.dtype)


#: 1 where the answer's first token is the model's first choice: averaged, the share repaired.
FIRST_RIGHT = NextToken("first_right", "share", True, _first_right)

DEFAULT_METRICS: tuple[Metric, ...] = (
    FIRST_RIGHT, METRICS["first_prob"], METRICS["first_logprob"], METRICS["rank"],
)  # fmt: skip


def injection_grid(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    layers: Sequence[int | Sequence[int]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    encodings: Sequence[Encoding] = ("unembed",),
    positions: Place = "all",
    controls: Sequence[str] = CONTROLS,
    words: Mapping[str, Sequence[str]] | None = None,
    memories: Mapping[str, Sequence[str]] | None = None,
    form: str | None = None,
    metrics: MetricLike | Sequence[MetricLike] = DEFAULT_METRICS,
    relative: bool = False,
    kind: str = "attn_out",
    heads: Heads | None = None,
    pooling: Pooling = "set",
    leading_space: bool = False,
    seed: int = 0,
    limits: Limits = Limits(batch_size=8),
) -> Result:
    """Inject the bridge, and controls, into two-hop prompts at every layer and strength.

    Facts whose prompt, names or position cannot be tokenised or found are skipped, with the reason.

    Args:
        layers: default each layer of the model; a sequence in the place of a layer is injected into
            together ("1+2+3" in the result), at the one strength.
        strengths: factors of the vector, or with `relative` of the activation's norm.
        encodings, positions, relative, kind, heads, pooling, leading_space: as in
            `memory.MemoryInjection`. ``"all"`` takes in the answer tokens that a metric appends.
        controls: from `controls.CONTROLS`; may be empty.
        words: word lists for controls ``random_{name}`` (see `controls.control_texts`).
        memories: further memories, name -> one text for each fact.
        form: form of the two-hop prompt; default each fact's first.
        metrics: scores of the answer; the default ones read its first token. ``"answer_logprob"``
            and ``"greedy"`` read all its tokens.
        seed: of the controls' draws.
        limits: facts and rows in one pass (`sweep.limits.Limits`).

    Returns:
        Result with one variable a metric, dimensions ``example, memory, encoding, layer,
        strength``; the baseline ``{metric}_before`` (``example``) is the prompt untouched, and
        ``{metric}_explicit`` the second-hop prompt that names the bridge (NaN where a fact has
        none). Coordinates ``text`` (``example, memory``) and ``answer`` say what was injected and
        asked for.

    Raises:
        ValueError: an unknown layer, encoding, control or kind, memories that do not fit the facts,
            heads for other layers, no strength, or no fact that can be run.
    """
    wanted = get_metrics(metrics)
    groups = _layer_groups(model, layers)
    factors = [float(s) for s in strengths]
    if not factors or not encodings:
        raise ValueError("an injection grid needs at least one strength and one encoding")
    for encoding in encodings:
        check_encoding(encoding, pooling)
    if kind not in KINDS:
        raise ValueError(f"cannot inject at {kind!r}; expected one of {list(KINDS)}")
    layered = {layer for group in groups for layer in group}
    if isinstance(heads, Mapping) and not layered <= set(heads):
        raise ValueError(
            f"heads names none for layers {sorted(layered - set(heads))}, which are injected"
        )
    cases, skipped = make_cases(model, facts, form=form, positions=positions, metrics=wanted)
    texts = control_texts(
        model, [c.fact for c in cases], controls, words=words, seed=seed
    ) | _given(memories, facts, cases)
    names = [*texts, *(["norm_matched"] if "norm_matched" in controls else [])]
    vectors = {
        encoding: _vectors(model, texts, encoding, "norm_matched" in names, heads, pooling,
                           leading_space, seed)
        for encoding in encodings
    }  # fmt: skip
    grid = [
        (m, e, g, s)
        for m in range(len(names))
        for e in range(len(encodings))
        for g in range(len(groups))
        for s in range(len(factors))
    ]
    shape = (len(cases), len(names), len(encodings), len(groups), len(factors))

    def rows_of(i: int, case: InjectionCase, base: int) -> list[Intervention]:
        return [
            injecting(
                case, base, {layer: vectors[encodings[e]][m, i, layer] for layer in groups[g]},
                factors[s], kind=kind, relative=relative,
            )
            for m, e, g, s in grid
        ]  # fmt: skip

    before, after = run_cases(
        model, cases, rows_of, wanted, limits=limits, label="injection grid",
    )  # fmt: skip
    after = after.reshape(*shape, len(wanted))
    labels = [g[0] if len(g) == 1 else "+".join(map(str, g)) for g in groups]
    if any(isinstance(label, str) for label in labels):
        labels = [str(label) for label in labels]
    dims = ("example", "memory", "encoding", "layer", "strength")
    explicit = _explicit(model, cases, wanted, form)
    injected = [[texts[n][i] if n in texts else "" for n in names] for i in range(len(cases))]
    units = {m.name: m.unit for m in wanted}
    both = {f"{n}_{what}": u for n, u in units.items() for what in ("before", "explicit")}
    return Result.from_arrays(
        {m.name: (dims, after[..., k]) for k, m in enumerate(wanted)},
        coords={
            "example": [c.fact.id for c in cases], "memory": names, "encoding": list(encodings),
            "layer": labels, "strength": factors, "text": (("example", "memory"), injected),
            "answer": ("example", [c.fact.answer for c in cases]),
        },
        baselines={f"{m.name}_before": ("example", before[:, k]) for k, m in enumerate(wanted)}
        | {f"{n}_explicit": ("example", v) for n, v in explicit.items()},
        units={k: v for k, v in (units | both).items() if v},
        title=f"memory injection at {kind}, positions {positions}",
        skipped=skipped, allow_nonfinite=True,
        provenance=provenance(
            model, method="injection_grid", positions=plain_place(positions), kind=kind,
            relative=relative, heads=_plain_heads(heads), pooling=pooling,
            leading_space=leading_space, form=form, seed=seed,
        ),
    )  # fmt: skip


def _layer_groups(
    model: HookedModel, layers: Sequence[int | Sequence[int]] | None
) -> list[tuple[int, ...]]:
    every = range(int(model.cfg.n_layers)) if layers is None else layers
    groups = [(g,) if isinstance(g, int) else tuple(g) for g in every]
    if not groups or not all(groups):
        raise ValueError(f"layers is {layers}; expected at least one, and no empty group")
    require_layers(model, [layer for group in groups for layer in group])
    return groups


def _plain_heads(heads: Heads | None) -> Any:
    if isinstance(heads, Mapping):
        return {str(layer): list(chosen) for layer, chosen in heads.items()}
    return None if heads is None else list(heads)


def _given(
    memories: Mapping[str, Sequence[str]] | None,
    facts: Sequence[TwoHopFact],
    cases: Sequence[InjectionCase],
) -> dict[str, list[str]]:
    row = {id(fact): i for i, fact in enumerate(facts)}
    found = {}
    for name, given in (memories or {}).items():
        if isinstance(given, str) or len(given) != len(facts):
            raise ValueError(
                f"memories[{name!r}] must give one text for each of {len(facts)} facts"
            )
        if name in (*CONTROLS, "bridge"):
            raise ValueError(f"memories may not be called {name!r}, which is built in")
        found[name] = [given[row[id(case.fact)]] for case in cases]
    return found


def _vectors(
    model: HookedModel,
    texts: Mapping[str, Sequence[str]],
    encoding: Encoding,
    with_random: bool,
    heads: Heads | None,
    pooling: Pooling,
    leading_space: bool,
    seed: int,
) -> Tensor:
    """``[memory, fact, layer, d_model]``."""
    vectors = encode_columns(model, texts, encoding, pooling=pooling, leading_space=leading_space)
    within = None
    if heads is not None:
        within = partial(restrict_to_heads, model, heads=heads)
        vectors = within(vectors)
    if with_random:
        random = norm_matched(vectors[0], seed, within=within)
        vectors = torch.cat([vectors, random[None]])
    return vectors


def _explicit(
    model: HookedModel, cases: Sequence[InjectionCase], metrics: Sequence[Metric], form: str | None
) -> dict[str, Tensor]:
    """Scores of the second-hop prompts, NaN where there is none or the answer merges with it."""
    prompts, targets, rows = [], [], []
    for i, case in enumerate(cases):
        key = form if form is not None else next(iter(case.fact.prompts))
        if key not in case.fact.second_prompts:
            continue
        try:
            prompt = encode(model, case.fact.second_prompt(key))
            targets.append(target_of(model, prompt, case.fact.answer))
        except ValueError:
            continue
        prompts.append(prompt)
        rows.append(i)
    out = {m.name: torch.full((len(cases),), float("nan"), dtype=torch.float64) for m in metrics}
    if prompts:
        for name, scores in score_prompts(model, prompts, targets, list(metrics)).items():
            out[name][rows] = scores.double()
    return out
