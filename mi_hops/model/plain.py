"""Forward passes of GPT-2 and LLaMA as their bare sums, for passes in which nothing is hooked.

TransformerLens calls a hook point for every activation, normalises the stream once each for queries, keys
and values, rotates cached keys again in every pass, and exposes scores and pattern. Where nobody looks,
all that is left out: attention is one fused kernel, and the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mi_hops.model.classes import backend_of
from mi_hops.model.identity import device_of, dtype_of, own_weight
from mi_hops.model.types import HookedModel
from mi_hops.model.weights import norm_parts, unembedding

_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh"), lambda x: functional.gelu(x, approximate="tanh")
    ),
}
#: Whose modules compute what their weights say. Of another's (an adapter, a quantised layer) nobody knows.
_KNOWN = ("torch", "transformers", "transformer_lens", "mi_hops")


#: Gain, shift (of a LayerNorm) and epsilon of a norm.
Norm = tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"] | None, float]


def norm_of(model: HookedModel, norm: Any, like: Tensor) -> Norm:
    """What `normalise` needs of a norm; `like` is a tensor ``[..., d_model]`` of the model's."""
    gain, shift, centres = norm_parts(model, norm, like)
    return gain, shift if centres else None, model.cfg.eps


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


Turn = Callable[[Float[Tensor, "*any d_head"]], Float[Tensor, "*any d_head"]]


def rotation(cos: Float[Tensor, "*any d_head"], sin: Float[Tensor, "*any d_head"]) -> Turn:
    """What turns queries or keys to their positions; cos and sin have both halves."""
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


Joined = tuple[Float[Tensor, "row kv slot d_head"], Float[Tensor, "row kv slot d_head"]]


@dataclass(frozen=True)
class Slots:
    """Where a pass finds and leaves its keys and values, and what it attends to.

    Attributes:
        join: takes a layer's new keys and values; gives all that the pass attends to.
        seen: which slots each position attends to; one row stands for all.
        positions: of the tokens within their rows; one row stands for all.
        alike: all rows have the same tokens before this pass, so that what they go on with alike is
            computed once.
    """

    join: Callable[[int, Joined], Joined]
    seen: Bool[Tensor, "row 1 pos slot"]
    positions: Int[Tensor, "row pos"]
    alike: bool


def is_ordinary(cfg: Any) -> bool:
    """Whether blocks are those of GPT-2 or LLaMA, with no option that changes what they compute."""
    odd = (
        "use_attn_result", "use_split_qkv_input", "use_attn_in", "load_in_4bit", "use_qk_norm",
        "use_logn_attn", "use_local_attn", "use_attention_sinks", "use_dynamic_ntk_rope",
        "rotary_adjacent_pairs", "ungroup_grouped_query_attention", "attn_only", "clip_qkv",
        "parallel_attn_mlp", "use_normalization_before_and_after", "post_embedding_ln",
    )  # fmt: skip
    family = getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)
    return (
        family in _ARCHITECTURES
        and cfg.act_fn in _ACTIVATIONS
        and (getattr(cfg, "attention_dir", None) or "causal") == "causal"
        and (getattr(cfg, "attn_scores_soft_cap", None) or -1) <= 0
        and (getattr(cfg, "output_logits_soft_cap", None) or -1) <= 0
        and getattr(cfg, "rotary_dim", None) in (None, cfg.d_head)
        and not any(getattr(cfg, name, False) for name in odd)
    )


def plain_passes(model: HookedModel) -> PlainPasses | None:
    """Passes over a `RowCache` that compute what `model` computes; None where that is not certain.

    Certain are GPT-2 and LLaMA of both classes in float32, and HookedTransformer in float64, on one
    device, with no hook of any kind and no foreign module, whose weights lie in memory so that a pass
    need not copy them (`layout`). In half precision the order of summation shows; and transformers'
    RMSNorm takes float64 for float32.
    """
    cfg = model.cfg
    hooked = backend_of(model) == "hooked"
    config = None if hooked else model.original_model.config
    usable = (
        is_ordinary(cfg)
        and not cfg.scale_attn_by_inverse_layer_idx
        and (dtype_of(model) == torch.float32 or (hooked and dtype_of(model) == torch.float64))
        and len({(p.device, p.dtype) for p in model.parameters()}) == 1
        and getattr(config, "scale_attn_weights", True)
        and not getattr(model, "compatibility_mode", False)
        and not any(map(is_foreign, model.modules()))
    )
    if not usable:
        return None
    try:
        return PlainPasses(model)
    except _CopyError:
        return None


def is_foreign(module: torch.nn.Module) -> bool:
    """Whether anything but its own class, transformers or TransformerLens decides what it returns."""
    deciding = [type(module), *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if "forward" in module.__dict__:
        deciding.append(module.__dict__["forward"])
    # The Bridge and transformers put hooks at some modules that only look; `lean_blocks` puts forwards.
    return any(str(getattr(it, "__module__", "")).split(".")[0] not in _KNOWN for it in deciding)


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
        gated = getattr(block.mlp, "W_gate", None) is not None
        self.gate = _linear(block.mlp, "gate", _MLP) if gated else None
        self.enter, self.leave = (_linear(block.mlp, name, _MLP) for name in ("in", "out"))


class PlainPasses:
    """Passes over the model's weights as they are now; made by `plain_passes`."""

    def __init__(self, model: HookedModel) -> None:
        self._model, cfg = model, model.cfg
        like = torch.empty(cfg.d_model, dtype=dtype_of(model), device=device_of(model))
        self._blocks = [_Block(model, block, like) for block in model.blocks]
        self._final = norm_of(model, model.ln_final, like)
        weight, bias = unembedding(model)
        self._unembed = _Linear(weight.T, bias.to(weight.dtype))
        self._activation = _ACTIVATIONS[cfg.act_fn]
        hooked = backend_of(model) == "hooked"
        self._scale = 1 / float(model.blocks[0].attn.attn_scale) if hooked else cfg.d_head**-0.5

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
        turn = self._rotation(x, positions)
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
            q, k, v = apart(turn(block.q(y))), apart(turn(block.k(y))), apart(block.v(y))
            k, v = slots.join(layer, (k, v))
            z = attend(q, k, v, mask, self._scale).flatten(0, 1).flatten(1)
            if layer == len(self._blocks) - 1:  # from here on only the last positions count
                ends = torch.arange(rows) * n_pos + last
                x = x[which[torch.searchsorted(at, ends.to(place))]]
                z = z[ends.to(place)]
            elif not whole:
                z = z[first]
            x += block.o(z)
            y = normalise(x, *block.norms[1])
            if block.gate is None:
                y = self._activation(block.enter(y))
            else:
                y = self._activation(block.gate(y)).mul_(block.enter(y))
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

    def _rotation(self, x: Float[Tensor, "token d_model"], positions: Int[Tensor, "token"]) -> Turn:
        """Turns queries or keys to their positions; nothing, where the embedding tells positions."""
        if self._model.cfg.positional_embedding_type != "rotary":
            return lambda q: q
        if backend_of(self._model) == "hooked":
            table = rotary_table(self._model.blocks[0].attn, int(positions.max()) + 1)
            cos, sin = (values[positions] for values in table)
        else:
            cos, sin = (t[0] for t in self._model.rotary_emb(x[None], positions[None]))
        turn = rotation(*(rearrange(t.to(x.dtype), "token d -> token 1 d") for t in (cos, sin)))
        d_head = cos.shape[-1]
        return lambda flat: turn(
            rearrange(flat, "token (head d) -> token head d", d=d_head)
        ).flatten(1)
