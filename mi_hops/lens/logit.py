"""The lens as a result: tracked names, rank, entropy and top tokens at any layer and position.

With no lens given this is the logit lens (nostalgebraist 2020): the model's own unembedding read at
an intermediate activation. ``lens="raw"`` leaves out the final norm, as *Memory Injections* (arXiv
2309.05605) and CREME (arXiv 2402.14328) do. Any other `Lens` goes through the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mi_hops.cases import Case, usable
from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens.tracking import (
    ROLES,
    Positions,
    Prompts,
    Row,
    Track,
    labelled_prompts,
    resolve,
    spell,
    spell_all,
    tracked_tokens,
)
from mi_hops.lens.vectors import (
    Layers,
    Lens,
    LensLike,
    Vectors,
    as_lens,
    chunks,
    gather,
    in_batches,
    resolve_layers,
    statistics,
)
from mi_hops.model import HookedModel, provenance, read_out
from mi_hops.result.names import readable, spelled_out
from mi_hops.result.result import Result
from mi_hops.sweep.pairs import Activations
from mi_hops.text.tokens import Prompt, last_position

if TYPE_CHECKING:
    import plotly.graph_objects as go

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
#: Variables of tracked names, and the last dimension of every variable that has one of its own.
TRACKED = ("prob", "logprob", "rank", "mean_token_prob", "any_prob")
LAST = dict.fromkeys(TRACKED, "tracked") | {"top_ids": "k", "top_probs": "k", "logprobs": "vocab"}


@dataclass(frozen=True)
class Readout:
    """What to keep of the logits, besides entropy and tracked names.

    Args:
        top_k: so many of the most probable tokens, and their probabilities.
        kl: KL to the model's output at the same position (the pass then runs to the end).
        logprobs: all log-probabilities; takes examples x layers x positions x vocabulary.
    """

    top_k: int = 0
    kl: bool = True
    logprobs: bool = False


def logit_lens(
    model: HookedModel,
    prompts: Prompts,
    *,
    track: Track | None = None,
    positions: Positions = "last",
    kind: str = "resid",
    layers: Layers = None,
    lens: LensLike = "logit",
    readout: Readout = Readout(),
    cache: Activations | None = None,
    batch_size: int = 32,
) -> Result:
    """Read the activations of one or more prompts through a lens.

    Prompts are batched with padding on the right, which no position that is read ever sees. Hooks
    that are on the model (``with model.hooks(...)``) act before anything is read.

    Args:
        prompts: one prompt, several, or label -> prompt: text, `Prompt`, or token ids (``[pos]``,
            ``[batch, pos]``), which run as they are.
        track: name -> what to follow. For one prompt a text, a list of spellings (the first is the
            main one) or token ids; for several prompts a sequence with one of these for each.
            Texts are tokenised as continuations of their prompt.
        positions: ``"last"``, ``"each"`` token by itself (prompts of one length), an index, slice or
            substring, or role -> position (one for all prompts, or one for each).
        kind: what is read, one of `KINDS` or a hook name (``"blocks.3.hook_mlp_out"``). ``"resid"``
            counts the blocks passed: layer 0 is the embedding, layer ``n_layers`` what the final
            norm gets.
        layers: one or several; default all that `kind` has.
        lens: ``"logit"``, ``"raw"`` (without the final norm), or a `Lens`.
        readout: what is kept besides the tracked names.
        cache: an `ActivationCache` of a run of these prompts, read instead of running them.

    Returns:
        Result with dimensions ``example, layer, position`` (and ``head`` for ``"result"``):
        ``entropy`` (nats), ``kl`` = KL(output || lens) (nats), ``top_tokens``, ``top_probs`` (with
        ``k``, labelled ``top_id``), ``logprobs`` (with ``vocab``); and with a dimension ``tracked``: ``prob``,
        ``logprob`` (nats), ``rank`` (1 = top) of the main spelling's first token, ``mean_token_prob``,
        the mean probability of all its tokens at this one position (the papers' score), and
        ``any_prob``, the summed probability of the distinct first tokens of all spellings.

    Raises:
        ValueError: an unknown kind, a layer out of range, a lens of another model, a track or roles
            that do not fit the prompts, a cache of other prompts, a non-finite value.
        TokenError: an empty prompt or name, a span that is not in its prompt.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> read = mi_hops.logit_lens(model, "The spouse of Ondo is", track={"a name": "Mara"})
        >>> dict(read["rank"].sizes)
        {'example': 1, 'layer': 7, 'position': 1, 'tracked': 1}
    """
    labels, known, alone = labelled_prompts(model, prompts)
    names, places = resolve(known, positions, alone=alone)
    spelled = spell_all(model, known, track, alone=alone)
    rows = [Row(*row) for row in zip(labels, known, places, spelled, strict=True)]
    reader = _Reader.of(model, kind, layers, lens, readout)
    coords: dict[str, Any] = {"position": names}
    tokens = [[prompt.labels[i] for i in at] for prompt, at in zip(known, places, strict=True)]
    if alone:
        coords["token"] = ("position", tokens[0])
    else:
        coords["token"] = (("example", "position"), np.array(tokens, dtype=object))
    return reader.result(rows, coords, batch_size, cache, method="logit_lens")


def fact_trajectories(
    model: HookedModel,
    facts: Sequence[TwoHopFact],
    *,
    form: str | None = None,
    bridges: Literal["seen", "all"] = "seen",
    kind: str = "resid",
    layers: Layers = None,
    lens: LensLike = "logit",
    aliases: bool = False,
    readout: Readout = Readout(kl=False),
    batch_size: int = 64,
) -> Result:
    """Track bridge and answer through the layers on two-hop prompts.

    Read at two roles, ``"first hop"`` (the last token of `fact.first_hop` in the prompt) and
    ``"last"`` (the last token). Facts whose prompt, names or first hop cannot be tokenised or found
    are skipped, with the reason.

    Args:
        form: form of the two-hop prompt; default each fact's first.
        bridges: of longer chains, the bridge that each is ``"seen"`` from, or ``"all"``: then
            ``tracked`` = bridge 1, bridge 2, ..., answer and ``position`` = hop 1, hop 2, ..., last,
            hop k being the last token of the phrase that describes bridge k (of nested phrases that
            end alike it is the same token). All facts then have one number of hops.
        kind, layers, lens, readout: as in `logit_lens`; layer 0 of ``"resid"`` is the embedding.
        aliases: let aliases count in ``any_prob``.

    Returns:
        As `logit_lens`, with ``tracked`` = bridge, answer and ``position`` = first hop, last;
        ``example`` holds the facts' ids. ``result.sel(tracked="bridge").ci(variable="prob")`` is the
        mean curve with its interval.

    Raises:
        NoUsableFactError: no fact is left to read.
        ValueError: all bridges of facts with different numbers of hops; see also `logit_lens`.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> facts = mi_hops.Hopland().two_hop_facts("seen_parts")[:4]
        >>> curve = mi_hops.fact_trajectories(model, facts).mean()["prob"]
        >>> curve.sel(tracked="bridge", position="first hop").dims
        ('layer',)
    """
    roles = _roles(facts, bridges)

    def prepare(case: Case) -> Row:
        hops, fact = case.fact.hops, case.fact
        read = hops[:-1] if bridges == "all" else hops[fact.at_bridge - 1 : fact.at_bridge]
        tracked = {
            name: spell(model, case.prompt, (hop.object, *(hop.aliases if aliases else ())))
            for name, hop in zip(roles, (*read, hops[-1]), strict=True)
        }
        places = [*(last_position(case.prompt, hop.phrase) for hop in read), case.prompt.last]
        return Row(fact.id, case.prompt, places, tracked)

    rows, skipped = usable(model, facts, prepare, purpose="the lens", form=form)
    reader = _Reader.of(model, kind, layers, lens, readout)
    coords = {"position": list(roles.values())}
    return reader.result(rows, coords, batch_size, method="fact_trajectories", skipped=skipped)


def _roles(facts: Sequence[TwoHopFact], bridges: str) -> dict[str, str]:
    """What is tracked -> the position that is read for it."""
    if bridges == "seen":
        return dict(zip(("bridge", "answer"), ROLES, strict=True))
    if bridges != "all":
        raise ValueError(f"bridges is {bridges!r}; expected 'seen' or 'all'")
    lengths = sorted({fact.n_hops for fact in facts})
    if len(lengths) > 1:
        raise ValueError(
            f"these facts have {lengths} hops; all bridges are read of facts with one number of hops, "
            "so pass those of each number by themselves"
        )
    numbers = range(1, max(lengths, default=2))
    return {**{f"bridge {k}": f"hop {k}" for k in numbers}, "answer": "last"}


def token_map(
    model: HookedModel,
    prompt: str | Prompt | Tensor,
    *,
    kind: str = "resid",
    layers: Layers = None,
    lens: LensLike = "logit",
    top_k: int = 5,
    cache: Activations | None = None,
) -> Result:
    """The top tokens in each layer x position cell of one prompt; draw it with `plot_map`.

    Args:
        top_k: tokens per cell.
        kind, layers, lens, cache: as in `logit_lens`.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> top = mi_hops.token_map(model, "The spouse of Ondo is")
        >>> top["top_tokens"].dims
        ('example', 'layer', 'position', 'k')
    """
    return logit_lens(
        model,
        prompt,
        positions="each",
        kind=kind,
        layers=layers,
        lens=lens,
        readout=Readout(top_k=top_k),
        cache=cache,
    )


def plot_map(result: Result, *, variable: str = "top_probs", **keywords: Any) -> go.Figure:
    """Layer x position heatmap of a `token_map`, with the top token in each cell and more on hover.

    Args:
        variable: what the colours show: ``"top_probs"`` (of the top token), ``"entropy"``, ``"kl"``.
        keywords: for `plots.heatmap`.

    Raises:
        ValueError: a result without top tokens, of several prompts, or of heads.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> figure = mi_hops.plot_map(mi_hops.token_map(model, "The spouse of Ondo is"))
        >>> figure.data[0].type
        'heatmap'
    """
    from mi_hops.result import plots
    from mi_hops.result.figure_parts import markup

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
    options: dict[str, Any] = {
        "x": "position",
        "y": "layer",
        "title": f"Top token by layer and position: {spelled_out(result.title)}",
        "colours": plots.Colours(readable(variable), sequential=True),
        "hover": {f"token {k + 1}": tokens.isel(k=k) for k in range(tokens.sizes["k"])},
    }
    figure = plots.heatmap(values, **{**options, **keywords})
    cells = tokens.isel(k=0).transpose("layer", "position").values
    shown = [[markup(str(token)) for token in row] for row in cells]
    figure.data[0].update(text=shown, texttemplate="%{text}")
    return figure


def read_vectors(
    model: HookedModel,
    vectors: Float[Tensor, "vector d_model"],
    *,
    track: Mapping[str, int] | None = None,
    lens: LensLike = "logit",
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

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> mi_hops.read_vectors(model, model.W_U[:, :2].T)["top_tokens"].sizes["vector"]
        2
    """
    if vectors.ndim != 2 or vectors.shape[1] != model.cfg.d_model or not len(vectors):
        raise ValueError(
            f"expected vectors [vector, {model.cfg.d_model}], got {tuple(vectors.shape)}"
        )
    names = dict(track or {})
    wrong = {n: i for n, i in names.items() if not 0 <= i < model.cfg.d_vocab}
    if wrong:
        raise ValueError(f"token ids {wrong} are outside the vocabulary 0..{model.cfg.d_vocab - 1}")
    reader = _Reader(model, "vector", [layer], [head], as_lens(model, lens), Readout(top_k))
    followed = {name: [(i,)] for name, i in names.items()}
    with torch.no_grad():
        read = reader.values(Vectors({layer: vectors[:, None]}, None), [followed] * len(vectors))
    found = variables(model, {n: v[:, 0, 0] for n, v in read.items()}, ("vector",))
    coords: dict[str, Any] = {"vector": range(len(vectors))}
    if names:
        coords["tracked"] = list(names)
    origin = provenance(model, method="read_vectors", lens=reader.lens.name, kind="vector")
    return Result.from_arrays(found, coords=coords, units=units_of(found), provenance=origin)


# -- the work -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """What is read, through which lens, and what is kept of it."""

    model: HookedModel
    kind: str
    layers: Sequence[int]
    heads: Sequence[int | None]  # [None] where vectors are whole
    lens: Lens
    readout: Readout

    @classmethod
    def of(
        cls, model: HookedModel, kind: str, layers: Layers, lens: LensLike, readout: Readout
    ) -> _Reader:
        name, chosen = resolve_layers(model, kind, layers)
        heads = list(range(model.cfg.n_heads)) if name == "result" else [None]
        return cls(model, name, chosen, heads, as_lens(model, lens), readout)

    def result(
        self,
        rows: Sequence[Row],
        coords: Mapping[str, Any],
        batch_size: int,
        cache: Activations | None = None,
        *,
        method: str,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> Result:
        """What the rows say.

        Args:
            coords: of the positions; the others come from the reader and the rows.
        """

        def read(chosen: list[int], tokens: Tensor, at: Tensor) -> dict[str, Tensor]:
            part = [rows[i] for i in chosen]
            cells = (at[:, None], torch.tensor([list(row.places) for row in part]))
            options: dict[str, Any] = {"kind": self.kind, "layers": self.layers, "cache": cache}
            vectors = gather(self.model, tokens, cells, final=self.readout.kl, **options)
            return self.values(vectors, [row.tracked for row in part for _ in row.places])

        found = in_batches(self.model, [row.prompt for row in rows], batch_size, read, cache)
        labels = {"example": [row.label for row in rows], "layer": list(self.layers), **coords}
        dims = ["example", "layer", "position"]
        if self.kind == "result":
            dims, labels["head"] = [*dims, "head"], list(self.heads)
        if rows[0].tracked:
            labels["tracked"] = list(rows[0].tracked)
        values = variables(self.model, found, dims)
        if "top_ids" in found:  # by their texts, parts of a character are all alike
            labels["top_id"] = ((*dims, LAST["top_ids"]), found["top_ids"].long())
        what = rows[0].prompt.text if len(rows) == 1 else f"{len(rows)} prompts"
        return Result.from_arrays(
            values,
            coords=labels,
            units=units_of(values),
            title=f"{self.lens.name} lens, {readable(self.kind)}: {what}",
            skipped=skipped,
            provenance=provenance(self.model, method=method, lens=self.lens.name, kind=self.kind),
        )

    def values(self, vectors: Vectors, names: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``[row, layer, position, ...]`` (and head, before what a variable has of its own).

        Args:
            names: what is followed, for each (row, position).
        """
        tracked = tracked_tokens(names)
        n_rows = len(vectors.read[self.layers[0]])
        flat = "row place ... -> (row place) ..."
        read = {layer: rearrange(x, flat) for layer, x in vectors.read.items()}
        parts = []
        for part in chunks(self.model, len(names)):
            output = None
            if vectors.final is not None:
                final = rearrange(vectors.final, flat)[part]
                output = read_out(self.model, final, norm=False).log_softmax(-1)
            cells = [
                statistics(
                    self.lens.logits(x if x.ndim == 2 else x[:, head], layer=layer, head=head),
                    tracked and tracked[part],
                    output=output,
                    top_k=self.readout.top_k,
                    logprobs=self.readout.logprobs,
                )
                for layer in self.layers
                for x in [read[layer][part]]
                for head in self.heads
            ]
            parts.append({n: torch.stack([cell[n] for cell in cells], 1) for n in cells[0]})
        head = " head" if self.kind == "result" else ""
        shape = f"(row place) (layer{head}) ... -> row layer place{head} ..."
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {
            name: rearrange(value, shape, row=n_rows, layer=len(self.layers))
            for name, value in joined.items()
        }


def variables(
    model: HookedModel, found: Mapping[str, Tensor], dims: Sequence[str]
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """What `statistics` found as variables of a result, on `dims`; top tokens as texts.

    What was tracked comes first: the first variable is what a `Result` means by default.
    """
    values: dict[str, tuple[tuple[str, ...], Any]] = {}
    for name in sorted(found, key=lambda name: name not in TRACKED):
        own = (*dims, *([LAST[name]] if name in LAST else []))
        if name == "top_ids":
            values["top_tokens"] = (own, _decoded(model, found[name].long()))
        else:
            values[name] = (own, found[name])
    return values


def units_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Units of the variables that have one."""
    return {name: UNITS[name] for name in values if name in UNITS}


def _decoded(model: HookedModel, ids: Tensor) -> np.ndarray:
    """Token ids as texts, an object array of the same shape."""
    texts = {i: model.tokenizer.decode([i]) for i in ids.unique().tolist()}
    return np.vectorize(texts.__getitem__, otypes=[object])(ids.numpy())
