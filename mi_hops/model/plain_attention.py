"""HookedTransformer's attention as one fused kernel, for passes in which nothing is hooked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mi_hops.model.classes import backend_of
from mi_hops.model.types import HookedModel

#: Families whose attention is what `_forward` computes.
_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM")


@contextmanager
def plain_attention(model: HookedModel) -> Iterator[None]:
    """For the length of the block, passes over a `RowCache` attend without hook points.

    HookedTransformer rotates all keys again in every pass, repeats them for every head that shares
    them, and exposes scores and pattern. Here keys are cached already rotated, and what remains is
    a difference of rounding. Nothing changes for a Bridge, in half precision (where the order of
    summation shows) and for other families.
    """
    cfg = model.cfg
    if not (
        backend_of(model) == "hooked"
        and cfg.original_architecture in _ARCHITECTURES
        and cfg.dtype in (torch.float32, torch.float64)
        and not cfg.use_attn_result
        and not cfg.use_split_qkv_input
        and not cfg.use_attn_in
        and not cfg.load_in_4bit
    ):
        yield
        return
    with ExitStack() as stack:
        for block in model.blocks:
            # On the instance, before the class's own; taken off again, the class's own is back.
            stack.callback(block.attn.__dict__.pop, "forward", None)
            block.attn.forward = _forward(block.attn)
        yield


def _forward(attn: Any) -> Callable[..., Float[Tensor, "row pos d_model"]]:
    rotary = attn.cfg.positional_embedding_type == "rotary"

    def forward(
        query_input: Float[Tensor, "row pos d_model"],
        key_input: Float[Tensor, "row pos d_model"],
        value_input: Float[Tensor, "row pos d_model"],
        past_kv_cache_entry: Any,
        attention_mask: Tensor,
        **others: Any,
    ) -> Float[Tensor, "row pos d_model"]:
        q, k, v = attn.calculate_qkv_matrices(query_input, key_input, value_input)
        if rotary:
            past = past_kv_cache_entry.past_keys.shape[1]
            q, k = (attn.apply_rotary(x, past, attention_mask) for x in (q, k))
        k, v = past_kv_cache_entry.append(k, v)
        # Heads that share keys are further queries of one head, so that no key is repeated.
        n_shared, n_pos = q.shape[2] // k.shape[2], q.shape[1]
        z = torch.nn.functional.scaled_dot_product_attention(
            rearrange(q, "row pos (kv head) d -> row kv (head pos) d", head=n_shared),
            rearrange(k, "row slot kv d -> row kv slot d"),
            rearrange(v, "row slot kv d -> row kv slot d"),
            attn_mask=repeat(
                past_kv_cache_entry.seen.to(q.device),
                "row one pos slot -> row one (head pos) slot",
                head=n_shared,
            ),
            scale=1 / attn.attn_scale,
        )
        z = rearrange(z, "row kv (head pos) d -> row pos (kv head d)", pos=n_pos)
        weight = rearrange(attn.W_O, "head d model -> model (head d)")
        return torch.nn.functional.linear(z, weight, attn.b_O)

    return forward
