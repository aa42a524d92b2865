"""Loading models, and every difference between TransformerLens versions and model classes.

`mi_hops` takes a `HookedTransformer` (TransformerLens 3.9) or a `TransformerBridge` (3.9 and 4.x).
This is the only file that knows which of the two it holds. Nothing is ever decided from a model's
name. Layers and positions count from 0; hook names are TransformerLens's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

Backend = Literal["hooked", "bridge"]
HookFn = Callable[["Tensor"], "Tensor | None"]
Hook = tuple[str, HookFn]

CHECKPOINTS = Path(__file__).parent / "checkpoints"

#: Kind of activation -> TransformerLens hook name; ``{}`` is the layer.
HOOK_NAMES = {
    "embed": "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "pattern": "blocks.{}.attn.hook_pattern",
    "mlp_pre": "blocks.{}.mlp.hook_pre",
    "mlp_post": "blocks.{}.mlp.hook_post",
}


class LensModel(Protocol):
    """What this package needs of a model; both TransformerLens classes have it."""

    cfg: Any
    tokenizer: Any
    blocks: Any
    hook_dict: Any
    W_U: Any
    ln_final: Any
    unembed: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass."""
        ...

    def hooks(self, *args: Any, **kwargs: Any) -> Any:
        """A context in which hooks are attached."""
        ...

    def parameters(self) -> Iterator[Any]:
        """The weights."""
        ...


class MissingHookError(ValueError):
    """A model has not got a hook point or a weight that a method needs; the message names it."""


# -- which class ------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def hooked_class() -> type | None:
    """`HookedTransformer`, or None where TransformerLens (4.x) no longer has it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def backend_of(model: LensModel) -> Backend:
    """``"hooked"`` or ``"bridge"``.

    Raises:
        ValueError: `model` is of neither class.
    """
    hooked = hooked_class()
    if hooked is not None and isinstance(model, hooked):
        return "hooked"
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return "bridge"
    raise ValueError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; "
        "load one with mi_hops.load_model"
    )


# -- loading ----------------------------------------------------------------------------------


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json"))


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: Backend | None = None,
    processing: Literal["none", "fold"] = "none",
) -> LensModel:
    """Load a TransformerLens model in evaluation mode with frozen weights.

    Args:
        name_or_path: a bundled model (see `bundled_models`), a local Hugging Face folder, or a hub
            id. A hub token is taken from the environment (``HF_TOKEN``).
        device: default CUDA where there is one, else CPU.
        dtype: a torch dtype or its name; default the checkpoint's own.
        backend: ``"hooked"`` or ``"bridge"``; default hooked for GPT-2 and LLaMA where
            TransformerLens has it, else bridge.
        processing: ``"none"`` leaves the weights as they are; ``"fold"`` applies TransformerLens's
            default weight processing (fold_ln, centring). It changes lens, injection and erasure
            numbers and is recorded in every result.

    Raises:
        ValueError: unknown dtype, backend or processing; a device that is not there; a folder that
            is no checkpoint or has no tokenizer, or whose files cannot be read; a backend that the
            installed TransformerLens or the family does not offer.
        OSError: a hub id that cannot be fetched (offline, private, or misspelt).
    """
    from transformers import AutoConfig

    if processing not in ("none", "fold"):
        raise ValueError(f"processing is {processing!r}; expected 'none' or 'fold'")
    source = _source(name_or_path)
    device = usable_device(device)
    dtype = _dtype(dtype)
    with _reading(source, "config.json"):
        family = AutoConfig.from_pretrained(source).model_type
    with _reading(source, "tokenizer"):
        tokenizer = _tokenizer(source)
    if backend is None:
        backend = "hooked" if hooked_class() and family in _HOOKED_FAMILIES else "bridge"
    if backend == "hooked":
        if hooked_class() is None:
            raise ValueError(
                "this TransformerLens has no HookedTransformer (removed in 4.0); use "
                "backend='bridge' or install mi-hops[hooked]"
            )
        if family not in _HOOKED_FAMILIES:
            raise ValueError(
                f"backend 'hooked' loads {sorted(_HOOKED_FAMILIES)} checkpoints, this one is "
                f"{family!r}; use backend='bridge'"
            )
        model = _load_hooked(source, tokenizer, dtype, device, processing)
    elif backend == "bridge":
        model = _load_bridge(source, tokenizer, dtype, device, processing)
    else:
        raise ValueError(f"backend is {backend!r}; expected 'hooked', 'bridge' or None")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; without one CUDA where there is any, else the CPU.

    Raises:
        ValueError: no device has this name, or none is there.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # a name that torch knows need not have a device behind it
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used ({first}); expected 'cpu', or 'cuda', 'cuda:1', "
            "... where there are such GPUs"
        ) from error
    return found


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """Say of a folder or a hub id which part of it could not be read."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have errors of their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if Path(source).is_dir():
            raise ValueError(
                f"{source}: cannot read the {what} of this checkpoint ({why})"
            ) from error
        if isinstance(error, OSError):
            raise OSError(f"{_unreachable(source)} ({what}: {why})") from error
        raise


def _source(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    bundled = CHECKPOINTS / path.name
    if str(name_or_path) == path.name and (bundled / "config.json").exists():
        return str(bundled)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"{path} has no config.json; expected a folder written by save_pretrained"
            )
        if not any((path / f).exists() for f in _TOKENIZER_FILES):
            raise ValueError(
                f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save one "
                "beside the weights with tokenizer.save_pretrained"
            )
        return str(path)
    text = str(name_or_path)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ValueError(_unreachable(name_or_path))
    return text


# Files that hold a vocabulary; without one transformers makes an empty tokenizer, or none.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _unreachable(name: str | Path) -> str:
    return (
        f"cannot load {str(name)!r}: it is no bundled model ({', '.join(bundled_models())}), no "
        "local folder, and no checkpoint that could be fetched from the hub. Offline, pass the path "
        "of a folder; for a private model set HF_TOKEN"
    )


def _dtype(dtype: torch.dtype | str | None) -> Any:
    import torch

    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}; expected e.g. 'float32', 'bfloat16', 'float16'")
    return found


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _weights(source: str, dtype: Any, **options: Any) -> Any:
    """The checkpoint as transformers loads it, on the CPU."""
    from transformers import AutoModelForCausalLM

    with _reading(source, "weights"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)


def _load_bridge(source: str, tokenizer: Any, dtype: Any, device: Any, processing: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf = _weights(source, dtype, attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(
        source, hf_model=hf.to(device).eval(), tokenizer=tokenizer, device=str(device)
    )
    if processing == "fold":
        bridge.enable_compatibility_mode()
    return bridge


def _load_hooked(source: str, tokenizer: Any, dtype: Any, device: Any, processing: str) -> Any:
    import warnings

    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gpt2_weights,
        convert_llama_weights,
    )

    hf = _weights(source, dtype)
    shape = _HOOKED_FAMILIES[hf.config.model_type](hf.config)
    cfg = HookedTransformerConfig(
        **shape, dtype=hf.dtype, device=str(device), init_weights=False,
        model_name=Path(source).name,
    )  # fmt: skip
    convert = {"gpt2": convert_gpt2_weights, "llama": convert_llama_weights}[hf.config.model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(
            cfg, tokenizer=tokenizer, move_to_device=False, default_padding_side="right"
        )
    state = {k: v.detach().to(hf.dtype) for k, v in convert(hf, cfg).items()}
    fold = processing == "fold"
    model.load_and_process_state_dict(
        state, fold_ln=fold, center_writing_weights=fold, center_unembed=fold,
        fold_value_biases=fold,
    )  # fmt: skip
    return model.to(device, print_details=False)


def _gpt2_shape(c: Any) -> dict[str, Any]:
    return {
        "n_layers": c.n_layer, "d_model": c.n_embd, "n_ctx": c.n_positions, "n_heads": c.n_head,
        "d_head": c.n_embd // c.n_head, "d_mlp": c.n_inner or 4 * c.n_embd,
        "d_vocab": c.vocab_size, "act_fn": _GELU.get(c.activation_function, c.activation_function),
        "eps": c.layer_norm_epsilon, "normalization_type": "LN",
        "use_attn_scale": c.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
        "positional_embedding_type": "standard", "original_architecture": "GPT2LMHeadModel",
    }  # fmt: skip


# The tanh approximation of GELU goes by two names; this one is a single kernel.
_GELU = {"gelu_new": "gelu_pytorch_tanh"}


def _llama_shape(c: Any) -> dict[str, Any]:
    if getattr(c, "attention_bias", False) or getattr(c, "mlp_bias", False):
        raise ValueError(
            "TransformerLens's LLaMA converter drops attention and MLP biases, and this checkpoint "
            "has some; use backend='bridge'"
        )
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = dict(getattr(c, "rope_parameters", None) or {})
    shape = {
        "n_layers": c.num_hidden_layers, "d_model": c.hidden_size,
        "n_ctx": c.max_position_embeddings, "n_heads": c.num_attention_heads, "d_head": d_head,
        "d_mlp": c.intermediate_size, "d_vocab": c.vocab_size, "act_fn": c.hidden_act,
        "eps": c.rms_norm_eps, "normalization_type": "RMS", "final_rms": True, "gated_mlp": True,
        "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False,
        "rotary_dim": d_head, "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "original_architecture": "LlamaForCausalLM",
        "n_key_value_heads": (
            c.num_key_value_heads if c.num_key_value_heads != c.num_attention_heads else None
        ),
    }  # fmt: skip
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        shape.update(
            use_NTK_by_parts_rope=True,
            NTK_by_parts_factor=rope["factor"],
            NTK_by_parts_low_freq_factor=rope["low_freq_factor"],
            NTK_by_parts_high_freq_factor=rope["high_freq_factor"],
            NTK_original_ctx_len=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ValueError(f"backend 'hooked' does not know rope type {kind!r}; use backend='bridge'")
    return shape


_HOOKED_FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gpt2": _gpt2_shape,
    "llama": _llama_shape,
}


# -- sizes, placement, identity -----------------------------------------------------------------


def n_kv_heads(model: LensModel) -> int:
    """Number of key/value heads; less than ``cfg.n_heads`` under grouped-query attention."""
    found = getattr(model.cfg, "n_key_value_heads", None)
    return int(found) if found else int(model.cfg.n_heads)


def n_heads_of(model: LensModel, kind: str) -> int:
    """Heads on the head axis of an activation kind: key/value heads for k and v, else all."""
    return n_kv_heads(model) if kind in ("k", "v") else int(model.cfg.n_heads)


def device_of(model: LensModel) -> torch.device:
    """The device of the embedding, where tokens go in."""
    return next(iter(model.parameters())).device


def dtype_of(model: LensModel) -> torch.dtype:
    """The dtype of the weights."""
    return next(iter(model.parameters())).dtype


def processing_of(model: LensModel) -> Literal["none", "fold"]:
    """Whether TransformerLens's weight processing (folding, centring) is in force."""
    if backend_of(model) == "bridge":
        return "fold" if getattr(model, "_weights_processed", False) else "none"
    return "fold" if str(model.cfg.normalization_type).endswith("Pre") else "none"


def fingerprint(model: LensModel) -> str:
    """A short digest of shape and weights.

    Every matrix, bias and norm of embedding, blocks and unembedding contributes the sum of its bits as
    integers (exact, so neither device, thread count nor storage order matters), and matrices an even
    sample of their values: a change of one element changes the fingerprint, and it takes about as long
    as reading the weights once. Both model classes of one
    checkpoint agree: a bias that is absent counts as zeros, a norm that is folded away as ones.

    Raises:
        MissingHookError: a model whose blocks have not got attention and MLP matrices.
    """
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab"):
        digest.update(f"{name}={getattr(model.cfg, name)};".encode())
    for where, owner, part in _owners(model):
        for name in _WEIGHTS[part]:
            # A grouped-query model's W_K repeats heads; its own is named _W_K.
            tensor = getattr(owner, f"_{name}", None)
            if tensor is None:
                tensor = getattr(owner, name, None)
            if tensor is None:
                if part == "attn" and name in ("W_Q", "W_O"):
                    raise _missing_weight(model, f"{where}.{name}")
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


def _owners(model: LensModel) -> Iterator[tuple[str, Any, str]]:
    """Modules with weights, their names, and which of `_WEIGHTS` they hold."""
    yield "", model, "embed"
    yield "", model, "unembed"
    yield "ln_final", model.ln_final, "norm"
    if getattr(model, "pos_embed", None) is not None:
        yield "pos_embed", model.pos_embed, "pos_embed"  # type: ignore[attr-defined]
    parts = {"attn": "attn", "mlp": "mlp", "ln1": "norm", "ln2": "norm"}
    for i, block in enumerate(model.blocks):
        for name, part in parts.items():
            module = getattr(block, name, None)
            if module is not None:
                yield f"blocks.{i}.{name}", module, part
            elif name == "attn":
                raise _missing_weight(model, f"blocks.{i}.attn")


def _missing_weight(model: LensModel, name: str) -> MissingHookError:
    return MissingHookError(
        f"this {type(model).__name__} has no weight {name}; GPT-2 and LLaMA have it, and so must "
        "another family that is to be used here"
    )


def provenance(model: LensModel, **more: Any) -> dict[str, Any]:
    """What a result must remember: model, dtype, backend, weight processing, versions, `more`."""
    return {
        "fingerprint": fingerprint(model),
        "model": Path(str(getattr(model.cfg, "model_name", None) or "unnamed")).name,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "device": str(device_of(model)),
        "backend": backend_of(model),
        "processing": processing_of(model),
        "versions": {p: metadata.version(p) for p in ("torch", "transformer-lens", "transformers")},
        **more,
    }


# -- hooks --------------------------------------------------------------------------------------


def hook_name(kind: str, layer: int = 0) -> str:
    """The TransformerLens hook name of an activation kind at a layer.

    Raises:
        ValueError: a kind that is not in `HOOK_NAMES`.
    """
    try:
        return HOOK_NAMES[kind].format(layer)
    except KeyError:
        raise ValueError(
            f"unknown activation kind {kind!r}; expected one of {list(HOOK_NAMES)}"
        ) from None


def require_hooks(model: LensModel, names: Iterable[str]) -> None:
    """Refuse a model that lacks a hook point, naming it.

    Raises:
        MissingHookError: with the missing names.
    """
    missing = sorted({n for n in names if n not in model.hook_dict})
    if missing:
        raise MissingHookError(
            f"this {type(model).__name__} has no hook point {', '.join(missing)}; the method needs "
            f"it (layers run from 0 to {model.cfg.n_layers - 1}, model.hook_dict lists what exists)"
        )


def require_layers(model: LensModel, layers: Iterable[int]) -> None:
    """Refuse layers outside the model.

    Raises:
        ValueError: with the offending layers and the range.
    """
    wrong = [layer for layer in layers if not 0 <= layer < model.cfg.n_layers]
    if wrong:
        raise ValueError(
            f"layer(s) {wrong} out of range; the model has 0..{model.cfg.n_layers - 1}"
        )


@contextmanager
def hooked(model: LensModel, hooks: Sequence[Hook], *, must_fire: bool = True) -> Iterator[None]:
    """Attach forward hooks for the length of a ``with`` block; nothing stays behind.

    A hook function takes the activation and returns a new one, or None to leave it. Several hooks
    at one name act in the order given. ``hook_resid_mid`` is changed truly on both classes: on the
    Bridge that hook sits on the MLP's branch only, so the change is made at ``hook_attn_out``, after
    all hooks given for that name.

    Args:
        must_fire: raise if a hook was never reached by the end of a block that did not fail.

    Raises:
        MissingHookError: a name the model has not got.
        RuntimeError: a hook that never fired.
    """
    require_hooks(model, (name for name, _ in hooks))
    fired = [False] * len(hooks)
    bridge = backend_of(model) == "bridge"
    attached: list[tuple[str, Callable[..., Any]]] = []
    after: list[tuple[str, Callable[..., Any]]] = []
    for i, (name, fn) in enumerate(hooks):
        if bridge and name.endswith("hook_resid_mid"):
            after += _bridge_resid_mid(name, _flagged(fn, fired, i))
        else:
            attached.append((name, _with_hook_argument(_flagged(fn, fired, i))))
    with model.hooks(fwd_hooks=attached + after):
        yield
    if must_fire and not all(fired):
        silent = sorted({hooks[i][0] for i, f in enumerate(fired) if not f})
        raise RuntimeError(
            f"hook(s) {silent} never fired, so the intervention did nothing; was the forward pass "
            "stopped before that layer, or does the model skip this hook point?"
        )


def _flagged(fn: HookFn, fired: list[bool], i: int) -> HookFn:
    def call(tensor: Tensor) -> Tensor | None:
        fired[i] = True
        return fn(tensor)

    return call


def _with_hook_argument(fn: HookFn) -> Callable[..., Any]:
    def call(tensor: Tensor, hook: Any) -> Tensor:
        # On the Bridge a hook that returns None may have looked at a reshaped copy; handing the
        # tensor back keeps gradients on the path on both classes.
        out = fn(tensor)
        return tensor if out is None else out

    return call


def _bridge_resid_mid(name: str, fn: HookFn) -> list[tuple[str, Callable[..., Any]]]:
    before: list[Tensor] = []

    def remember(tensor: Tensor, hook: Any) -> Tensor:
        before[:] = [tensor]
        return tensor

    def change(tensor: Tensor, hook: Any) -> Tensor:
        resid_pre = before.pop().to(tensor.device)  # seen before its block fetched it
        out = fn(resid_pre + tensor)
        return tensor if out is None else out - resid_pre

    return [
        (name.replace("hook_resid_mid", "hook_resid_pre"), remember),
        (name.replace("hook_resid_mid", "hook_attn_out"), change),
    ]


# -- forward passes ------------------------------------------------------------------------------


def forward(
    model: LensModel,
    tokens: Int[Tensor, "row pos"],
    *,
    hooks: Sequence[Hook] = (),
    stop_at_layer: int | None = None,
    cache: Any = None,
    grows: bool = False,
) -> Tensor:
    """One forward pass over right-padded tokens, without an attention mask.

    Causal attention never lets a token see padding on its right, and learned positions then start
    at 0 in every row, so no mask is needed for exactness; read each row at its own positions.

    Args:
        stop_at_layer: blocks to run; must be less than the model's number of layers.
        cache: a cache from `mi_hops.cache`, filled as the pass runs; `tokens` are the positions
            after those it holds, and all rows have one length.
        grows: hooks append rows to the batch on the way up.

    Returns:
        Logits ``[row, pos, vocab]``, or the residual stream entering `stop_at_layer`.
    """
    options: dict[str, Any] = {"return_type": "logits"}
    if stop_at_layer is not None:
        if not 0 <= stop_at_layer < model.cfg.n_layers:
            raise ValueError(
                f"stop_at_layer is {stop_at_layer}; expected 0..{model.cfg.n_layers - 1}"
            )
        options["stop_at_layer"] = stop_at_layer
    tokens = tokens.to(device_of(model))
    if backend_of(model) == "hooked":
        options["padding_side"] = "right"
        if cache is not None:
            # An explicit mask of ones: inferred from pad ids it would drop a real token.
            options |= {"past_kv_cache": cache, "attention_mask": tokens.new_ones(tokens.shape)}
    elif cache is not None:
        options |= {"past_key_values": cache, "use_cache": True}
    if grows and backend_of(model) == "bridge" and (tokens.shape[0] > 1 or cache is not None):
        options |= _broadcasting_mask(model, tokens.shape[1], cache)
    with hooked(model, hooks):
        if stop_at_layer is None and _reads_in_place(model):
            return _unembed(model, model(tokens, **options, stop_at_layer=model.cfg.n_layers))
        return model(tokens, **options)


def _reads_in_place(model: LensModel) -> bool:
    """Whether `_unembed` gives the model's logits: a float32 or float64 HookedTransformer.

    In half precision the order of summation shows, so there the model's own read-out is kept.
    """
    return (
        backend_of(model) == "hooked"
        and model.cfg.normalization_type is not None
        and not getattr(model.cfg, "output_logits_soft_cap", 0) > 0
        and model.W_U.is_floating_point()
        and model.W_U.element_size() >= 4
    )


def _unembed(model: LensModel, residual: Tensor) -> Tensor:
    """HookedTransformer's read-out without the copy of W_U that it makes in every pass.

    On a CPU that copy takes as long as half of GPT-2 small's blocks do for a short prompt.
    """
    import torch

    end = model.unembed
    x = end.hook_in(model.ln_final(residual))
    weight, bias = end.W_U.to(x.device), end.b_U.to(x.device)
    return end.hook_out(torch.nn.functional.linear(x, weight.T, bias))


def _broadcasting_mask(model: LensModel, width: int, cache: Any) -> dict[str, Tensor]:
    """Causal mask and positions with a batch axis of one, which fit any number of rows.

    The Bridge's own would have the batch size that the pass began with.
    """
    import torch

    past = 0 if cache is None else int(cache.get_seq_length())
    where = torch.arange(past, past + width, device=device_of(model))
    hidden = torch.arange(past + width, device=where.device)[None] > where[:, None]
    lowest = torch.finfo(dtype_of(model)).min
    mask = torch.zeros(hidden.shape, dtype=dtype_of(model), device=where.device)
    mask.masked_fill_(hidden, lowest)
    return {"attention_mask": mask[None, None], "position_ids": where[None]}


def capture(
    model: LensModel,
    tokens: Int[Tensor, "row pos"],
    names: Iterable[str],
    *,
    hooks: Sequence[Hook] = (),
    logits: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Activations at hook points from one pass, after `hooks` have acted; detached.

    Returns:
        ``(activations by name, logits or None)``. Without `logits` the pass stops after the last
        named block.
    """
    wanted = list(dict.fromkeys(names))
    require_hooks(model, wanted)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        def fn(tensor: Tensor) -> None:
            found[name] = tensor.detach()

        return fn

    stop = None if logits else _last_block(model, [*wanted, *(n for n, _ in hooks)])
    out = forward(
        model, tokens, hooks=[*hooks, *((n, keep(n)) for n in wanted)], stop_at_layer=stop
    )
    return found, out if logits else None


def _last_block(model: LensModel, names: Iterable[str]) -> int | None:
    """The block to stop before once all names have fired, or None to run to the end."""
    last = -1
    for name in names:
        parts = name.split(".")
        if parts[0] != "blocks":
            if name not in ("hook_embed", "hook_pos_embed"):
                return None
            continue
        last = max(last, int(parts[1]))
    stop = last + 1
    return stop if stop < model.cfg.n_layers else None


# -- weights -------------------------------------------------------------------------------------


def w_o(model: LensModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """The live output projection of a block; writing into it changes the model on both classes.

    Raises:
        MissingHookError: a block without it.
        ValueError: no such layer, or a quantised W_O.
    """
    require_layers(model, [layer])
    weight = getattr(getattr(model.blocks[layer], "attn", None), "W_O", None)
    if weight is None:
        raise _missing_weight(model, f"blocks.{layer}.attn.W_O")
    require_unquantised(weight, f"W_O of layer {layer}")
    return weight


def read_w_o(model: LensModel, layer: int) -> Float[Tensor, "z d_model"]:
    """A copy of W_O as ``[n_heads * d_head, d_model]``: rows are coordinates of flattened z."""
    weight = w_o(model, layer).detach()
    return weight.reshape(-1, weight.shape[-1]).clone()


def write_w_o(model: LensModel, layer: int, value: Float[Tensor, "z d_model"]) -> None:
    """Write W_O in place from ``[n_heads * d_head, d_model]``, cast once to the weight's dtype.

    Raises:
        ValueError: a wrong shape, or values that are not finite (before or after the cast).
        RuntimeError: the write did not reach the weight (then nothing can be edited here).
    """
    weight = w_o(model, layer)
    expected = (weight.shape[0] * weight.shape[1], weight.shape[2])
    if tuple(value.shape) != expected:
        raise ValueError(f"W_O of layer {layer} is {expected}, got {tuple(value.shape)}")
    overwrite(model, f"W_O of layer {layer}", lambda: w_o(model, layer), value)


def overwrite(model: LensModel, what: str, live: Callable[[], Tensor], value: Tensor) -> None:
    """Write a weight in place, cast once to its dtype, and make sure that it reached the model.

    Args:
        what: the weight's name in errors.
        live: gets the weight itself from the model; asked again after the write.
        value: of as many numbers, in the weight's order.

    Raises:
        ValueError: values that are not finite (before or after the cast); nothing is written.
        RuntimeError: the write did not reach the weight.
    """
    import torch

    weight = live()
    cast = value.detach().to(weight.device, weight.dtype).reshape(weight.shape)
    if not torch.isfinite(cast).all():
        raise ValueError(
            f"{what} would hold non-finite values after the edit (dtype {weight.dtype}); nothing "
            "was written"
        )
    with torch.no_grad():
        weight.data.copy_(cast)
    if not torch.equal(live().detach(), cast):
        raise RuntimeError(f"writing {what} had no effect on {type(model).__name__}")


def unembedding(model: LensModel) -> tuple[Float[Tensor, "d_model vocab"], Float[Tensor, "vocab"]]:
    """W_U and b_U (zeros where the model has none), detached.

    Raises:
        ValueError: the unembedding cannot be read as floating-point numbers (quantised).
    """
    import torch

    weight = model.W_U.detach()
    require_unquantised(weight, "the unembedding")
    bias = getattr(model, "b_U", None)
    if bias is None:
        bias = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return weight, bias.detach()


def embedding(model: LensModel) -> Float[Tensor, "vocab d_model"]:
    """W_E, detached.

    Raises:
        ValueError: the embedding cannot be read as floating-point numbers (quantised).
    """
    weight = model.W_E.detach()  # type: ignore[attr-defined]
    require_unquantised(weight, "the embedding")
    return weight


def require_unquantised(weight: Tensor, what: str) -> None:
    """Refuse a weight that is stored as codes, which mean nothing without their scales.

    Raises:
        ValueError: integers, or floats of 8 bits.
    """
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{what} is stored as {weight.dtype}; load the model unquantised")


def final_norm(
    model: LensModel, residual: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """The final norm of residual-stream vectors, in the model's dtype, where the norm lies."""
    own = next(iter(model.ln_final.parameters()), None)  # none where it is folded away
    place = residual.device if own is None else own.device
    flat = residual.reshape(-1, 1, residual.shape[-1]).to(place, dtype_of(model))
    return model.ln_final(flat).reshape(residual.shape)


def read_out(
    model: LensModel, residual: Float[Tensor, "*rows d_model"], *, norm: bool = True
) -> Float[Tensor, "*rows vocab"]:
    """Logits of a residual-stream vector: final norm (optional), then W_U and b_U, in float32+.

    With ``norm=True`` this is the model's own read-out (logit lens with ln_final); with False the
    raw one of the two papers.
    """
    import torch

    wide = torch.promote_types(residual.dtype, torch.float32)
    if norm:
        residual = final_norm(model, residual)
    weight, bias = unembedding(model)
    return residual.to(weight.device, wide) @ weight.to(wide) + bias.to(wide)
