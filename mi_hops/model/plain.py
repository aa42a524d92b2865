"""Forward passes of GPT-2 and LLaMA as their bare sums, for passes in which nothing is hooked.

TransformerLens calls a hook point for every activation, normalises the stream once each for queries, keys
and values, rotates cached keys again in every pass, and exposes scores and pattern. Where nobody looks,
all that is left out: attention is one fused kernel, and the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def __call__(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_out"]:
        return functional.linear(x, self.weight, self.bias)


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


def _distinct(
    tokens: Int[Tensor, "row pos"], last: Int[Tensor, "row"], alike: bool
) -> tuple[Int[Tensor, "token"], Int[Tensor, "token"], Int[Tensor, "distinct"]]:
    """Where tokens are that are not padding, which distinct token each is, and where each of these is first.

    Two tokens are one if they and all before them in their rows agree. Places count through all rows.
    """
    at: list[int] = []
    which: list[int] = []
    first: list[int] = []
    known: dict[tuple[int, int], int] = {}
    n_pos = tokens.shape[1]
    for row, (ids, end) in enumerate(zip(tokens.tolist(), last.tolist(), strict=True)):
        before = -1 if alike else -1 - row
        for pos in range(end + 1):
            key = before, ids[pos]
            at.append(row * n_pos + pos)
            if key not in known:
                known[key] = len(first)
                first.append(at[-1])
            before = known[key]
            which.append(before)
    return torch.tensor(at), torch.tensor(which), torch.tensor(first)


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
        place, cfg = device_of(self._model), self._model.cfg
        rows, n_pos = tokens.shape
        # Only attention needs every token in its row. The rest is computed once per distinct token: not
        # for padding, and once for what rows start with alike.
        at, which, first = (t.to(place) for t in _distinct(tokens, last, slots.alike))
        positions = slots.positions.expand(rows, -1).flatten()[first]
        x = self._embed(tokens.to(place).flatten()[first], positions)
        rotate = self._rotation(x, positions)
        n_shared = self._blocks[0].q.weight.shape[0] // self._blocks[0].k.weight.shape[0]
        mask = x.new_zeros(slots.seen.shape).masked_fill_(~slots.seen, float("-inf"))
        mask = for_shared_heads(mask, n_shared)
        whole = len(x) == rows * n_pos

        def apart(y: Float[Tensor, "token head_d"]) -> Float[Tensor, "row head pos d"]:
            full = y if whole else y.new_zeros(rows * n_pos, y.shape[-1])
            if not whole:
                full[at] = y[which]
            return full.view(rows, n_pos, -1, cfg.d_head).transpose(1, 2)

        for layer, block in enumerate(self._blocks):
            y = normalise(x, *block.norms[0])
            q, k, v = apart(rotate(block.q(y))), apart(rotate(block.k(y))), apart(block.v(y))
            k, v = slots.join(layer, k, v)
            z = attend(q, k, v, mask, block.scale).flatten(0, 1).flatten(1)
            if layer == len(self._blocks) - 1:  # from here on only the last positions count
                ends = torch.arange(rows) * n_pos + last
                x = x[which[torch.searchsorted(at, ends.to(place))]]
                z = z[ends.to(place)]
            elif not whole:
                z = z[first]
            x += block.o(z)
            y = normalise(x, *block.norms[1])
            if block.gate is None:
                y = block.activation(block.enter(y))
            else:
                y = block.activation(block.gate(y)).mul_(block.enter(y))
            x += block.leave(y)
        return self._unembed(normalise(x, *self._final))

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
