"""The lens as a result: tracked names, rank, entropy and top tokens at any layer and position.

With no lens given this is the logit lens (nostalgebraist 2020): the model's own unembedding read at
an intermediate activation. ``norm=True`` applies the final norm first; ``norm=False`` is the raw form
of *Memory Injections* (arXiv 2309.05605) and CREME (arXiv 2402.14328). Any other `reading.Lens`
goes through the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.lens.reading import (
    Lens,
    LogitLens,
    Tracked,
    check_layers,
    check_lens,
    chunks,
    gather,
    statistics,
)
from mi_hops.lens.tracking import Positions, Spelling, resolve, spell_all, tracked_tokens
from mi_hops.model import Hook, HookedModel, provenance, read_out
from mi_hops.result.result import Result
from mi_hops.text.tokens import Prompt, batches, encode

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jaxtyping import Float
    from torch import Tensor

    from mi_hops.facts.fact import TwoHopFact

UNITS = {
    "prob": "probability",
    "logprob": "nats",
    "rank": "rank",
    "mean_token_prob": "probability",
    "any_prob": "probability",
    "entropy": "nats",
    "kl": "nats",
    "top_probs": "probability",
    "logprobs": "nats",
}
#: What is told of tracked names.
TRACKED = ("prob", "logprob", "rank", "mean_token_prob", "any_prob")


def logit_lens(
    model: HookedModel,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    track: Mapping[str, Spelling | Sequence[Spelling]] | None = None,
    positions: Positions = "last",
    kind: str = "resid",
    layers: Sequence[int] | None = None,
    norm: bool = True,
    lens: Lens | None = None,
    compare_output: bool = True,
    top_k: int = 0,
    full: bool = False,
    hooks: Sequence[Hook] = (),
    batch_size: int = 32,
    examples: Sequence[str] | None = None,
) -> Result:
    """Read activations of one prompt or many through a lens.

    Prompts are batched with padding on the right, which no position that is read ever sees.

    Args:
        prompts: one prompt, or several.
        track: name -> what to follow. For one prompt a text, a list of spellings (the first is the
            main one) or token ids; for several prompts a sequence with one of these for each.
            Texts are tokenised as continuations of their prompt.
        positions: ``"last"``, ``"all"`` (one prompt), an index, slice or substring, or a mapping of
            role -> position (one for all prompts, or one for each).
        kind: what is read, one of `reading.KINDS`. ``"resid"`` counts blocks passed: layer 0 is the
            embedding, layer ``n_layers`` is what the final norm gets.
        layers: default all that `kind` has.
        norm: apply the final norm before the unembedding (ignored where `lens` is given).
        lens: another lens in place of the model's own read-out.
        compare_output: also report KL to the model's output at the same position.
        top_k: also report the `top_k` tokens.
        full: also keep all log-probabilities; takes examples x layers x positions x vocabulary.
        hooks: interventions during the forward pass; they must act on every row alike.
        examples: labels of the prompts; default their numbers.

    Returns:
        Result with dimensions ``example, layer, position`` (and ``head`` for ``head_out``):
        ``entropy`` (nats), ``kl`` = KL(output || lens) (nats), ``top_tokens``, ``top_probs`` (with
        ``k``), ``logprobs`` (with ``vocab``); and with a dimension ``tracked``: ``prob``,
        ``logprob`` (nats), ``rank`` (1 = top) of the main spelling's first token, ``mean_token_prob``,
        the mean probability of all its tokens at this one position (the papers' score), and
        ``any_prob``, the summed probability of the distinct first tokens of all spellings.

    Raises:
        ValueError: an unknown kind, a layer out of range, a lens of another model, a track or roles
            that do not fit the prompts, ``"all"`` for several prompts, a non-finite value.
        TokenError: an empty prompt or name, a span that is not in its prompt.
    """
    single = isinstance(prompts, str | Prompt)
    given = [prompts] if isinstance(prompts, str | Prompt) else prompts
    known = [encode(model, p) if isinstance(p, str) else p for p in given]
    if not known:
        raise ValueError("no prompt was given")
    spelled = spell_all(model, known, track or {}, single=single)
    roles, places = resolve(known, positions, single=single)
    labels: list[Any] = list(roles) if roles is not None else places[0]
    coords: dict[str, Any] = {"position": labels}
    if single:
        coords["token"] = ("position", [known[0].labels[i] for i in places[0]])
    names = examples if examples is not None else [str(i) for i in range(len(known))]
    if len(names) != len(known):
        raise ValueError(f"got {len(names)} labels in examples for {len(known)} prompts")
    return _read(
        model, known, places, spelled, lens or LogitLens(model, norm), kind=kind,
        layers=check_layers(model, kind, layers), compare_output=compare_output, top_k=top_k,
        full=full, hooks=hooks, batch_size=batch_size, coords={"example": list(names), **coords},
    )  # fmt: skip


def fact_trajectories(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    kind: str = "resid",
    layers: Sequence[int] | None = None,
    norm: bool = True,
    lens: Lens | None = None,
    aliases: bool = False,
    compare_output: bool = False,
    batch_size: int = 64,
) -> Result:
    """Bridge and answer through the layers of two-hop prompts.

    Read at two roles, ``"first hop"`` (the last token of `fact.first_hop` in the prompt) and
    ``"last"`` (the last token). Facts whose prompt, names or first hop cannot be tokenised or found
    are skipped, with the reason.

    Args:
        form: form of the two-hop prompt; default each fact's first.
        kind, layers, norm, lens, compare_output: as in `logit_lens`; layer 0 of ``"resid"`` is the
            embedding.
        aliases: let aliases count in ``any_prob``.

    Returns:
        As `logit_lens`, with ``tracked`` = bridge, answer and ``position`` = first hop, last;
        ``example`` holds the facts' ids. ``result.sel(tracked="bridge").ci(variable="prob")`` is the
        mean curve with its interval.

    Raises:
        NoUsableFactError: no fact is left to read; see also `logit_lens`.
    """
    kept: list[TwoHopFact] = []
    prompts: list[Prompt] = []
    places: list[list[int]] = []
    spelled: list[dict[str, list[tuple[int, ...]]]] = []
    skipped: list[tuple[str, str]] = []
    for fact in facts:
        more = (fact.bridge_aliases, fact.answer_aliases) if aliases else ((), ())
        names = {"bridge": (fact.bridge, *more[0]), "answer": (fact.answer, *more[1])}
        try:
            prompt = encode(model, fact.prompt(form))
            _, (place,) = resolve([prompt], {"first hop": fact.first_hop, "last": -1}, single=True)
            (tokens,) = spell_all(model, [prompt], names, single=True)
        except ValueError as error:
            skipped.append((fact.id, str(error)))
            continue
        kept.append(fact)
        prompts.append(prompt)
        places.append(place)
        spelled.append(tokens)
    if not kept:
        raise NoUsableFactError("the lens", skipped)
    return _read(
        model, prompts, places, spelled, lens or LogitLens(model, norm), kind=kind,
        layers=check_layers(model, kind, layers), compare_output=compare_output,
        batch_size=batch_size, skipped=skipped, method="fact_trajectories",
        coords={"example": [f.id for f in kept], "position": ["first hop", "last"]},
    )  # fmt: skip


def token_map(
    model: HookedModel,
    prompt: str | Prompt,
    *,
    kind: str = "resid",
    layers: Sequence[int] | None = None,
    norm: bool = True,
    lens: Lens | None = None,
    top_k: int = 5,
) -> Result:
    """The top tokens in each layer x position cell of one prompt; draw it with `plot_map`."""
    return logit_lens(
        model, prompt, positions="all", kind=kind, layers=layers, norm=norm, lens=lens, top_k=top_k
    )


def plot_map(result: Result, *, variable: str = "top_probs", **keywords: Any) -> go.Figure:
    """Layer x position heatmap of a `token_map`: the top token in each cell, all of them on hover.

    Args:
        variable: what the colours show: ``"top_probs"`` (of the top token), ``"entropy"``, ``"kl"``.
        keywords: for `plots.heatmap`.

    Raises:
        ValueError: a result without top tokens, of several prompts, or of heads.
    """
    from mi_hops.result import plots

    if "top_tokens" not in result.data:
        raise ValueError("there are no top tokens in this result; make it with token_map")
    if result.data.sizes["example"] != 1 or "head" in result.data.dims:
        raise ValueError(
            "a map shows one prompt; select an example, and a head with result.sel(head=...)"
        )
    tokens = result["top_tokens"].isel(example=0)
    values = result[variable].isel(example=0)
    if "k" in values.dims:
        values = values.isel(k=0)
    unit = result[variable].attrs.get("units", "")
    options: dict[str, Any] = {
        "x": "position", "y": "layer", "title": f"Top token by layer and position: {result.title}",
        "colour_label": f"{variable} ({unit})", "sequential": True,
        "hover": {f"token {k + 1}": tokens.isel(k=k) for k in range(tokens.sizes["k"])},
    }  # fmt: skip
    figure = plots.heatmap(values, **{**options, **keywords})
    cells = tokens.isel(k=0).transpose("layer", "position").values
    figure.data[0].update(text=cells, texttemplate="%{text}")
    return figure


def read_vectors(
    model: HookedModel,
    vectors: Float[Tensor, "vector d_model"],
    *,
    track: Mapping[str, int] | None = None,
    norm: bool = True,
    lens: Lens | None = None,
    layer: int = 0,
    head: int | None = None,
    top_k: int = 10,
) -> Result:
    """Read any vectors of width d_model: a memory, an edit's change, a row of W_out, a probe.

    Args:
        track: name -> token id.
        layer, head: where the vectors come from, for lenses that differ by place.

    Returns:
        As `logit_lens`, with the dimension ``vector`` only.

    Raises:
        ValueError: vectors of another shape, token ids outside the vocabulary, or a lens of
            another model.
    """
    if vectors.ndim != 2 or vectors.shape[1] != model.cfg.d_model or not len(vectors):
        raise ValueError(
            f"expected vectors [vector, {model.cfg.d_model}], got {tuple(vectors.shape)}"
        )
    names = dict(track or {})
    wrong = {n: i for n, i in names.items() if not 0 <= i < model.cfg.d_vocab}
    if wrong:
        raise ValueError(f"token ids {wrong} are outside the vocabulary 0..{model.cfg.d_vocab - 1}")
    ids = torch.tensor(list(names.values()), dtype=torch.long)[None, :, None]
    glass = lens or LogitLens(model, norm)
    check_lens(model, glass)
    parts = []
    with torch.no_grad():
        for rows in chunks(model, len(vectors)):
            logits = glass.logits(vectors[rows], layer=layer, head=head)
            same = ids.expand(len(logits), -1, -1)
            parts.append(statistics(logits, Tracked(same, same) if names else None, top_k=top_k))
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _result(
        model, glass, found, {"vector": range(len(vectors))}, names=list(names), kind="vector",
        method="read_vectors",
    )  # fmt: skip


# -- the work -------------------------------------------------------------------------------------


def _read(
    model: HookedModel,
    prompts: Sequence[Prompt],
    places: Sequence[Sequence[int]],
    spelled: Sequence[Mapping[str, list[tuple[int, ...]]]],
    lens: Lens,
    *,
    kind: str,
    layers: Sequence[int],
    compare_output: bool,
    batch_size: int,
    coords: dict[str, Any],
    top_k: int = 0,
    full: bool = False,
    hooks: Sequence[Hook] = (),
    skipped: Sequence[tuple[str, str]] = (),
    method: str = "logit_lens",
) -> Result:
    check_lens(model, lens)
    names = list(spelled[0])
    n_places = len(places[0])
    n_heads = int(model.cfg.n_heads) if kind == "head_out" else 0
    shape = (len(prompts), len(layers), n_places, *([n_heads] if n_heads else []))
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for chosen, batch in batches([p.ids for p in prompts], batch_size):
            where = torch.tensor([list(places[i]) for i in chosen])
            cells = (torch.arange(len(chosen))[:, None], where)
            vectors = gather(
                model, batch.tokens, cells, kind=kind, layers=layers, final=compare_output,
                hooks=hooks,
            )  # fmt: skip
            # One vector for each (row, place): these share their tracked tokens and their output.
            tracked = tracked_tokens([spelled[i] for i in chosen for _ in range(n_places)])
            index = torch.tensor([[i, j] for i in chosen for j in range(n_places)])
            for part in chunks(model, len(index)):
                output = None
                if vectors.final is not None:
                    final = vectors.final.flatten(0, 1)[part]
                    output = read_out(model, final, norm=False).log_softmax(-1)
                rows, columns = index[part].T
                for at, layer in enumerate(layers):
                    flat = vectors.read[layer].flatten(0, 1)[part]
                    for head in range(n_heads) if n_heads else [None]:
                        logits = lens.logits(
                            flat if head is None else flat[:, head], layer=layer, head=head
                        )
                        found = statistics(
                            logits, tracked[part] if names else None, output=output, top_k=top_k
                        )
                        if full:
                            found["logprobs"] = logits.log_softmax(-1).cpu()
                        for name, value in found.items():
                            if name not in out:
                                out[name] = value.new_zeros((*shape, *value.shape[1:]))
                            cell = (
                                (rows, at, columns) if head is None else (rows, at, columns, head)
                            )
                            out[name][cell] = value
    sizes = {"example": coords["example"], "layer": list(layers), "position": coords["position"]}
    if n_heads:
        sizes["head"] = list(range(n_heads))
    extra = {name: value for name, value in coords.items() if name not in sizes}
    title = prompts[0].text if len(prompts) == 1 else f"{len(prompts)} prompts"
    return _result(
        model, lens, out, sizes, extra=extra, names=names, kind=kind, method=method,
        title=f"{lens.name} lens, {kind}: {title}", skipped=skipped,
    )  # fmt: skip


def _result(
    model: HookedModel,
    lens: Lens,
    found: Mapping[str, Tensor],
    sizes: Mapping[str, Any],
    *,
    names: Sequence[str],
    kind: str,
    method: str,
    extra: Mapping[str, Any] | None = None,
    title: str = "",
    skipped: Sequence[tuple[str, str]] = (),
) -> Result:
    dims = tuple(sizes)
    values: dict[str, tuple[tuple[str, ...], Any]] = {}
    # What was tracked comes first: the first variable is what `Result` means by default.
    for name in (*TRACKED, *(n for n in found if n not in TRACKED)):
        if name not in found:
            continue
        if name == "top_ids":
            values["top_tokens"] = ((*dims, "k"), decoded(model, found[name]))
        else:
            last = {"top_probs": ("k",), "logprobs": ("vocab",)}
            more = last.get(name, ("tracked",) if name in TRACKED else ())
            values[name] = ((*dims, *more), found[name])
    coords = {**sizes, **(extra or {})}
    if names:
        coords["tracked"] = list(names)
    units = {name: unit for name, unit in UNITS.items() if name in values}
    return Result.from_arrays(
        values, coords=coords, units=units, title=title, skipped=skipped,
        provenance=provenance(model, method=method, lens=lens.name, kind=kind),
    )  # fmt: skip


def decoded(model: HookedModel, ids: Tensor) -> Any:
    """Token ids as texts, an object array of the same shape."""
    import numpy as np

    flat = ids.flatten().tolist()
    texts = {i: model.tokenizer.decode([i]) for i in set(flat)}
    return np.array([texts[i] for i in flat], dtype=object).reshape(tuple(ids.shape))


__all__ = [
    "LogitLens",
    "fact_trajectories",
    "logit_lens",
    "plot_map",
    "read_vectors",
    "token_map",
]
