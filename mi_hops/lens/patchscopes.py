"""Patchscopes: put a hidden state of one run into another run and read what comes out.

Source: *Patchscopes* (Ghandeharioun et al. 2024, arXiv 2401.06102): the state at (source prompt,
position, layer, model) goes through a map f and replaces the state at (target prompt, position,
layer, model). Layers count blocks passed, as ``"resid"`` does: 0 is the embedding, n_layers what the
final norm gets. With the same model, f the identity, target layer n_layers and the read position as
target position it is the logit lens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.lens.examples import real_cells
from mi_hops.lens.logit import TRACKED, UNITS, decoded
from mi_hops.lens.reading import Tracked, check_layers, gather, statistics, stream_site
from mi_hops.lens.tracking import Spelling, spell_all, tracked_tokens
from mi_hops.lens.training import Corpus
from mi_hops.model import Hook, HookedModel, device_of, fingerprint, hook_name, provenance
from mi_hops.model.numeric import wide_dtype
from mi_hops.result.progress import progress_bar
from mi_hops.result.result import Result
from mi_hops.sweep.fanout import fan_out
from mi_hops.sweep.generate import Generation, generate
from mi_hops.sweep.interventions import Intervention, replace
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.repair import Rows
from mi_hops.text.corpus import token_batches
from mi_hops.text.matching import STOP
from mi_hops.text.tokens import Prompt, Where, batches, encode, last_position, pad

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

#: (vectors [row, d_source], source layer, target layer) -> [row, d_target].
Map = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x W + b between one pair of layers; `fit_affine` makes one.

    For several pairs fit one each and pass a function that picks:
    ``mapping=lambda x, s, t: maps[s, t](x, s, t)``.
    """

    weight: Float[Tensor, "d_source d_target"]
    bias: Float[Tensor, "d_target"]
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
                f"from {source_layer} to {target_layer}; pass source_layers=[{self.source_layer}], "
                f"target_layers=[{self.target_layer}], or fit a map for each pair"
            )
        wide = vectors.to(self.weight.device, self.weight.dtype)
        return wide @ self.weight + self.bias


def patchscope(
    model: HookedModel,
    sources: str | Prompt | Sequence[str | Prompt],
    targets: str | Prompt | Sequence[str | Prompt],
    *,
    source_position: Where | Sequence[Where] = -1,
    target_position: Where | Sequence[Where] = -1,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    track: Mapping[str, Spelling | Sequence[Spelling]] | None = None,
    source_model: HookedModel | None = None,
    mapping: Map | None = None,
    top_k: int = 5,
    examples: Sequence[str] | None = None,
    batch_size: int = 16,
    max_rows: int | None = None,
    memory: float | None = None,
    progress: bool = False,
) -> Result:
    """Read the next token of target prompts under states of source prompts, all pairs of layers.

    Args:
        sources, targets: one prompt, or several; one target serves all sources. `mi_hops.lens.targets`
            has the published ones by name.
        source_position, target_position: one token; of a span its last. One for all prompts, or one
            for each.
        source_layers, target_layers: default all, 0..n_layers.
        track: name -> what to follow, for one source or one spelling a source; texts are tokenised
            as continuations of the target.
        source_model: where sources run; default `model`.
        mapping: the map f; default the identity.
        examples: labels of the sources; default their numbers.
        batch_size: target prompts in one fan-out.
        max_rows, memory: as in `fanout.fan_out`.

    Returns:
        Result on ``example, source_layer, target_layer``: ``entropy`` (nats) and, as in
        `logit.logit_lens`, the tracked numbers, ``top_tokens`` and ``top_probs``; and as baselines
        ``{name}_before``, the same of the target untouched.

    Raises:
        ValueError: layers out of range, prompts, positions or labels that do not fit one another,
            another model's width without a `mapping`, a mapped state of a wrong width, or an
            `Affine` map of another pair of layers.
        TokenError: a position that a prompt has not got.
    """
    origin = model if source_model is None else source_model
    single = isinstance(sources, str | Prompt)
    known = _prompts(origin, sources)
    aims = _prompts(model, targets)
    aims = aims * len(known) if len(aims) == 1 else aims
    if len(aims) != len(known):
        raise ValueError(f"got {len(known)} sources and {len(aims)} targets; give one, or one each")
    starts = _layers(origin, source_layers)
    ends = _layers(model, target_layers)
    at_source = _places(known, source_position, "source_position")
    at_target = _places(aims, target_position, "target_position")
    _check_widths(origin, model, mapping)
    labels = list(examples) if examples is not None else [str(i) for i in range(len(known))]
    if len(labels) != len(known):
        raise ValueError(f"got {len(labels)} labels in examples for {len(known)} sources")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    spelled = spell_all(model, aims, track or {}, single=single)
    names = list(spelled[0])
    states = states_of(origin, known, at_source, layers=starts)
    rows: list[dict[str, Tensor]] = []
    bases: list[dict[str, Tensor]] = []
    with progress_bar(total=len(known), label="patchscopes", show=progress) as bar:
        for low in range(0, len(known), batch_size):
            part = range(low, min(low + batch_size, len(known)))
            interventions = [
                Intervention(
                    (stream_site(model, end, at_target[i]),),
                    replace(_mapped(mapping, states[i, s], start, end, model)),
                    base,
                )
                for base, i in enumerate(part)
                for s, start in enumerate(starts)
                for end in ends
            ]
            tracked = tracked_tokens([spelled[i] for i in part])
            layout: dict[str, int] = {}
            found = fan_out(
                model, pad([aims[i].ids for i in part]), interventions,
                reduce=_packed(tracked if names else None, top_k, layout),
                limits=Limits(max_rows=max_rows, memory=memory),
            )  # fmt: skip
            shape = (len(part), len(starts), len(ends))
            rows.append(_unpacked(found.rows.reshape(*shape, -1), layout))
            bases.append(_unpacked(found.base, layout))
            bar.update(len(part))
    values = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    before = {f"{name}_before": torch.cat([b[name] for b in bases]) for name in bases[0]}
    return _result(
        model, values, before, names, labels, starts, ends,
        provenance(
            model, method="patchscope", source_model=fingerprint(origin),
            mapping=None if mapping is None else type(mapping).__name__,
            source_position=str(source_position), target_position=str(target_position),
        ),
    )  # fmt: skip


def states_of(
    model: HookedModel, prompts: Sequence[Prompt], places: Sequence[int], *, layers: Sequence[int]
) -> Float[Tensor, "prompt layer d_model"]:
    """The stream of each prompt at one position, after some numbers of blocks."""
    out: list[Tensor | None] = [None] * len(prompts)
    for chosen, batch in batches([p.ids for p in prompts], 64):
        cells = (torch.arange(len(chosen)), torch.tensor([places[i] for i in chosen]))
        found = gather(model, batch.tokens, cells, kind="resid", layers=layers).read
        place = device_of(model)  # layers may lie on several devices
        stacked = torch.stack([found[layer].to(place) for layer in layers], dim=1)
        for i, row in zip(chosen, stacked, strict=True):
            out[i] = row
    return torch.stack([row for row in out if row is not None])


def patchscope_generate(
    model: HookedModel,
    source: str | Prompt,
    target: str | Prompt,
    *,
    source_layer: int,
    target_layer: int,
    source_position: Where = -1,
    target_position: Where = -1,
    source_model: HookedModel | None = None,
    mapping: Map | None = None,
    max_new_tokens: int = 16,
    stop: Sequence[str] = STOP,
) -> Generation:
    """Greedy continuation of the target under one state of the source; an entity's description.

    Raises:
        ValueError, TokenError: as `patchscope`.
    """
    origin = model if source_model is None else source_model
    (start,), (end,) = _layers(origin, [source_layer]), _layers(model, [target_layer])
    given, aim = _prompts(origin, source)[0], _prompts(model, target)[0]
    _check_widths(origin, model, mapping)
    state = states_of(origin, [given], [last_position(given, source_position)], layers=[start])
    vector = _mapped(mapping, state[0, 0], start, end, model)
    repair = Transplant(end, last_position(aim, target_position))
    (said,) = generate(
        model, [aim], repair=repair, states=[vector], max_new_tokens=max_new_tokens, stop=stop
    )
    return said


@dataclass(frozen=True)
class Transplant:
    """Replaces the stream after `layer` blocks at one position by each row's state.

    It meets `repair.Repair` as far as rows go: its states are vectors, not made from facts.
    """

    layer: int
    position: int
    name: str = "transplant"

    def fit(self, model: HookedModel, facts: Sequence[Any]) -> list[Any]:
        """Refused: the states come from other prompts.

        Raises:
            ValueError: always.
        """
        raise ValueError("a transplant's states are vectors; take them with states_of")

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
    (start,), (end,) = _layers(source, [source_layer]), _layers(target, [target_layer])
    pairs: list[tuple[Tensor, Tensor]] = []
    # Cut to the shorter context, so that texts fall into the same pieces.
    length = min(int(source.cfg.n_ctx), int(target.cfg.n_ctx), max_tokens)
    texts = (corpus, corpus) if isinstance(corpus, str | Path) else tee(corpus)
    both = zip_longest(
        *(
            token_batches(side, given, max_tokens=max_tokens, max_length=length)
            for side, given in zip((source, target), texts, strict=True)
        )
    )
    for first, second in both:
        if (
            first is None
            or second is None
            or _words(source, first.tokens) != _words(target, second.tokens)
        ):
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


def _prompts(model: HookedModel, given: str | Prompt | Sequence[str | Prompt]) -> list[Prompt]:
    items = [given] if isinstance(given, str | Prompt) else list(given)
    if not items:
        raise ValueError("no prompt was given")
    return [encode(model, p) if isinstance(p, str) else p for p in items]


def _layers(model: HookedModel, layers: Sequence[int] | None) -> list[int]:
    return check_layers(model, "resid", layers)


def _places(prompts: Sequence[Prompt], where: Where | Sequence[Where], name: str) -> list[int]:
    if isinstance(where, Sequence) and not isinstance(where, str):
        if len(where) != len(prompts):
            raise ValueError(f"{name} gives {len(where)} positions for {len(prompts)} prompts")
        each = list(where)
    else:
        each = [where] * len(prompts)
    return [last_position(p, w) for p, w in zip(prompts, each, strict=True)]


def _words(model: HookedModel, tokens: Tensor) -> list[list[str]]:
    """Tokens as texts, "" for special ones; without spaces, which vocabularies write differently."""
    rows = tokens.tolist()
    special = set(model.tokenizer.all_special_ids)
    texts = {
        i: "" if i in special else model.tokenizer.decode([i]).strip()
        for i in {i for row in rows for i in row}
    }
    return [[texts[i] for i in row] for row in rows]


def _check_widths(origin: HookedModel, model: HookedModel, mapping: Map | None) -> None:
    if mapping is None and origin.cfg.d_model != model.cfg.d_model:
        raise ValueError(
            f"the source model is {origin.cfg.d_model} wide, the target {model.cfg.d_model}; pass a "
            "mapping (fit_affine makes one)"
        )


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


def _packed(
    tracked: Tracked | None, top_k: int, layout: dict[str, int]
) -> Callable[[Tensor, list[int]], Tensor]:
    """A fan-out reduction to one row of float64 numbers; `layout` gets names and widths."""

    def reduce(logits: Tensor, bases: list[int]) -> Tensor:
        wide = logits[:, 0].to(wide_dtype(logits.dtype))
        of = torch.tensor(bases)
        mine = None if tracked is None else Tracked(tracked.ids[of], tracked.starts[of])
        found = statistics(wide, mine, top_k=top_k)
        columns = {n: v.double().reshape(len(bases), -1) for n, v in found.items()}
        layout.update({name: column.shape[1] for name, column in columns.items()})
        return torch.cat(list(columns.values()), dim=1)

    return reduce


def _unpacked(packed: Tensor, layout: Mapping[str, int]) -> dict[str, Tensor]:
    parts = packed.split(list(layout.values()), dim=-1)
    return {
        name: part[..., 0] if name == "entropy" else part
        for name, part in zip(layout, parts, strict=True)
    }


def _result(
    model: HookedModel,
    values: dict[str, Tensor],
    before: dict[str, Tensor],
    names: Sequence[str],
    labels: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
    origin: dict[str, Any],
) -> Result:
    grid = ("example", "source_layer", "target_layer")
    last = dict.fromkeys(TRACKED, ("tracked",)) | {"top_ids": ("k",), "top_probs": ("k",)}

    def labelled(found: dict[str, Tensor], dims: tuple[str, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        order = sorted(found, key=lambda n: n.removesuffix("_before") not in TRACKED)
        for name in order:
            plain = name.removesuffix("_before")
            where, value = (*dims, *last.get(plain, ())), found[name]
            if plain == "top_ids":
                out[name.replace("top_ids", "top_tokens")] = (where, decoded(model, value.long()))
            else:
                out[name] = (where, value)
        return out

    found, untouched = labelled(values, grid), labelled(before, grid[:1])
    coords: dict[str, Any] = dict(zip(grid, (labels, starts, ends), strict=True))
    if names:
        coords["tracked"] = list(names)
    units = {n: UNITS[p] for n in (*found, *untouched) if (p := n.removesuffix("_before")) in UNITS}
    return Result.from_arrays(
        found, baselines=untouched, coords=coords, units=units, title="patchscope",
        provenance=origin,
    )  # fmt: skip
