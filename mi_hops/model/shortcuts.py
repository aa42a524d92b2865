"""Whether a pass may leave out or reorder what a model does, because it computes what its weights say.

A sweep joins rows late, starts behind a prefix, and skips what nobody observes. That is exact as long
as nothing else has a say: no hook of the user's, and no module or forward of a third party.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from transformer_lens.hook_points import HookPoint

from mi_hops.model.classes import backend_of
from mi_hops.model.types import HookedModel

_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM")
#: Whose modules a model is made of. Of another's (an adapter, a quantised layer) nobody knows what they do.
_KNOWN = ("transformers", "transformers_modules", "transformer_lens", "mi_hops")
#: torch's own modules in GPT-2 and LLaMA. Any other has replaced something.
_OF_TORCH = (
    torch.nn.Linear,
    torch.nn.Embedding,
    torch.nn.LayerNorm,
    torch.nn.Dropout,
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.SiLU,
    torch.nn.GELU,
)
#: Options under which blocks have further hook points; `load_model` leaves them off.
OPTIONS = ("use_attn_result", "use_split_qkv_input", "use_attn_in")
#: Hooks that the libraries attach themselves, and that only look.
_LOOKING = ("transformer_lens.model_bridge.", "transformers.")


def is_supported(cfg: Any) -> bool:
    """Whether blocks are those of GPT-2 or LLaMA, with no option that changes what they compute."""
    unsupported = (
        *OPTIONS, "load_in_4bit", "use_qk_norm",
        "use_logn_attn", "use_local_attn", "use_attention_sinks", "use_dynamic_ntk_rope",
        "rotary_adjacent_pairs", "ungroup_grouped_query_attention", "attn_only", "clip_qkv",
        "parallel_attn_mlp", "use_normalization_before_and_after", "post_embedding_ln",
    )  # fmt: skip
    family = getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)
    return (
        family in _ARCHITECTURES
        and (getattr(cfg, "attention_dir", None) or "causal") == "causal"
        and (getattr(cfg, "attn_scores_soft_cap", None) or -1) <= 0
        and (getattr(cfg, "output_logits_soft_cap", None) or -1) <= 0
        and getattr(cfg, "rotary_dim", None) in (None, cfg.d_head)
        and not any(getattr(cfg, name, False) for name in unsupported)
    )


def may_be_rewritten(model: HookedModel) -> bool:
    """Whether other code that reads the model's weights computes what the model computes.

    So it is for GPT-2 and LLaMA of both classes in float32, and for HookedTransformer in float64
    (transformers' RMSNorm takes float64 for float32), on one device, with no third-party module. In half
    precision the order of summation shows. Hooks at hook points do not count here.
    """
    places = {(p.device, p.dtype) for p in model.parameters()}
    if len(places) != 1 or not is_supported(model.cfg):
        return False
    ((device, dtype),) = places
    return (
        (dtype == torch.float32 or (dtype == torch.float64 and backend_of(model) == "hooked"))
        and device.type != "mps"  # a fused linear layer is wrong there in some versions of torch
        and not torch.is_autocast_enabled(device.type)
        and not getattr(model, "compatibility_mode", False)
        and not _is_altered(model)
        and all(type(m) in _OF_TORCH for m in model.modules() if _root(type(m)) == "torch")
    )


def has_hooks(model: HookedModel) -> bool:
    """Whether a forward hook sits at any hook point; outside a sweep it is the user's."""
    return any(isinstance(m, HookPoint) and m._forward_hooks for m in model.modules())


def is_touched(model: HookedModel) -> bool:
    """Whether anything besides its weights decides what the model returns: a hook of any kind, a third-party module."""
    return has_hooks(model) or _is_altered(model)


def _is_altered(model: HookedModel) -> bool:
    """Whether a module, or a hook of torch's own, is a third party's."""
    return bool(
        torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    ) or any(is_foreign(m) for m in model.modules() if not isinstance(m, HookPoint))


def is_foreign(module: Any) -> bool:
    """Whether a third party decides what a module returns, by its class, its forward or a hook."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    kind: Any = type(module)
    return (
        not _is_known(kind, kind.forward)
        or ("forward" in module.__dict__ and not _is_ours(module.__dict__["forward"]))
        or any(not _origin(hook).startswith(_LOOKING) for hook in hooks)
    )


@lru_cache(maxsize=512)
def _is_known(kind: Any, forward: Any) -> bool:
    """Whether a class, with the forward it has now, is of torch's or transformers' layers, or TransformerLens's."""
    ours = _root(kind) in _KNOWN or kind.__module__.startswith("torch.nn.modules.")
    return ours and _is_ours(forward)


def _is_ours(forward: Any) -> bool:
    return _origin(forward).split(".")[0] in ("torch", *_KNOWN)


def _root(kind: Any) -> str:
    return str(kind.__module__).split(".")[0]


def _origin(call: Any) -> str:
    """The module whose code a callable is; ``functools.wraps`` does not hide it."""
    function = getattr(call, "__func__", call)
    if not hasattr(function, "__globals__"):
        function = type(call).__call__
    return str(getattr(function, "__globals__", {}).get("__name__", ""))
