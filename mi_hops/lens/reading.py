"""Activations at chosen positions, and what they say once turned into logits.

Every lens works in the same two steps: `gather` takes vectors of width d_model out of a forward
pass, at the asked positions only, and `statistics` reduces the logits that a lens makes of them to
a few numbers each, a chunk at a time, so that layers x positions x vocabulary never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mi_hops.model import (
    Hook,
    HookedModel,
    fingerprint,
    forward,
    hook_name,
    read_out,
    require_hooks,
    require_layers,
    w_o,
)
from mi_hops.model.numeric import kl_divergence
from mi_hops.sweep.interventions import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

#: What can be read, all of width d_model. ``resid`` is the stream *after* `layer` blocks, so that 0
#: is the embedding and n_layers what the final norm sees; ``head_out`` is what each head writes,
#: z_h W_O^h, without the bias b_O; the others are the hook points of that name.
KINDS = ("resid", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out")

#: Bytes that the logits of one chunk, and what is computed from them, may take.
CHUNK_BYTES = 2**28


class Lens(Protocol):
    """Turns vectors of the residual space into logits over the vocabulary.

    A lens that reads through one model's unembedding has that model as ``model``, so that
    `check_lens` can refuse it on another.
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


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The model's own read-out: W_U and b_U, after the final norm or without it.

    Args:
        norm: apply the final norm first, with statistics of the vector that is read. False is the
            raw lens of the memory-injection and CREME papers.
    """

    model: HookedModel
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


def check_lens(model: HookedModel, lens: Lens) -> None:
    """Refuse a lens that reads through another model than the one that is run.

    A lens without a ``model`` is taken as it is. Another object with the same weights will do.

    Raises:
        ValueError: a lens bound to a model with other weights.
    """
    own = getattr(lens, "model", None)
    if own is None or own is model:
        return
    theirs, ours = fingerprint(own), fingerprint(model)
    if theirs != ours:
        raise ValueError(
            f"this {lens.name} lens is bound to a model with fingerprint {theirs}, the model that is "
            f"read has {ours}; lens.moved(model) reads one model with a lens trained on another"
        )


def check_layers(model: HookedModel, kind: str, layers: Sequence[int] | None) -> list[int]:
    """The layers to read: those asked for, or all that `kind` has.

    Raises:
        ValueError: an unknown kind, no layer, or a layer that the model has not got.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; a lens reads one of {list(KINDS)}")
    n_layers = int(model.cfg.n_layers)
    if layers is None:
        return list(range(n_layers + (kind == "resid")))
    found = [int(layer) for layer in layers]
    if not found:
        raise ValueError("layers is empty; name at least one, or pass None for all")
    if kind == "resid":
        wrong = [layer for layer in found if not 0 <= layer <= n_layers]
        if wrong:
            raise ValueError(
                f"layer(s) {wrong} out of range; 'resid' counts blocks passed, 0..{n_layers}"
            )
    else:
        require_layers(model, found)
    return found


@dataclass(frozen=True)
class Vectors:
    """What was read from one batch; ``*cell`` is the shape of the index that asked for it.

    Attributes:
        read: layer -> ``[*cell, d_model]``, or ``[*cell, head, d_model]`` for heads.
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
    hooks: Sequence[Hook] = (),
) -> Vectors:
    """Read vectors at some cells of the batch, in one forward pass.

    Args:
        cells: (rows, positions), two tensors that broadcast together; never on padding.
        final: also keep the final stream after its norm, for comparison with the output.
        hooks: interventions that act before anything is read.

    Raises:
        MissingHookError: a hook point the model has not got.
    """
    names = {layer: _name(model, kind, layer) for layer in layers}
    require_hooks(model, names.values())
    rows, columns = cells
    kept: dict[str, Tensor] = {}

    def pick(x: Tensor) -> Tensor:
        return x[rows.to(x.device), columns.to(x.device)]

    def keep(name: str) -> Callable[[Tensor], None]:
        def fn(x: Tensor) -> None:
            kept[name] = pick(x).detach()

        return fn

    def keep_final(x: Tensor) -> Tensor:
        kept["final"] = pick(x).detach()
        return x[:, :1]  # the pass ends here; one position is unembedded because one has to be

    reads: list[Hook] = [(name, keep(name)) for name in dict.fromkeys(names.values())]
    stop = None
    if final:
        reads.append(("unembed.hook_in", keep_final))
    else:
        blocks = [int(name.split(".")[1]) for name in [*names.values(), *(n for n, _ in hooks)]]
        stop = max(blocks) + 1
    with torch.no_grad():
        forward(
            model, tokens, hooks=[*hooks, *reads],
            stop_at_layer=stop if stop is not None and stop < model.cfg.n_layers else None,
        )  # fmt: skip
        read = {layer: kept[name] for layer, name in names.items()}
        if kind == "head_out":
            read = {layer: head_outputs(model, z, layer) for layer, z in read.items()}
    return Vectors(read, kept.get("final"))


def stream_site(model: HookedModel, layer: int, position: int) -> Site:
    """Where the stream after `layer` blocks is changed at one position."""
    if layer < model.cfg.n_layers:
        return Site("resid_pre", layer, (position,))
    return Site("resid_post", layer - 1, (position,))


def head_outputs(
    model: HookedModel, z: Float[Tensor, "*rows head d_head"], layer: int
) -> Float[Tensor, "*rows head d_model"]:
    """What each head writes to the residual stream; b_O, which no head owns, is left out."""
    weight = w_o(model, layer).detach()
    return (z.unsqueeze(-2) @ weight.to(z.device, z.dtype)).squeeze(-2)


def _name(model: HookedModel, kind: str, layer: int) -> str:
    if kind == "head_out":
        return hook_name("z", layer)
    if kind != "resid":
        return hook_name(kind, layer)
    last = int(model.cfg.n_layers)
    return hook_name("resid_pre", layer) if layer < last else hook_name("resid_post", last - 1)


# -- numbers from logits --------------------------------------------------------------------------


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

    def __getitem__(self, rows: slice) -> Tracked:
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
        and ``top_probs`` ``[vector, k]``.

    Raises:
        ValueError: `top_k` below 0 or beyond the vocabulary.
    """
    if not 0 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k is {top_k}; expected 0..{logits.shape[-1]}, the vocabulary's size")
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    found = {"entropy": -(probs * logprobs).sum(-1)}
    if output is not None:
        known = output.to(logprobs.device)
        found["kl"] = kl_divergence(known, logprobs)
    if tracked is not None:
        ids, starts = (t.to(logits.device) for t in (tracked.ids, tracked.starts))
        first = ids[..., 0]
        found["prob"] = probs.gather(1, first)
        found["logprob"] = logprobs.gather(1, first)
        own = logits.gather(1, first)
        # One name at a time: a comparison is as large as the logits.
        ranks = [1 + (logits > own[:, [k]]).sum(-1) for k in range(first.shape[1])]
        found["rank"] = _stack(ranks, first)
        found["mean_token_prob"] = _masked(probs, ids, mean=True)
        found["any_prob"] = _masked(probs, starts, mean=False)
    if top_k:
        best = probs.topk(top_k, dim=-1)
        found |= {"top_ids": best.indices, "top_probs": best.values}
    return {name: value.cpu() for name, value in found.items()}


def _stack(columns: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns, dim=1) if columns else like.clone()


def _masked(probs: Tensor, ids: Tensor, *, mean: bool) -> Tensor:
    real = ids >= 0
    flat = probs.gather(1, ids.clamp_min(0).flatten(1)).reshape(ids.shape)
    total = (flat * real).sum(-1)
    return total / real.sum(-1) if mean else total
