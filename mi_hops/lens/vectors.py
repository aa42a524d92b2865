"""Activations at chosen positions, and what they say once turned into logits.

Every lens works in the same two steps: `gather` takes vectors of width d_model out of a forward
pass (or out of a cache), at the asked positions only, and `statistics` reduces the logits that a
lens makes of them to a few values each, a chunk at a time, so that layers x positions x vocabulary
never exist at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from einops import rearrange, reduce
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.model import (
    Hook,
    HookedModel,
    capture,
    device_of,
    final_norm,
    fingerprint,
    hook_name,
    read_out,
    require_hooks,
    require_layers,
    w_o,
)
from mi_hops.model.numeric import kl_divergence
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import batches_for, each_part
from mi_hops.sweep.interventions import Site
from mi_hops.sweep.pairs import Activations
from mi_hops.text.tokens import Prompt, batches

#: What can be read, all of width d_model. ``resid`` is the stream *after* `layer` blocks, so that 0
#: is the embedding and n_layers what the final norm sees; ``result`` is what each head writes,
#: z_h W_O^h, without the bias b_O; the others are the hook points of that name.
KINDS = ("resid", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "result")

#: Layers to read: one, several, or None for all.
Layers = int | Sequence[int] | None

#: Bytes that the logits of one chunk, and what is computed from them, may take.
CHUNK_BYTES = 2**28


class Lens(Protocol):
    """Maps residual-stream vectors to logits over the vocabulary.

    A lens that reads through one model's unembedding has that model as ``model``, so that
    `as_lens` can refuse it on another.
    """

    @property
    def name(self) -> str:
        """Short label for tables and figures."""
        ...

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits of vectors read at `layer` (as `KINDS` counts it), in float32 or wider."""
        ...


#: A lens, or the model's own read-out with the final norm (``"logit"``) or without (``"raw"``).
LensLike = Lens | Literal["logit", "raw"]


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The model's own read-out: W_U and b_U, with or without the final norm.

    Args:
        norm: apply the final norm first, with statistics of the vector that is read. False is the
            raw lens of the memory-injection and CREME papers.
    """

    model: HookedModel = field(repr=False)
    norm: bool = True

    @property
    def name(self) -> str:
        """``logit`` or ``logit (raw)``."""
        return "logit" if self.norm else "logit (raw)"

    def logits(
        self, vectors: Float[Tensor, "*rows d_model"], *, layer: int, head: int | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """The same map for every layer and head."""
        return read_out(self.model, vectors, norm=self.norm)


def as_lens(model: HookedModel, lens: LensLike) -> Lens:
    """The lens, refused if it reads through another model than the one that is run.

    A lens without a ``model`` is taken as it is. Another object with the same weights will do.

    Raises:
        ValueError: a lens bound to a model with other weights, or an unknown name.
    """
    if isinstance(lens, str):
        if lens not in ("logit", "raw"):
            raise ValueError(f"unknown lens {lens!r}; expected 'logit', 'raw', or a Lens object")
        return LogitLens(model, norm=lens == "logit")
    own = getattr(lens, "model", None)
    if own is not None and own is not model and fingerprint(own) != fingerprint(model):
        raise ValueError(
            f"this {lens.name} lens is bound to a model with fingerprint {fingerprint(own)}, the "
            f"model that is read has {fingerprint(model)}; lens.moved(model) reads one model with a "
            "lens trained on another"
        )
    return lens


def resolve_layers(model: HookedModel, kind: str, layers: Layers) -> tuple[str, list[int]]:
    """The kind by its own name, and the layers to read: those asked for, or all that `kind` has.

    Args:
        kind: one of `KINDS`, or TransformerLens's name of a hook: ``"hook_mlp_out"``, or with its
            layer ``"blocks.3.hook_mlp_out"``.

    Raises:
        ValueError: an unknown kind, no layer, a layer named twice over, or one that the model does
            not have.
    """
    hook = re.fullmatch(r"(?:blocks\.(\d+)\.)?(?:attn\.)?hook_(\w+)", kind)
    if hook and hook[1]:
        if layers is not None:
            raise ValueError(f"{kind!r} names its layer; leave layers out, or pass {hook[2]!r}")
        layers = int(hook[1])
    name = hook[2] if hook else kind
    if name not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; a lens reads one of {list(KINDS)}")
    n_layers = int(model.cfg.n_layers)
    if layers is None:
        return name, list(range(n_layers + (name == "resid")))
    found = (
        [int(layers)] if isinstance(layers, int | Integral) else [int(layer) for layer in layers]
    )
    if not found:
        raise ValueError("layers is empty; name at least one, or pass None for all")
    if len(set(found)) < len(found):
        raise ValueError(f"layers {found} name a layer twice over; name each once")
    if name != "resid":
        require_layers(model, found)
    elif wrong := [layer for layer in found if not 0 <= layer <= n_layers]:
        raise ValueError(
            f"layer(s) {wrong} out of range; 'resid' counts the blocks passed, 0..{n_layers}"
        )
    return name, found


# -- vectors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What was read from one batch; ``*cell`` is the shape of the index that asked for it.

    Attributes:
        read: layer -> ``[*cell, d_model]``, or ``[*cell, head, d_model]`` for ``result``.
        final: ``[*cell, d_model]`` as the unembedding gets it, or None where not asked for.
    """

    read: dict[int, Float[Tensor, "*cell d_model"]]
    final: Float[Tensor, "*cell d_model"] | None


def gather(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    cells: tuple[Int[Tensor, "*cell"], Int[Tensor, "*cell"]],
    *,
    kind: str,
    layers: Sequence[int],
    final: bool = False,
    cache: Activations | None = None,
) -> Vectors:
    """Read vectors at some cells of the batch, in one forward pass or from a cache.

    Hooks that are on the model (``with model.hooks(...)``) act before anything is read.

    Args:
        cells: (rows, positions), two tensors that broadcast together; never on padding.
        final: also keep the final stream after its norm, for comparison with the output.
        cache: the activations of `tokens` by hook name, ``[row, pos, ...]``; then nothing is run.

    Raises:
        MissingHookError: a hook point that the model does not have.
        ValueError: an activation that the cache does not hold.
    """
    names = {layer: hook_of(model, kind, layer) for layer in layers}
    with torch.no_grad():
        kept = activations(model, tokens, cells, [*names.values(), *["final"] * final], cache)
        read = {layer: kept[name] for layer, name in names.items()}
        if kind == "result":
            read = {layer: head_outputs(model, z, layer) for layer, z in read.items()}
    return Vectors(read, kept.get("final"))


def activations(
    model: HookedModel,
    tokens: Int[Tensor, "row pos"],
    cells: tuple[Int[Tensor, "*cell"], Int[Tensor, "*cell"]],
    names: Sequence[str],
    cache: Activations | None = None,
) -> dict[str, Float[Tensor, "*cell ..."]]:
    """What hook points hold at some cells, from a pass or a cache; ``"final"`` as in `Vectors`."""
    rows, columns = cells
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: kept.update({name: x[rows.to(x.device), columns.to(x.device)].detach()})

    def keep_final(x: Tensor) -> Tensor:
        keep("final")(x)
        return x[:, :1]  # the pass ends here; one position is unembedded because one has to be

    hooks = [name for name in dict.fromkeys(names) if name != "final"]
    require_hooks(model, hooks)
    final = "final" in names
    if cache is not None:
        end = hook_of(model, "resid", int(model.cfg.n_layers))
        for name in dict.fromkeys([*hooks, *[end] * final]):
            keep(name)(_cached(cache, name, tokens))
        return kept | ({"final": final_norm(model, kept[end])} if final else {})
    reads: list[Hook] = [(name, keep(name)) for name in hooks]
    if final:
        reads.append(("unembed.hook_in", keep_final))
    capture(model, tokens, (), hooks=reads)
    return kept


def _cached(cache: Activations, name: str, tokens: Tensor) -> Tensor:
    """An activation from a cache, with a batch axis."""
    if name not in cache.keys():  # noqa: SIM118
        raise ValueError(
            f"the cache does not hold {name}; let run_with_cache keep it (without names_filter it "
            "keeps everything), or read another kind or layer"
        )
    found = cache[name]
    per_position = 2 if name.endswith("hook_z") else 1
    if found.ndim == 1 + per_position:
        found = found[None]
    if tuple(found.shape[:2]) != tuple(tokens.shape):
        raise ValueError(
            f"the cache holds {tuple(found.shape[:2])} [batch, pos], the prompts are "
            f"{tuple(tokens.shape)}; pass the prompts (or tokens) that the cache was made of"
        )
    return found


def _require_own_tokens(model: HookedModel, prompts: Sequence[Prompt], cache: Activations) -> None:
    """Refuse a cache of other prompts, by the token embeddings that it holds, if any.

    An embedding that is no token's has been changed by a hook, which is the user's business.

    Raises:
        ValueError: a position that holds another token's embedding.
    """
    held = cache["hook_embed"] if "hook_embed" in cache.keys() else torch.empty(0)  # noqa: SIM118
    held = held if held.ndim == 3 else held[None]
    if held.shape[:2] != (len(prompts), max(map(len, prompts))):
        return  # where it is read, its shape is told
    table = model.W_E.detach()
    for row, prompt in zip(held, prompts, strict=True):
        own = table[list(prompt.ids)].to(row)
        apart = (row[: len(prompt)] - own).abs().amax(1) > 1e-3 * own.abs().max()
        for at in apart.nonzero()[:1].flatten().tolist():
            if int((table.to(row) == row[at]).all(1).sum()):
                raise ValueError(
                    f"the cache is of other prompts: position {at} of {prompt.text!r} is another token "
                    "there; pass the prompts (or tokens) that the cache was made of"
                )


def states_at(
    model: HookedModel,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    *,
    kind: str = "resid",
    layers: Sequence[int],
    batch_size: int = 64,
) -> Float[Tensor, "prompt layer d_model"]:
    """What is read at one position of each prompt, on the model's device."""

    def read(chosen: list[int], tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        cells = (rows, torch.tensor([places[i] for i in chosen]))
        found = gather(model, tokens, cells, kind=kind, layers=layers).read
        place = device_of(model)  # layers may lie on several devices
        return {"states": torch.stack([found[layer].to(place) for layer in layers], dim=1)}

    return in_batches(model, prompts, batch_size, read)["states"]


def in_batches(
    model: HookedModel,
    prompts: Sequence[Prompt],
    batch_size: int,
    read: Callable[[list[int], Tensor, Tensor], Mapping[str, Tensor]],
    cache: Activations | None = None,
) -> dict[str, Float[Tensor, "prompt ..."]]:
    """What ``read(indices, tokens, rows)`` finds of each batch, joined in the prompts' order.

    Args:
        read: `rows` are those of the indices in what is read: in the batch, or in the cache.
        cache: activations of all prompts, which are then one batch.
    """
    parts, order = [], []
    size = batch_size if cache is None else len(prompts)
    if cache is not None:
        _require_own_tokens(model, prompts, cache)

    def rows_of(chosen: list[int]) -> Tensor:
        return torch.arange(len(chosen)) if cache is None else torch.tensor(chosen)

    ids = [p.ids for p in prompts]
    with torch.no_grad(), progress_bar(label="lens", total=len(prompts), unit="prompt") as bar:
        for (chosen, _), found in each_part(
            model if cache is None else None,  # workers do not have the cache
            batches_for(model, ids, size) if cache is None else batches(ids, size),
            lambda part: read(part[0], part[1].tokens, rows_of(part[0])),
            kept=lambda part: ("read", [prompts[i].ids for i in part[0]]),
            texts=lambda part: [prompts[i].text for i in part[0]],
        ):
            parts.append(found)
            order += chosen
            bar.update(len(chosen))
    back = torch.tensor(order).argsort()
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def stream_site(model: HookedModel, layer: int, position: int) -> Site:
    """Where the stream after `layer` blocks is changed at one position."""
    if layer < model.cfg.n_layers:
        return Site("resid_pre", layer, (position,))
    return Site("resid_post", layer - 1, (position,))


def head_outputs(
    model: HookedModel, z: Float[Tensor, "*rows head d_head"], layer: int
) -> Float[Tensor, "*rows head d_model"]:
    """What each head writes to the residual stream; b_O, which no head owns, is left out."""
    weight = w_o(model, layer).detach().to(z.device, z.dtype)
    return einsum("... head d_head, head d_head d_model -> ... head d_model", z, weight)


def hook_of(model: HookedModel, kind: str, layer: int) -> str:
    """The hook point that a kind of `KINDS` is read at."""
    if kind == "resid":
        site = stream_site(model, layer, 0)
        kind, layer = site.kind, site.layer
    return hook_name("z" if kind == "result" else kind, layer)


# -- values from logits ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracked:
    """Tokens to follow, for each of some vectors and each of some names.

    Attributes:
        ids: ``[vector, name, token]``: the tokens of the name's first spelling, padded with -1; the
            first is the one whose rank and probability are taken.
        starts: ``[vector, name, spelling]``: the first token of each spelling, -1 padded, each
            token once.
    """

    ids: Int[Tensor, "vector name token"]
    starts: Int[Tensor, "vector name spelling"]

    def __getitem__(self, rows: Any) -> Tracked:
        return Tracked(self.ids[rows], self.starts[rows])


def chunks(model: HookedModel, n: int) -> Iterator[slice]:
    """Parts of `n` vectors whose logits fit in `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (16 * int(model.cfg.d_vocab)))
    for start in range(0, n, size):
        yield slice(start, start + size)


def statistics(
    logits: Float[Tensor, "vector vocab"],
    tracked: Tracked | None = None,
    *,
    output: Float[Tensor, "vector vocab"] | None = None,
    top_k: int = 0,
    logprobs: bool = False,
) -> dict[str, Tensor]:
    """What the logits of some vectors say, on the CPU.

    Args:
        output: log-probabilities of the model's own output, to be compared with.

    Returns:
        ``entropy`` ``[vector]`` (nats); with `output` ``kl`` ``[vector]``, KL(output || lens) in
        nats; with `tracked` ``[vector, name]``: ``prob`` and ``logprob`` (nats) of the first token,
        ``rank`` of it (1 = top, ties in its favour), ``mean_token_prob``, the mean probability of all
        tokens of the first spelling at this one position (the papers' score), and ``any_prob``, the
        summed probability of the distinct first tokens of all spellings; with `top_k` ``top_ids``
        and ``top_probs`` ``[vector, k]``; with `logprobs` ``logprobs`` ``[vector, vocab]``.

    Raises:
        ValueError: `top_k` below 0 or beyond the vocabulary.
    """
    if not 0 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k is {top_k}; expected 0..{logits.shape[-1]}, the vocabulary's size")
    said = logits.log_softmax(-1)
    probs = said.exp()
    found = {"entropy": -(probs * said).sum(-1)}
    if output is not None:
        found["kl"] = kl_divergence(output.to(said.device), said)
    if tracked is not None:
        ids, starts = (t.to(logits.device) for t in (tracked.ids, tracked.starts))
        first = ids[..., 0]
        found["prob"] = probs.gather(1, first)
        found["logprob"] = said.gather(1, first)
        # One name at a time: a comparison is as large as the logits.
        above = [(logits > own[:, None]).sum(-1) for own in logits.gather(1, first).T]
        found["rank"] = 1 + torch.stack(above, dim=1)
        found["mean_token_prob"] = _summed(probs, ids) / reduce(ids >= 0, "v n t -> v n", "sum")
        found["any_prob"] = _summed(probs, starts)
    if top_k:
        best = probs.topk(top_k, dim=-1)
        found |= {"top_ids": best.indices, "top_probs": best.values}
    if logprobs:
        found["logprobs"] = said
    return {name: value.cpu() for name, value in found.items()}


def _summed(
    probs: Float[Tensor, "vector vocab"], ids: Int[Tensor, "vector name item"]
) -> Float[Tensor, "vector name"]:
    """The probability of all ids together; -1 is padding."""
    flat = probs.gather(1, rearrange(ids.clamp_min(0), "v n i -> v (n i)"))
    return reduce(flat.reshape(ids.shape) * (ids >= 0), "v n i -> v n", "sum")
