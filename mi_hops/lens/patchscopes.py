"""Patchscopes: put a hidden state of one run into another run and read what comes out.

Source: *Patchscopes* (Ghandeharioun et al. 2024, arXiv 2401.06102): the state at (source prompt,
position, layer, model) goes through a map f and replaces the state at (target prompt, position,
layer, model). Layers count the blocks passed, as ``"resid"`` does: 0 is the embedding, n_layers what
the final norm gets. With the same model, f the identity, target layer n_layers and the read position
as target position it is the logit lens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import tee, zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_hops.lens.examples import real_cells
from mi_hops.lens.logit import units_of, variables
from mi_hops.lens.tracking import (
    Prompts,
    Track,
    labelled_prompts,
    resolve,
    spell_all,
    tracked_tokens,
)
from mi_hops.lens.vectors import Layers, gather, resolve_layers, states_at, statistics, stream_site
from mi_hops.model import Hook, HookedModel, fingerprint, hook_name, provenance
from mi_hops.model.numeric import widen
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.batching import batched_with_oom_backoff
from mi_hops.sweep.fanout import FanOut, fan_out
from mi_hops.sweep.generate import Generation, generate
from mi_hops.sweep.interventions import Intervention, replace
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.repair import Rows
from mi_hops.text.corpus import Corpus, token_batches
from mi_hops.text.matching import STOP
from mi_hops.text.tokens import Prompt, Where, pad

#: (vectors [row, d_source], source layer, target layer) -> [row, d_target].
Map = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True)
class Place:
    """Where the residual stream is read or replaced: prompts, one token in each, and layers.

    Args:
        prompts: one prompt, several, or label -> prompt (see `logit_lens`).
        position: one token; of a span its last. One for all prompts, or one for each.
        layers: one or several of 0..n_layers, blocks passed; default all.
    """

    prompts: Prompts
    position: Where | Sequence[Where] = -1
    layers: Layers = None


@dataclass
class _Resolved:
    """A place in a model's terms; one prompt's position is one token."""

    labels: list[str]
    prompts: list[Prompt]
    alone: bool
    places: list[int]
    layers: list[int]

    @classmethod
    def of(cls, model: HookedModel, given: Place | Prompts) -> _Resolved:
        place = given if isinstance(given, Place) else Place(given)
        labels, prompts, alone = labelled_prompts(model, place.prompts)
        _, places = resolve(prompts, {"position": place.position}, alone=alone)
        _, layers = resolve_layers(model, "resid", place.layers)
        return cls(labels, prompts, alone, [at for (at,) in places], layers)


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x W + b from one layer to another, as fitted by `fit_affine`.

    For several pairs fit one each and pass a function that picks:
    ``mapping=lambda x, s, t: maps[s, t](x, s, t)``.
    """

    weight: Float[Tensor, "d_source d_target"] = field(repr=False)
    bias: Float[Tensor, "d_target"] = field(repr=False)
    source_layer: int
    target_layer: int

    def __call__(self, vectors: Tensor, source_layer: int, target_layer: int) -> Tensor:
        """Vectors in the target's space.

        Raises:
            ValueError: another pair of layers than the map's own.
        """
        if (source_layer, target_layer) != (self.source_layer, self.target_layer):
            raise ValueError(
                f"this map leads from layer {self.source_layer} to layer {self.target_layer}, not "
                f"from {source_layer} to {target_layer}; name these layers in the two places, or "
                "fit a map for each pair"
            )
        return vectors.to(self.weight.device, self.weight.dtype) @ self.weight + self.bias


def patchscope(
    model: HookedModel,
    source: Place | Prompts,
    target: Place | Prompts,
    *,
    track: Track | None = None,
    source_model: HookedModel | None = None,
    mapping: Map | None = None,
    top_k: int = 5,
    limits: Limits = Limits(),
) -> Result:
    """Patch source states into target prompts and read the next token, for all pairs of layers.

    Args:
        source, target: a `Place`, or prompts alone (then their last token, and all layers). One
            target serves all sources. `entity_description_prompt` and `next_token_prompt` make the
            published targets.
        track: name -> what to follow, for one source or one spelling per source; texts are tokenised
            as continuations of the target.
        source_model: where sources run; default `model`.
        mapping: the map f; default the identity.

    Returns:
        Result on ``example, source_layer, target_layer``: ``entropy`` (nats) and, as in
        `logit_lens`, the tracked values, ``top_tokens`` and ``top_probs``; and as baselines
        ``{name}_before``, the same of the target untouched.

    Raises:
        ValueError: layers out of range, prompts or positions that do not fit one another, another
            model's width without a `mapping`, a mapped state of a wrong width, or an `Affine` map of
            another pair of layers.
        TokenError: a position that a prompt does not have.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.lens import Place
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> source = Place("The spouse of Ondo is", position="Ondo", layers=[2, 4])
        >>> scope = mi_hops.patchscope(model, source, "The spouse of Belko is", track={"x": "Mara"})
        >>> dict(scope["rank"].sizes)
        {'example': 1, 'source_layer': 2, 'target_layer': 7, 'tracked': 1}
    """
    states, origin, goal = _prepare(model, source, target, source_model, mapping)
    spelled = spell_all(model, goal.prompts, track, alone=origin.alone)
    size, n = limits.batch_size, len(goal.prompts)
    inner = dataclasses.replace(limits, progress=False)
    shape = (len(origin.layers), len(goal.layers), -1)
    reduction = _Reduction(spelled, top_k)
    rows, bases = [], []

    def run(part: Sequence[int]) -> FanOut:
        interventions = [
            Intervention((stream_site(model, end, goal.places[i]),), replace(state), base)
            for base, i in enumerate(part)
            for start, vector in zip(origin.layers, states[i], strict=True)
            for end in goal.layers
            for state in [_mapped(mapping, vector, start, end, model)]
        ]
        tokens = pad([goal.prompts[i].ids for i in part])
        reduce = partial(reduction, part=part)
        return fan_out(model, tokens, interventions, reduce=reduce, limits=inner)

    with progress_bar(total=n, label="patchscopes", show=limits.progress) as bar:
        for part, found in batched_with_oom_backoff(range(n), size, run):
            rows.append(found.rows.reshape(len(part), *shape))
            bases.append(found.base)
            bar.update(len(part))
    dims = ("example", "source_layer", "target_layer")
    values = variables(model, reduction.unpacked(torch.cat(rows)), dims)
    before = variables(model, reduction.unpacked(torch.cat(bases)), dims[:1])
    units = units_of(values)
    coords = dict(zip(dims, (origin.labels, origin.layers, goal.layers), strict=True))
    return Result.from_arrays(
        values,
        baselines={f"{name}_before": value for name, value in before.items()},
        coords=coords | ({"tracked": list(spelled[0])} if spelled[0] else {}),
        units=units | {f"{name}_before": unit for name, unit in units.items()},
        title="patchscope",
        provenance=provenance(
            model,
            method="patchscope",
            source_model=fingerprint(source_model or model),
            mapping=None if mapping is None else type(mapping).__name__,
        ),
    )


def patchscope_generate(
    model: HookedModel,
    source: Place,
    target: Place,
    *,
    source_model: HookedModel | None = None,
    mapping: Map | None = None,
    max_new_tokens: int = 16,
    stop: Sequence[str] = STOP,
) -> Generation:
    """Greedy continuation of the target with one source state patched in.

    Args:
        source, target: one prompt and one layer each.

    Raises:
        ValueError, TokenError: as `patchscope`; or several prompts or layers.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.lens import Place
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> source = Place("The spouse of Joren Ashby is", "Joren Ashby", 2)
        >>> target = Place("The spouse of Nadia del Brandt is", "Nadia del Brandt", 2)
        >>> mi_hops.patchscope_generate(model, source, target).text
        'Casper del Wexley'
    """
    states, origin, goal = _prepare(model, source, target, source_model, mapping)
    if len(origin.prompts) > 1 or len(origin.layers) > 1 or len(goal.layers) > 1:
        raise ValueError(
            f"got {len(origin.prompts)} source prompt(s), source layers {origin.layers} and target "
            f"layers {goal.layers}; generation needs one of each: Place(prompt, layers=3)"
        )
    (start,), (end,) = origin.layers, goal.layers
    vector = _mapped(mapping, states[0, 0], start, end, model)
    (said,) = generate(
        model,
        goal.prompts,
        repair=Transplant(end, goal.places[0]),
        states=[vector],
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    return said


@dataclass(frozen=True)
class Transplant:
    """Replaces the stream after `layer` blocks at one position by each row's state.

    It is a `Repair` as far as rows go: its states are vectors, not made from facts.
    """

    layer: int
    position: int
    name: str = "transplant"

    def fit(self, model: HookedModel, facts: Sequence[Any]) -> list[Any]:
        """Refused: the states come from other prompts.

        Raises:
            ValueError: always.
        """
        raise ValueError("a transplant's states are vectors; take them from other prompts' streams")

    def hooks(self, model: HookedModel, states: Sequence[Tensor | None], rows: Rows) -> list[Hook]:
        """A hook in the pass that holds the position, none in the others."""
        here = self.position - rows.offset
        if not 0 <= here < rows.width:
            return []

        def put(x: Tensor) -> Tensor:
            out = x.clone()
            for row, state in enumerate(states):
                if state is not None:
                    out[row, here] = state.to(x.device, x.dtype)
            return out

        site = stream_site(model, self.layer, self.position)
        return [(hook_name(site.kind, site.layer), put)]


def fit_affine(
    source: HookedModel,
    target: HookedModel,
    corpus: Corpus,
    *,
    source_layer: int,
    target_layer: int,
    ridge: float = 1e-3,
    max_tokens: int = 2048,
) -> Affine:
    """The least-squares map from a layer of one model to a layer of another, over a corpus's tokens.

    Both models must cut the corpus into the same tokens; their numbers may differ.

    Args:
        ridge: of the regression, relative to the mean variance of the source's coordinates.

    Raises:
        ValueError: layers out of range, or tokenisations that differ.
    """
    _, (start,) = resolve_layers(source, "resid", source_layer)
    _, (end,) = resolve_layers(target, "resid", target_layer)
    # Cut to the shorter context, so that texts fall into the same pieces.
    length = min(int(source.cfg.n_ctx), int(target.cfg.n_ctx), max_tokens)
    texts = (corpus, corpus) if isinstance(corpus, str | Path) else tee(corpus)
    streams = (
        token_batches(side, given, max_tokens=max_tokens, max_length=length)
        for side, given in zip((source, target), texts, strict=True)
    )
    pairs: list[tuple[Tensor, Tensor]] = []
    for first, second in zip_longest(*streams):
        if not (first and second and _words(source, first.tokens) == _words(target, second.tokens)):
            raise ValueError(
                "the two models tokenise the corpus differently, so their tokens do not pair up"
            )
        cells = real_cells(first)
        x = gather(source, first.tokens, cells, kind="resid", layers=[start]).read[start]
        y = gather(target, second.tokens, cells, kind="resid", layers=[end]).read[end]
        pairs.append((x.double().cpu(), y.double().cpu()))
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y)).float()
    return Affine(weight, (mean_y - mean_x @ weight.double()).float(), start, end)


# -- small parts ----------------------------------------------------------------------------------


def _prepare(
    model: HookedModel,
    source: Place | Prompts,
    target: Place | Prompts,
    source_model: HookedModel | None,
    mapping: Map | None,
) -> tuple[Float[Tensor, "example layer d_source"], _Resolved, _Resolved]:
    """The sources' states, and the two places; one target serves all sources."""
    where = model if source_model is None else source_model
    origin, goal = _Resolved.of(where, source), _Resolved.of(model, target)
    if mapping is None and where.cfg.d_model != model.cfg.d_model:
        raise ValueError(
            f"the source model is {where.cfg.d_model} wide, the target {model.cfg.d_model}; pass a "
            "mapping (fit_affine makes one)"
        )
    n = len(origin.prompts)
    if len(goal.prompts) == 1:
        goal.prompts, goal.places = goal.prompts * n, goal.places * n
    if len(goal.prompts) != n:
        raise ValueError(
            f"got {n} sources and {len(goal.prompts)} targets; give one target, or one each"
        )
    return states_at(where, origin.prompts, origin.places, layers=origin.layers), origin, goal


def _words(model: HookedModel, tokens: Tensor) -> list[list[str]]:
    """Tokens as texts, "" for special ones; without spaces, which vocabularies write differently."""
    special = set(model.tokenizer.all_special_ids)
    texts = {
        i: "" if i in special else model.tokenizer.decode([i]).strip()
        for i in tokens.unique().tolist()
    }
    return [[texts[i] for i in row] for row in tokens.tolist()]


def _mapped(
    mapping: Map | None, vector: Tensor, start: int, end: int, model: HookedModel
) -> Tensor:
    if mapping is None:
        return vector
    found = mapping(vector[None], start, end)
    if tuple(found.shape) != (1, model.cfg.d_model):
        raise ValueError(
            f"the mapping made {tuple(found.shape)} of one state; the target needs "
            f"(1, {model.cfg.d_model})"
        )
    return found[0]


class _Reduction:
    """A fan-out's reduction: `statistics` of the logits, packed into one row of float64 numbers."""

    def __init__(self, spelled: Sequence[Mapping[str, Any]], top_k: int) -> None:
        self.tracked, self.top_k = tracked_tokens(spelled), top_k
        self.widths: dict[str, int] = {}

    def __call__(self, logits: Tensor, bases: list[int], *, part: Sequence[int]) -> Tensor:
        tracked = self.tracked and self.tracked[torch.tensor([part[base] for base in bases])]
        found = statistics(widen(logits[:, 0]), tracked, top_k=self.top_k)
        columns = {name: v.double().reshape(len(bases), -1) for name, v in found.items()}
        self.widths = {name: column.shape[1] for name, column in columns.items()}
        return torch.cat(list(columns.values()), dim=1)

    def unpacked(self, packed: Tensor) -> dict[str, Tensor]:
        parts = packed.split(list(self.widths.values()), dim=-1)
        named = dict(zip(self.widths, parts, strict=True))
        return named | {"entropy": named["entropy"].squeeze(-1)}
