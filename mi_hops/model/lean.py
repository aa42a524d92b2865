"""HookedTransformer's blocks without what nobody looks at, for the length of a sweep.

A block normalises its input once each for queries, keys and values, adds biases that are zero, repeats every
key and value for all heads that share it, turns all keys to their positions again, those of a cache
included, and exposes scores and pattern. Here each norm is computed once, and attention is one fused kernel
over keys that are not repeated, wherever no hook sits at scores, pattern, turned keys or in the norm. All
other hook points see what they saw; the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

from mi_hops.model.cache import HookedEntry
from mi_hops.model.classes import backend_of
from mi_hops.model.identity import own_weight
from mi_hops.model.plain import (
    attend,
    for_shared_heads,
    is_foreign,
    is_ordinary,
    norm_of,
    normalise,
    own_bias,
    rotary_table,
    rotation,
)
from mi_hops.model.types import HookedModel


@contextmanager
def lean_blocks(model: HookedModel) -> Iterator[None]:
    """For the length of the block, passes compute what is looked at.

    Nothing changes for a Bridge, for other families than GPT-2 and LLaMA, in half precision (where the
    order of summation shows), for a model with modules of somebody else's, under autograd, and in a part
    of a block whose inner hook points are in use.
    """
    cfg = model.cfg
    if not (
        backend_of(model) == "hooked"
        and is_ordinary(cfg)
        and cfg.dtype in (torch.float32, torch.float64)
        and cfg.n_devices == 1
        and not any("forward" in m.__dict__ or is_foreign(m) for m in model.modules())
    ):
        yield
        return
    masks = _Masks()
    with ExitStack() as stack:
        for block in model.blocks:
            norm = _Norm(model, block.ln1, once=True)
            parts: dict[Any, Callable[..., Tensor]] = {
                block.ln1: norm,
                block.attn: _attention(block.attn, norm, masks),
                block.ln2: _Norm(model, block.ln2),
            }
            if cfg.gated_mlp:
                parts[block.mlp] = _gated(block.mlp)
            for module, forward in parts.items():
                # On the instance, before the class's own; taken off again, the class's own is back.
                stack.callback(module.__dict__.pop, "forward", None)
                module.forward = forward
        yield


class _Norm:
    """A norm.

    Args:
        once: it computes the same tensor once, until it is told to `forget`.
    """

    def __init__(self, model: HookedModel, norm: Any, *, once: bool = False) -> None:
        self._norm, self._own, self._once = norm, norm.forward, once
        like = next(model.parameters())
        self._parts = norm_of(model, norm, like.new_empty(model.cfg.d_model))
        self._made: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if _watched(self._norm.hook_scale, self._norm.hook_normalized):
            return self._own(x)  # a hook in the norm acts each time
        if self._made is not None and self._made[0] is x:
            return self._made[1]
        made = normalise(x, *self._parts)
        if self._once:
            self._made = x, made
        return made

    def forget(self) -> None:
        self._made = None


class _Masks:
    """The masks of a pass, made once for all of its blocks."""

    def __init__(self) -> None:
        self._asked: Tensor | None = None
        self._ones = True
        self._causal: tuple[tuple[int, int, int], Tensor] | None = None

    def hides_nothing(self, mask: Tensor | None) -> bool:
        """Whether an attention mask is all ones."""
        if mask is not None and mask is not self._asked:
            self._asked, self._ones = mask, bool(mask.all())
        return mask is None or self._ones

    def causal(self, n_pos: int, n_slots: int, n_shared: int, like: Tensor) -> Tensor:
        """For the last `n_pos` of `n_slots` positions."""
        key = n_pos, n_slots, n_shared
        if self._causal is None or self._causal[0] != key:
            full = like.new_full((n_pos, n_slots), float("-inf")).triu(n_slots - n_pos + 1)
            self._causal = key, for_shared_heads(full, n_shared)
        return self._causal[1]


def _watched(*points: Any) -> bool:
    """Whether a hook sits at one of these points, or gradients are wanted."""
    return torch.is_grad_enabled() or any(point._forward_hooks for point in points)


def _attention(attn: Any, norm: _Norm, masks: _Masks) -> Callable[..., Tensor]:
    cfg, own = attn.cfg, attn.forward
    rotary = cfg.positional_embedding_type == "rotary"
    inner = [attn.hook_attn_scores, attn.hook_pattern, *([attn.hook_rot_k] if rotary else [])]
    biases = {name: own_bias(attn, name) for name in "QKVO"}

    def project(x: Tensor, name: str) -> Tensor:
        weight = rearrange(own_weight(attn, f"W_{name}"), "head model d -> (head d) model")
        made = linear(x, weight, biases[name])
        return rearrange(made, "row pos (head d) -> row pos head d", d=cfg.d_head)

    def turn(x: Tensor, offset: int) -> Tensor:
        if not rotary:
            return x
        end = offset + x.shape[1]
        cos, sin = (table[offset:end, None] for table in rotary_table(attn, end))
        return rotation(cos, sin)(x)

    def forward(
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        norm.forget()
        entry = past_kv_cache_entry
        if (
            _watched(*inner)
            or not masks.hides_nothing(attention_mask)
            or cfg.use_attn_result
            or cfg.use_split_qkv_input
            or cfg.use_attn_in
        ):
            return own(
                query_input=query_input,
                key_input=key_input,
                value_input=value_input,
                past_kv_cache_entry=entry,
                attention_mask=attention_mask,
                **others,
            )
        q = attn.hook_q(project(query_input, "Q"))
        k = attn.hook_k(project(key_input, "K"))
        v = attn.hook_v(project(value_input, "V"))
        offset = 0 if entry is None else entry.past_keys.shape[1]
        if isinstance(entry, HookedEntry):
            k, v = entry.append_turned(turn(k, offset), v, turn)
        else:
            if entry is not None:
                k, v = entry.append(k, v)
            k = turn(k, 0)
        if rotary:
            q = attn.hook_rot_q(turn(q, offset))
        n_shared = q.shape[2] // k.shape[2]
        mask = masks.causal(q.shape[1], k.shape[1], n_shared, q)
        q, k, v = (rearrange(x, "row pos head d -> row head pos d") for x in (q, k, v))
        z = attn.hook_z(attend(q, k, v, mask, 1 / attn.attn_scale))
        weight = rearrange(attn.W_O, "head d model -> model (head d)")
        return linear(rearrange(z, "row pos head d -> row pos (head d)"), weight, biases["O"])

    return forward


def _gated(mlp: Any) -> Callable[..., Tensor]:
    own = mlp.forward
    b_in, b_out = own_bias(mlp, "in"), own_bias(mlp, "out")

    def forward(x: Tensor) -> Tensor:
        if _watched():
            return own(x)
        gate = mlp.hook_pre(linear(x, mlp.W_gate.T))
        post = mlp.act_fn(gate).mul_(mlp.hook_pre_linear(linear(x, mlp.W_in.T)))
        if b_in is not None:
            post += b_in
        return linear(mlp.hook_post(post), mlp.W_out.T, b_out)

    return forward
