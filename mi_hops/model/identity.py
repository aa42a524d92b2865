"""What a model is: sizes, placement, fingerprint, and the provenance of results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from mi_hops.model.classes import backend_of
from mi_hops.model.types import HookedModel, MissingHookError


def n_kv_heads(model: HookedModel) -> int:
    """Number of key/value heads; less than ``cfg.n_heads`` under grouped-query attention.

    TransformerLens's ``ungroup_grouped_query_attention`` gives each query head its own copy.
    """
    found = getattr(model.cfg, "n_key_value_heads", None)
    copied = getattr(model.cfg, "ungroup_grouped_query_attention", False)
    return int(found) if found and not copied else int(model.cfg.n_heads)


def n_heads_of(model: HookedModel, kind: str) -> int:
    """Heads on the head axis of an activation kind: key/value heads for k and v, else all."""
    return n_kv_heads(model) if kind in ("k", "v") else int(model.cfg.n_heads)


def device_of(model: HookedModel) -> torch.device:
    """The device of the embedding, where tokens go in."""
    return next(iter(model.parameters())).device


def dtype_of(model: HookedModel) -> torch.dtype:
    """The dtype of the weights."""
    return next(iter(model.parameters())).dtype


def ln_final(model: HookedModel) -> Any | None:
    """The final norm; None for a HookedTransformer whose config has no norms."""
    return getattr(model, "ln_final", None)


def processing_of(model: HookedModel) -> Literal["none", "fold", "centre"]:
    """What TransformerLens's weight processing did: norms folded away, or only weights centred."""
    if backend_of(model) == "bridge":
        gains = getattr(ln_final(model), "weight", None)
        processed = getattr(model, "_weights_processed", False)
        folded = processed and (gains is None or bool((gains == gains[0]).all()))
    else:
        folded = str(model.cfg.normalization_type).endswith("Pre")
        processed = True  # it does not say
    if folded:
        return "fold"
    return "centre" if processed and _is_centred(model) else "none"


def _is_centred(model: HookedModel) -> bool:
    """Whether some rows of W_U or W_E have the mean 0, up to rounding."""
    some = [w[:16].detach().float() for w in (own_weight(model, "W_U"), own_weight(model, "W_E"))]
    return any(bool((w.mean(-1).abs() <= 1e-3 * w.std(-1)).all()) for w in some)


def prepends_bos(model: HookedModel) -> bool:
    """Whether prompts of this model begin with BOS.

    It is TransformerLens's own setting, ``cfg.default_prepend_bos``. `load_model` sets it to what the
    tokenizer does, or to its own ``bos=``; a model loaded in another way keeps what it has.
    """
    wanted = bool(getattr(model.cfg, "default_prepend_bos", True))
    return wanted and getattr(model.tokenizer, "bos_token_id", None) is not None


def takes_jacobian_lens(model: HookedModel) -> bool:
    """Whether TransformerLens fits its `JacobianLens` on this model: a Bridge, unprocessed."""
    return backend_of(model) == "bridge" and processing_of(model) == "none"


def fingerprint(model: HookedModel) -> str:
    """A short digest of shape and weights.

    Every matrix, bias and norm of embedding, blocks and unembedding contributes the sum of its bits as
    integers (exact, so neither device, thread count nor storage order matters), and matrices an even
    sample of their values: a change of one element changes the fingerprint, and it takes about as long
    as reading the weights once. Both model classes of one
    checkpoint agree: a bias that is absent counts as zeros, a norm that is folded away as ones.

    Raises:
        MissingHookError: a model whose blocks do not have attention and MLP matrices.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab"):
        digest.update(f"{name}={getattr(model.cfg, name)};".encode())
    for where, owner, part in _owners(model):
        for name in _WEIGHTS[part]:
            tensor = own_weight(owner, name)
            if tensor is None:
                if part == "attn" and name in ("W_Q", "W_O"):
                    raise missing_weight(model, f"{where}.{name}")
                continue
            tensor = tensor.detach()
            if part == "norm" and name == "w":
                tensor = tensor - 1
            bits = tensor.view(integers[tensor.element_size()])
            total = int(bits.sum(dtype=torch.promote_types(bits.dtype, torch.int32)))
            matrix = name.startswith("W")
            if total or matrix:
                digest.update(f"{part}.{name}={total};".encode())
            if matrix:
                even = tuple(slice(None, None, max(1, n // 16)) for n in tensor.shape)
                digest.update(tensor[even].to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


_WEIGHTS = {
    "embed": ("W_E",),
    "pos_embed": ("W_pos",),
    "unembed": ("W_U", "b_U"),
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
    "mlp": ("W_in", "W_gate", "W_out", "b_in", "b_out"),
    "norm": ("w", "b"),
}


def own_weight(owner: Any, name: str) -> Any:
    """A module's weight by TransformerLens's name, or None.

    A grouped-query HookedTransformer repeats heads in W_K and the like; its own are named _W_K.
    """
    tensor = getattr(owner, f"_{name}", None)
    return getattr(owner, name, None) if tensor is None else tensor


def _owners(model: HookedModel) -> Iterator[tuple[str, Any, str]]:
    """Modules with weights, their names, and which of `_WEIGHTS` they hold."""
    yield "", model, "embed"
    yield "", model, "unembed"
    if (norm := ln_final(model)) is not None:
        yield "ln_final", norm, "norm"
    if getattr(model, "pos_embed", None) is not None:
        yield "pos_embed", model.pos_embed, "pos_embed"
    parts = {"attn": "attn", "mlp": "mlp", "ln1": "norm", "ln2": "norm"}
    for i, block in enumerate(model.blocks):
        for name, part in parts.items():
            module = getattr(block, name, None)
            if module is not None:
                yield f"blocks.{i}.{name}", module, part
            elif name == "attn":
                raise missing_weight(model, f"blocks.{i}.attn")


def missing_weight(model: HookedModel, name: str) -> MissingHookError:
    """The error of a model without a weight that a method needs."""
    return MissingHookError(
        f"this {type(model).__name__} has no weight {name}; GPT-2 and LLaMA have it, and so must "
        "another family that is to be used here"
    )


def permanent_hooks(model: HookedModel) -> list[str]:
    """Where the model has forward hooks that its user made permanent; they act in every pass."""
    points: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if any(handle.is_permanent for handle in point.fwd_hooks):
            points.setdefault(id(point), name)  # a point of the Bridge has several names
    return sorted(points.values())


def provenance(model: HookedModel, **more: Any) -> dict[str, Any]:
    """The record stored with a result: model, dtype, backend, BOS, versions, hooks, `more`."""
    hooks = permanent_hooks(model)
    quantised = getattr(model.cfg, "dequantised_from", None)
    return {
        "fingerprint": fingerprint(model),
        "model": Path(str(getattr(model.cfg, "model_name", None) or "unnamed")).name,
        **({"weights": f"dequantised from {quantised}"} if quantised else {}),
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "device": str(device_of(model)),
        "backend": backend_of(model),
        "processing": processing_of(model),
        "bos": prepends_bos(model),
        **({"permanent_hooks": hooks} if hooks else {}),
        "versions": {p: metadata.version(p) for p in ("torch", "transformer-lens", "transformers")},
        **more,
    }
