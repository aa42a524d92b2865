"""Forward passes of GPT-2 and LLaMA as their bare sums, for passes in which nothing is hooked.

TransformerLens calls a hook point for every activation, normalises the stream once each for queries, keys
and values, rotates cached keys again in every pass, and exposes scores and pattern. Where nobody looks,
all that is left out: attention is one fused kernel, and the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mi_hops.model.classes import backend_of
from mi_hops.model.identity import device_of, dtype_of, own_weight
from mi_hops.model.shortcuts import has_hooks, may_be_rewritten
from mi_hops.model.types import HookedModel
from mi_hops.model.weights import norm_parts, unembedding

#: By the names that TransformerLens and transformers have for it: one fused kernel.
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "NewGELUActivation", "GELUTanh", "PytorchGELUTanh")

#: Gain, shift (of a LayerNorm) and epsilon of a norm.
Norm = tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"] | None, float]


def norm_of(model: HookedModel, norm: Any, like: Tensor) -> Norm:
    """What `normalise` needs of a norm; `like` is a tensor ``[..., d_model]`` of the model's."""
    gain, shift, centres = norm_parts(model, norm, like)
    eps = norm.eps if backend_of(model) == "hooked" else model.cfg.eps
    return gain, shift if centres else None, float(eps)


def normalise(
    x: Float[Tensor, "*any d_model"],
    gain: Float[Tensor, "d_model"],
    shift: Float[Tensor, "d_model"] | None,
    eps: float,
) -> Float[Tensor, "*any d_model"]:
    """LayerNorm, or RMSNorm where there is no shift."""
    if shift is not None:
        return functional.layer_norm(x, x.shape[-1:], gain, shift, eps)
    size = torch.linalg.vecdot(x, x)[..., None]
    return (x / (size / x.shape[-1] + eps).sqrt_()).mul_(gain)


Rotate = Callable[[Float[Tensor, "*any d_head"]], Float[Tensor, "*any d_head"]]


def rotation(cos: Float[Tensor, "*any d_head"], sin: Float[Tensor, "*any d_head"]) -> Rotate:
    """Rotates queries or keys by their positions; cos and sin have both halves."""
    half = cos.shape[-1] // 2
    # Each half takes the other, the first with a minus.
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return lambda x: torch.addcmul(x * cos, x.roll(half, -1), signed)


def rotary_table(
    attn: Any, length: int
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Cosines and sines of a HookedTransformer's attention, for `length` positions at least."""
    if attn.rotary_cos.shape[0] < length:
        like = attn.rotary_cos
        attn.apply_rotary(like.new_zeros(1, 1, 1, like.shape[-1]), length - 1)  # lengthens it
    return attn.rotary_cos, attn.rotary_sin


def attend(
    q: Float[Tensor, "row head pos d"],
    k: Float[Tensor, "row kv slot d"],
    v: Float[Tensor, "row kv slot d"],
    mask: Float[Tensor, "*row shared_pos slot"],
    scale: float,
) -> Float[Tensor, "row pos head d"]:
    """Attention in which heads that share keys are further queries of one, so that no key is repeated.

    Args:
        mask: added to scores, made by `for_shared_heads`.
    """
    n_shared = q.shape[1] // k.shape[1]
    q = rearrange(q, "row (kv head) pos d -> row kv (head pos) d", head=n_shared)
    z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return rearrange(z, "row kv (head pos) d -> row pos (kv head) d", head=n_shared)


def for_shared_heads(
    mask: Float[Tensor, "*row pos slot"], n_shared: int
) -> Float[Tensor, "*row shared_pos slot"]:
    """A mask for `attend`: the same for each of the heads that share a key."""
    return repeat(mask, "... pos slot -> ... (head pos) slot", head=n_shared)


@dataclass(frozen=True)
class Slots:
    """Where a pass finds and leaves its keys and values, and what it attends to.

    Attributes:
        join: (layer, new keys, new values) -> all that the pass attends to, ``[row kv slot d_head]``.
        seen: which slots each position attends to; one row stands for all.
        positions: of the tokens within their rows; one row stands for all.
        alike: all rows have the same tokens before this pass, so that what they go on with alike is
            computed once.
    """

    join: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
    seen: Bool[Tensor, "row 1 pos slot"]
    positions: Int[Tensor, "row pos"]
    alike: bool


def plain_passes(model: HookedModel) -> PlainPasses | None:
    """Passes over a `RowCache` that compute what `model` computes; None where that is not certain.

    Certain are models that `may_be_rewritten`, with no hook of any kind, whose weights lie in memory so
    that a pass need not copy them (`layout`).
    """
    config = None if backend_of(model) == "hooked" else model.original_model.config
    usable = (
        may_be_rewritten(model)
        and not has_hooks(model)
        and not model.cfg.scale_attn_by_inverse_layer_idx
        and getattr(config, "scale_attn_weights", True)
    )
    if not usable:
        return None
    try:
        return PlainPasses(model)
    except _CopyError:
        return None


class _CopyError(Exception):
    """A weight does not lie in memory as a pass wants it."""


@dataclass(frozen=True)
class _Linear:
    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, "d_out"] | None

    def __call__(
        self, x: Float[Tensor, "token d_in"], added: Float[Tensor, "d_in d_out"] | None = None
    ) -> Float[Tensor, "token d_out"]:
        """With something added to the matrix, if given."""
        weight = self.weight if added is None else self.weight + added.T
        return functional.linear(x, weight, self.bias)


def own_bias(module: Any, name: str) -> Float[Tensor, "d_out"] | None:
    """A module's bias by TransformerLens's letter, or None, for which HookedTransformer has zeros."""
    bias = own_weight(module, f"b_{name}")
    return None if bias is None or not bias.any() else bias.detach().flatten()


def _linear(module: Any, name: str, pattern: str) -> _Linear:
    """A matrix and its bias, by TransformerLens's letter for both."""
    weight = own_weight(module, f"W_{name}")
    turned = rearrange(weight.detach(), pattern)
    if turned.data_ptr() != weight.data_ptr():
        raise _CopyError
    return _Linear(turned, own_bias(module, name))


@dataclass(frozen=True)
class _Distinct:
    """Tokens of padded rows without the padding, and without what rows start with alike.

    Only attention needs every token in its row; the rest is computed once per distinct token. Two tokens
    are one if they and all before them in their rows agree. Places count through all rows.

    Attributes:
        shape: rows and positions.
        at: where tokens are that are not padding.
        which: which distinct token each of these is.
        first: where each distinct token is first.
    """

    shape: tuple[int, int]
    at: Int[Tensor, "token"]
    which: Int[Tensor, "token"]
    first: Int[Tensor, "distinct"]

    @classmethod
    def of(
        cls,
        tokens: Int[Tensor, "row pos"],
        last: Int[Tensor, "row"],
        place: torch.device,
        starts: Sequence[int] | None = None,
    ) -> _Distinct:
        """Of tokens up to `last`; rows share what they start with if their `starts` are one (default: all)."""
        at: list[int] = []
        which: list[int] = []
        first: list[int] = []
        known: dict[tuple[int, int], int] = {}
        n_rows, n_pos = tokens.shape
        for row, (ids, end) in enumerate(zip(tokens.tolist(), last.tolist(), strict=True)):
            before = -1 if starts is None else -1 - starts[row]
            for pos in range(end + 1):
                key = before, ids[pos]
                at.append(row * n_pos + pos)
                if key not in known:
                    known[key] = len(first)
                    first.append(at[-1])
                before = known[key]
                which.append(before)
        return cls((n_rows, n_pos), *(torch.tensor(t, device=place) for t in (at, which, first)))

    @property
    def whole(self) -> bool:
        """Whether every place has a token of its own."""
        return len(self.first) == self.shape[0] * self.shape[1]

    def in_rows(self, y: Float[Tensor, "distinct d"]) -> Float[Tensor, "row pos d"]:
        """Each token in its row, and zeros at padding."""
        if not self.whole:
            full = y.new_zeros(self.shape[0] * self.shape[1], y.shape[-1])
            y = full.index_copy_(0, self.at, y[self.which])
        return y.view(*self.shape, -1)

    def among(self, places: Int[Tensor, "place"]) -> Int[Tensor, "place"]:
        """Which distinct tokens stand at these places."""
        return self.which[torch.searchsorted(self.at, places)]


_IN, _OUT, _MLP = "head model d -> (head d) model", "head d model -> model (head d)", "i o -> o i"


class _Block:
    """The parts of a block, as views of the model's weights."""

    def __init__(self, model: HookedModel, block: Any, like: Tensor) -> None:
        self.norms = [norm_of(model, norm, like) for norm in (block.ln1, block.ln2)]
        self.q, self.k, self.v = (_linear(block.attn, name, _IN) for name in "QKV")
        self.o = _linear(block.attn, "O", _OUT)
        wrapped = getattr(block.attn, "original_component", None)
        self.scale = 1 / float(block.attn.attn_scale) if wrapped is None else float(wrapped.scaling)
        self.activation = _activation(getattr(block.mlp, "original_component", block.mlp))
        gated = getattr(block.mlp, "W_gate", None) is not None
        self.gate = _linear(block.mlp, "gate", _MLP) if gated else None
        self.enter, self.leave = (_linear(block.mlp, name, _MLP) for name in ("in", "out"))


def _activation(mlp: Any) -> Callable[[Tensor], Tensor]:
    own = getattr(mlp, "act_fn", None) or mlp.act
    if getattr(own, "__name__", type(own).__name__) in _GELU_TANH:
        return partial(functional.gelu, approximate="tanh")
    return own


@dataclass(frozen=True)
class RowChanges:
    """Changes of matrices that differ from row to row.

    Attributes:
        acts: matrix and layer -> the matrix's output, from its input ``[row, pos, d_in]`` and its output
            ``[row, pos, d_out]`` without the changes.
        alike: of each row, the first one with the same changes.
    """

    acts: Mapping[tuple[str, int], Callable[[Tensor, Tensor], Tensor]]
    alike: Sequence[int]


#: Layer -> what is added to its W_O, ``[d_in, d_model]``.
Added = Mapping[int, Float[Tensor, "d_in d_model"]]


class PlainPasses:
    """Passes over the model's weights as they are now; made by `plain_passes`."""

    def __init__(self, model: HookedModel) -> None:
        self._model, cfg = model, model.cfg
        like = torch.empty(cfg.d_model, dtype=dtype_of(model), device=device_of(model))
        self._blocks = [_Block(model, block, like) for block in model.blocks]
        self._final = norm_of(model, model.ln_final, like)
        weight, bias = unembedding(model)
        self._unembed = _Linear(weight.T, bias.to(weight.dtype))

    def __call__(
        self, tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], slots: Slots
    ) -> Float[Tensor, "row vocab"]:
        """Logits at each row's position `last`."""
        starts = None if slots.alike else range(len(tokens))
        distinct = _Distinct.of(tokens, last, device_of(self._model), starts)
        x = self._enter(tokens, distinct, slots)
        return self._leave(self._through(x, distinct, slots, scored=last[:, None]))

    def at(
        self,
        tokens: Int[Tensor, "row pos"],
        scored: Int[Tensor, "row scored"],
        changes: RowChanges | None = None,
    ) -> Float[Tensor, "row scored vocab"]:
        """Logits at `scored` of rows on their own, each under its own changes."""
        starts = None if changes is None else changes.alike
        distinct = _Distinct.of(tokens, scored.max(1).values, device_of(self._model), starts)
        slots = self._alone(tokens)
        x = self._enter(tokens, distinct, slots)
        x = self._through(x, distinct, slots, scored=scored, changes=changes)
        return self._leave(x).view(*scored.shape, -1)

    def entering(
        self, tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], layer: int
    ) -> Float[Tensor, "row pos d_model"]:
        """The stream that enters a block, up to each row's position `last`."""
        distinct = _Distinct.of(tokens, last, device_of(self._model))
        slots = self._alone(tokens)
        x = self._enter(tokens, distinct, slots)
        return distinct.in_rows(self._through(x, distinct, slots, stop=layer))

    def behind(
        self,
        entering: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "row pos"],
        scored: Int[Tensor, "row scored"],
        layer: int,
        added: Added,
    ) -> Float[Tensor, "row scored vocab"]:
        """Logits at `scored`, from the stream that enters a block on; differentiable in what is added.

        Rows that start with the same tokens must enter with the same stream.
        """
        distinct = _Distinct.of(tokens, scored.max(1).values, device_of(self._model))
        x = entering.flatten(0, 1)[distinct.first]
        slots = self._alone(tokens)
        x = self._through(x, distinct, slots, start=layer, scored=scored, added=added)
        return self._leave(x).view(*scored.shape, -1)

    def _alone(self, tokens: Int[Tensor, "row pos"]) -> Slots:
        """Rows that go on behind nothing and leave nothing."""
        where = torch.arange(tokens.shape[1], device=device_of(self._model))
        seen = where[None] <= where[:, None]
        return Slots(lambda layer, *new: new, seen[None, None], where[None], alike=True)

    def _through(
        self,
        x: Float[Tensor, "distinct d_model"],
        distinct: _Distinct,
        slots: Slots,
        *,
        start: int = 0,
        stop: int | None = None,
        scored: Int[Tensor, "row scored"] | None = None,
        added: Added | None = None,
        changes: RowChanges | None = None,
    ) -> Float[Tensor, "token d_model"]:
        """The stream behind blocks; behind the last one only at the positions scored, row by row."""
        (n_rows, n_pos), added = distinct.shape, added or {}
        acts = {} if changes is None else changes.acts
        rotate = self._rotation(x, self._positions(distinct, slots))
        n_shared = self._blocks[0].q.weight.shape[0] // self._blocks[0].k.weight.shape[0]
        mask = x.new_zeros(slots.seen.shape).masked_fill_(~slots.seen, float("-inf"))
        mask = for_shared_heads(mask, n_shared)

        def heads(y: Float[Tensor, "distinct head_d"]) -> Float[Tensor, "row head pos d"]:
            return distinct.in_rows(y).unflatten(2, (-1, self._model.cfg.d_head)).transpose(1, 2)

        def changed(matrix: str, layer: int, given: Tensor, out: Tensor) -> Tensor:
            act = acts.get((matrix, layer))
            if act is None:
                return out
            if scored is not None and layer == len(self._blocks) - 1:
                given, out = (y.view(n_rows, -1, y.shape[-1]) for y in (given, out))
                return act(given, out).flatten(0, 1)
            out = act(distinct.in_rows(given), distinct.in_rows(out))
            return out.flatten(0, 1)[distinct.first]

        for layer, block in enumerate(self._blocks[:stop][start:], start):
            y = normalise(x, *block.norms[0])
            q, k, v = heads(rotate(block.q(y))), heads(rotate(block.k(y))), heads(block.v(y))
            k, v = slots.join(layer, k, v)
            z = attend(q, k, v, mask, block.scale).flatten(0, 1).flatten(1)
            if scored is not None and layer == len(self._blocks) - 1:
                ends = (torch.arange(n_rows)[:, None] * n_pos + scored).flatten().to(x.device)
                x, z = x[distinct.among(ends)], z[ends]
            elif not distinct.whole:
                z = z[distinct.first]
            x = x + changed("W_O", layer, z, block.o(z, added.get(layer)))
            y = normalise(x, *block.norms[1])
            if block.gate is None:
                y = block.activation(block.enter(y))
            else:
                y = block.activation(block.gate(y)).mul_(block.enter(y))
            x = x + changed("W_out", layer, y, block.leave(y))
        return x

    def _leave(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token vocab"]:
        return self._unembed(normalise(x, *self._final))

    def _enter(
        self, tokens: Int[Tensor, "row pos"], distinct: _Distinct, slots: Slots
    ) -> Float[Tensor, "distinct d_model"]:
        ids = tokens.to(distinct.first.device).flatten()[distinct.first]
        return self._embed(ids, self._positions(distinct, slots))

    def _positions(self, distinct: _Distinct, slots: Slots) -> Int[Tensor, "distinct"]:
        return slots.positions.expand(distinct.shape).flatten()[distinct.first]

    def _embed(
        self, ids: Int[Tensor, "token"], positions: Int[Tensor, "token"]
    ) -> Float[Tensor, "token d_model"]:
        x = self._model.embed(ids[None])
        if self._model.cfg.positional_embedding_type == "rotary":
            return x[0]
        if backend_of(self._model) == "hooked":
            return x[0] + self._model.pos_embed.W_pos[positions]
        return (x + self._model.pos_embed(positions[None]))[0]

    def _rotation(
        self, x: Float[Tensor, "token d_model"], positions: Int[Tensor, "token"]
    ) -> Rotate:
        """Rotates queries or keys by their positions; changes nothing where these are embedded."""
        if self._model.cfg.positional_embedding_type != "rotary":
            return lambda q: q
        if backend_of(self._model) == "hooked":
            table = rotary_table(self._model.blocks[0].attn, int(positions.max()) + 1)
            cos, sin = (values[positions] for values in table)
        else:
            cos, sin = (t[0] for t in self._model.rotary_emb(x[None], positions[None]))
        rotate = rotation(*(rearrange(t.to(x.dtype), "token d -> token 1 d") for t in (cos, sin)))
        d_head = cos.shape[-1]
        return lambda flat: rotate(
            rearrange(flat, "token (head d) -> token head d", d=d_head)
        ).flatten(1)
