"""Blocks that skip what nobody observes, for the length of a sweep.

HookedTransformer normalises a block's input once each for queries, keys and values, adds biases that are
zero, repeats every key and value for all heads that share it, rotates all keys again, those of
a cache included, and exposes scores and pattern. Here each norm is computed once, and attention is
one fused kernel over keys that are not repeated, wherever no hook sits at scores, pattern, rotated keys or in
the norm. Of a Bridge only the attention of LLaMA is replaced, whose keys are repeated too. All other hook
points see what they saw; the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from operator import is_not
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

from mi_hops.model.classes import backend_of
from mi_hops.model.identity import own_weight
from mi_hops.model.plain import (
    attend,
    for_shared_heads,
    norm_of,
    normalise,
    own_bias,
    rotary_table,
    rotation,
)
from mi_hops.model.shortcuts import OPTIONS, is_supported, may_be_rewritten
from mi_hops.model.types import HookedModel


@contextmanager
def lean_blocks(model: HookedModel) -> Iterator[None]:
    """For the length of the context, passes skip what nobody observes.

    Nothing changes for a model that may not be rewritten (`shortcuts`), under autograd, and in a part of a
    block whose inner hook points are in use.
    """
    parts = {}
    # Asked first, for within another such context there is nothing to do, batch after batch.
    if is_supported(model.cfg) and not _has_forwards(model) and may_be_rewritten(model):
        parts = _hooked_parts(model) if backend_of(model) == "hooked" else _bridge_parts(model)
    try:
        for module, forward in parts.items():
            # On the instance, before the class's own; taken off again, the class's own is back.
            module.__dict__["forward"] = forward
        yield
        _remove(parts)
    except BaseException:
        _remove(parts)
        raise


def _has_forwards(model: HookedModel) -> bool:
    """Whether a part of a block has a forward of its own already."""
    return any("forward" in m.__dict__ for block in model.blocks for m in block.children())


def _remove(parts: Iterable[Any]) -> None:
    for module in parts:
        module.__dict__.pop("forward", None)


def _hooked_parts(model: HookedModel) -> dict[Any, Callable[..., Any]]:
    """Module -> what it is to do instead."""
    parts: dict[Any, Callable[..., Any]] = {}
    like = next(model.parameters())

    def bare(norm: Any) -> Callable[[Tensor], Tensor]:
        own = norm_of(model, norm, like.new_empty(model.cfg.d_model))
        return lambda x: normalise(x, *own)

    @lru_cache(maxsize=1)
    def causal_mask(n_pos: int, n_slots: int, n_shared: int) -> Tensor:
        """For the last `n_pos` of `n_slots` positions."""
        full = like.new_full((n_pos, n_slots), float("-inf")).triu(n_slots - n_pos + 1)
        return for_shared_heads(full, n_shared)

    all_ones = _Once(lambda mask: mask is None or bool(mask.all()))
    for block in model.blocks:
        once = _Once(bare(block.ln1))
        parts[block.ln1] = _norm(block.ln1, once)
        parts[block.attn] = _attention(block.attn, once, all_ones, causal_mask)
        parts[block.ln2] = _norm(block.ln2, bare(block.ln2))
        if model.cfg.gated_mlp:
            parts[block.mlp] = _gated(block.mlp)
    return parts


def _bridge_parts(model: HookedModel) -> dict[Any, Callable[..., Any]]:
    """As `_hooked_parts`."""
    if model.cfg.positional_embedding_type != "rotary":
        return {}
    rotations = _Once(lambda cos, sin: rotation(cos[:, None], sin[:, None]))
    shared = _Once(for_shared_heads)
    return {block.attn: _bridge_attention(block.attn, rotations, shared) for block in model.blocks}


class _Once:
    """A function whose last value stands until it is given other tensors, or told to `forget`."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._given: tuple[Any, ...] = ()
        self._made: Any = None

    def __call__(self, *given: Any) -> Any:
        if len(given) != len(self._given) or any(map(is_not, given, self._given)):
            self._given, self._made = given, self._make(*given)
        return self._made

    def forget(self) -> None:
        self._given, self._made = (), None


def _norm(norm: Any, bare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    own = norm.forward

    def forward(x: Tensor) -> Tensor:
        if _watched(norm.hook_scale, norm.hook_normalized):
            return own(x)  # a hook in the norm acts each time
        return bare(x)

    return forward


def _watched(*points: Any) -> bool:
    """Whether a hook sits at one of these points, or gradients are wanted."""
    return torch.is_grad_enabled() or any(point._forward_hooks for point in points)


def _attention(
    attn: Any, norm: _Once, all_ones: _Once, causal_mask: Callable[[int, int, int], Tensor]
) -> Callable[..., Tensor]:
    cfg, own = attn.cfg, attn.forward
    rotary = cfg.positional_embedding_type == "rotary"
    inner = [attn.hook_attn_scores, attn.hook_pattern, *([attn.hook_rot_k] if rotary else [])]
    biases = {name: own_bias(attn, name) for name in "QKVO"}

    def project(x: Tensor, name: str) -> Tensor:
        weight = rearrange(own_weight(attn, f"W_{name}"), "head model d -> (head d) model")
        made = linear(x, weight, biases[name])
        return rearrange(made, "row pos (head d) -> row pos head d", d=cfg.d_head)

    def rotate(x: Tensor, offset: int) -> Tensor:
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
            or not all_ones(attention_mask)
            or any(getattr(cfg, flag) for flag in OPTIONS)
        ):
            others |= {"past_kv_cache_entry": entry, "attention_mask": attention_mask}
            return own(query_input, key_input, value_input, **others)
        q = attn.hook_q(project(query_input, "Q"))
        k = attn.hook_k(project(key_input, "K"))
        v = attn.hook_v(project(value_input, "V"))
        offset = 0 if entry is None else entry.past_keys.shape[1]
        if getattr(entry, "rotates", False):  # what many rows share is rotated once
            k, v = entry.append(rotate(k, offset), v, rotate)
        else:
            if entry is not None:
                k, v = entry.append(k, v)
            k = rotate(k, 0)
        if rotary:
            q = attn.hook_rot_q(rotate(q, offset))
        n_shared = q.shape[2] // k.shape[2]
        mask = causal_mask(q.shape[1], k.shape[1], n_shared)
        q, k, v = (rearrange(x, "row pos head d -> row head pos d") for x in (q, k, v))
        z = attn.hook_z(attend(q, k, v, mask, 1 / attn.attn_scale))
        weight = rearrange(attn.W_O, "head d model -> model (head d)")
        return linear(rearrange(z, "row pos head d -> row pos (head d)"), weight, biases["O"])

    return forward


def _bridge_attention(attn: Any, rotations: _Once, shared: _Once) -> Callable[..., Any]:
    """As `_attention`, for the Bridge's component of LLaMA."""
    own, wrapped, cfg = attn.forward, attn.original_component, attn.config
    inner = [attn.hook_attn_scores, attn.hook_pattern, attn.hook_cos, attn.hook_sin]
    d_head, n_shared = wrapped.head_dim, wrapped.num_key_value_groups

    def apart(x: Tensor) -> Tensor:
        return rearrange(x, "row pos (head d) -> row head pos d", d=d_head)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        n_slots = n_pos = hidden_states.shape[1]
        if past_key_values is not None:
            n_slots += past_key_values.get_seq_length(wrapped.layer_idx)
        if (
            _watched(*inner)
            or attn.training
            or attention_mask is None
            or attention_mask.dtype != hidden_states.dtype
            or attention_mask.shape[1:] != (1, n_pos, n_slots)
            or any(getattr(cfg, flag, False) for flag in OPTIONS)
        ):
            others |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
            return own(
                hidden_states=hidden_states, position_embeddings=position_embeddings, **others
            )
        x = attn.hook_in(hidden_states)
        q, k, v = apart(attn.q(x)), apart(attn.k(x)), apart(attn.v(x))
        rotate = rotations(*position_embeddings)
        q, k = attn.hook_rot_q(rotate(q)), attn.hook_rot_k(rotate(k))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, wrapped.layer_idx)
        z = attend(q, k, v, shared(attention_mask, n_shared), wrapped.scaling)
        z = rearrange(z, "row pos head d -> row pos (head d)")
        return attn.hook_out(attn.o(z)), None

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
