"""HookedTransformer's blocks without what nobody looks at, for the length of a sweep.

A block normalises its input once each for queries, keys and values; grouped-query attention repeats every
key and value for all heads that share it, turns all keys to their positions again, those of a cache
included, and exposes scores and pattern. Here a norm is computed once, and attention is one fused kernel
over keys that are not repeated, wherever no hook sits at scores, pattern, turned keys or the norm. Hooks at
queries, keys, values, z and outputs see what they saw; the difference is one of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from mi_hops.model.cache import HookedEntry
from mi_hops.model.classes import backend_of
from mi_hops.model.types import HookedModel

#: Families whose attention is what `_attention` computes.
_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM")


@contextmanager
def lean_blocks(model: HookedModel) -> Iterator[None]:
    """For the length of the block, passes compute what is looked at.

    Nothing changes for a Bridge, for other families than GPT-2 and LLaMA, in half precision (where the
    order of summation shows), under autograd, and in a block whose inner hook points are in use.
    """
    cfg = model.cfg
    if not (
        backend_of(model) == "hooked"
        and cfg.original_architecture in _ARCHITECTURES
        and cfg.dtype in (torch.float32, torch.float64)
        and not cfg.load_in_4bit
        and not any("forward" in block.attn.__dict__ for block in model.blocks)
    ):
        yield
        return
    masks = _Masks()
    with ExitStack() as stack:
        for block in model.blocks:
            norm = _Once(block.ln1)
            parts = ((block.ln1, norm), (block.attn, _attention(block.attn, norm, masks)))
            for module, forward in parts:
                # On the instance, before the class's own; taken off again, the class's own is back.
                stack.callback(module.__dict__.pop, "forward", None)
                module.forward = forward
        yield


class _Once:
    """A norm that computes the same tensor once, until it is told to `forget`."""

    def __init__(self, norm: Any) -> None:
        self._norm, self._own = norm, norm.forward
        self._made: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if _in_use(self._norm.hook_scale, self._norm.hook_normalized):
            return self._own(x)  # a hook at the norm acts each time
        if self._made is None or self._made[0] is not x:
            self._made = x, self._own(x)
        return self._made[1]

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
        """To be added to the scores of the last `n_pos` of `n_slots` positions, once per shared head."""
        key = n_pos, n_slots, n_shared
        if self._causal is None or self._causal[0] != key:
            full = like.new_full((n_pos, n_slots), float("-inf")).triu(n_slots - n_pos + 1)
            self._causal = key, repeat(full, "pos slot -> (head pos) slot", head=n_shared)
        return self._causal[1]


def _in_use(*points: Any) -> bool:
    return any(point._forward_hooks for point in points)


def _attention(attn: Any, norm: _Once, masks: _Masks) -> Callable[..., Tensor]:
    cfg, own = attn.cfg, attn.forward
    rotary = cfg.positional_embedding_type == "rotary"
    inner = [attn.hook_attn_scores, attn.hook_pattern, *([attn.hook_rot_k] if rotary else [])]

    def turn(x: Tensor, offset: int) -> Tensor:
        return attn.apply_rotary(x, offset) if rotary else x

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
            not masks.hides_nothing(attention_mask)
            or torch.is_grad_enabled()
            or _in_use(*inner)
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
        q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
        offset = 0 if entry is None else entry.past_keys.shape[1]
        if isinstance(entry, HookedEntry):
            k, v = entry.append_turned(turn(k, offset), v, turn)
        else:
            if entry is not None:
                k, v = entry.append(k, v)
            k = turn(k, 0)
        if rotary:
            q = attn.hook_rot_q(turn(q, offset))
        # Heads that share keys are further queries of one head, so that no key is repeated.
        n_pos, n_slots, n_shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        z = torch.nn.functional.scaled_dot_product_attention(
            rearrange(q, "row pos (kv head) d -> row kv (head pos) d", head=n_shared),
            rearrange(k, "row slot kv d -> row kv slot d"),
            rearrange(v, "row slot kv d -> row kv slot d"),
            attn_mask=masks.causal(n_pos, n_slots, n_shared, q),
            scale=1 / attn.attn_scale,
        )
        z = rearrange(z, "row kv (head pos) d -> row pos (kv head) d", head=n_shared)
        z = rearrange(attn.hook_z(z), "row pos head d -> row pos (head d)")
        weight = rearrange(attn.W_O, "head d model -> model (head d)")
        return torch.nn.functional.linear(z, weight, attn.b_O)

    return forward
