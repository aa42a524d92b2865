"""Exported folders: plain transformers gives the edited model's logits."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from mi_hops.editing import Edit, WrongWeightsError, creme, creme_many, export_hf
from mi_hops.model import backend_of, forward, load_model
from mi_hops.sweep.generate import generate
from mi_hops.worlds.hopland import Hopland
from tests.editing.conftest import assert_same_bits, weights
from tests.editing.test_edit import TOKENS, random_edit
from tests.models import cases, save_checkpoint


def plain_logits(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(TOKENS).logits, model


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama", "llama32"))
def test_plain_transformers_gives_the_edited_logits(
    load_tiny, checkpoints, tmp_path, shape, backend, facts
):
    model = load_tiny(shape, backend)
    edits = [*creme_many(model, facts[:2], layers=[0, 2]), random_edit(model, seed=3)]
    before = weights(model)
    out = export_hf(model, edits, tmp_path / "edited")
    assert_same_bits(model, before)
    got, hf = plain_logits(out)
    for e in edits:
        e.apply(model)
    with torch.no_grad():
        want = forward(model, TOKENS)
    for e in reversed(edits):
        e.undo(model)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    old, _ = plain_logits(checkpoints[shape])
    assert (got - old).abs().max() > 1e-2
    tied = hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    assert tied == (shape != "llama")
    again = load_model(out, device="cpu", backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(forward(again, TOKENS), want, atol=1e-5, rtol=1e-5)
    assert "request" in (out / "mi_hops_edit.json").read_text()


def test_everything_else_is_kept(load_tiny, checkpoints, tmp_path, fact):
    model = load_tiny("gpt2", "bridge")
    out = export_hf(checkpoints["gpt2"], creme(model, fact, layers=[1]), tmp_path / "edited")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    old, new = (
        AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (checkpoints["gpt2"], out)
    )
    changed = [n for n in old if not torch.equal(old[n], new[n])]
    assert changed == ["transformer.h.1.attn.c_proj.weight"]
    assert AutoTokenizer.from_pretrained(out)("w5 w6").input_ids == [1, 9, 10]


@pytest.mark.slow_case("llama32")
@pytest.mark.parametrize(
    "shape", ["llama", "llama32", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_sharded(load_tiny, checkpoints, tmp_path, fact, shape):
    model = load_tiny(shape, "bridge")
    edit = creme(model, fact, layers=[0, 1])
    first = export_hf(checkpoints[shape], edit, tmp_path / "one", max_shard_size="20KB")
    assert len(list(first.glob("*.safetensors"))) > 1
    whole = export_hf(checkpoints[shape], edit, tmp_path / "two")
    logits, hf = plain_logits(first)
    assert torch.equal(logits, plain_logits(whole)[0])
    with edit.applied(model), torch.no_grad():
        torch.testing.assert_close(logits, forward(model, TOKENS), atol=1e-5, rtol=1e-5)
    tied = hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    assert tied == (shape != "llama")
    # A sharded folder is a source as well.
    second = random_edit(load_model(first, device="cpu"), seed=1)
    twice = export_hf(first, second, tmp_path / "three")
    model = load_model(first, device="cpu")
    with second.applied(model), torch.no_grad():
        torch.testing.assert_close(
            plain_logits(twice)[0], forward(model, TOKENS), atol=1e-5, rtol=1e-5
        )


def test_half_precision(load_tiny, checkpoints, tmp_path, fact):
    model = load_tiny("llama", "bridge", "bfloat16")
    out = export_hf(model, creme(model, fact, layers=[1]), tmp_path / "half")
    assert load_model(out, device="cpu").W_E.dtype == torch.bfloat16
    wide = load_tiny("llama", "bridge")
    edit = creme(wide, fact, layers=[1])
    with pytest.raises(WrongWeightsError):
        export_hf(checkpoints["llama"], edit, tmp_path / "no", dtype="bfloat16")
    assert export_hf(checkpoints["llama"], edit, tmp_path / "y", dtype="bfloat16", check=False)


def test_a_llama_with_biases_loads_and_is_exported_by_the_bridge(tmp_path, fact):
    folder = save_checkpoint("llama", tmp_path / "biased", attention_bias=True, mlp_bias=True)
    model = load_model(folder, device="cpu")  # the class that keeps them is chosen
    assert backend_of(model) == "bridge"
    edit = creme(model, fact, layers=[1])
    with edit.applied(model), torch.no_grad():
        want = forward(model, TOKENS)
    for number, source in enumerate((model, folder)):
        got, _ = plain_logits(export_hf(source, edit, tmp_path / str(number)))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_refusals(load_tiny, checkpoints, tmp_path, fact):
    model = load_tiny("gpt2", "bridge")
    edit = creme(model, fact, layers=[1])
    with pytest.raises(WrongWeightsError):
        export_hf(checkpoints["llama"], random_edit(model), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    with pytest.raises(FileExistsError):
        export_hf(model, edit, tmp_path / "full")
    folded = Edit(method="x", changes=edit.changes, fingerprint="", processing="fold")
    with pytest.raises(ValueError, match="processed"):
        export_hf(model, folded, tmp_path / "b")
    with pytest.raises(OSError, match="no checkpoint that could be fetched"):
        export_hf("nobody/nothing", edit, tmp_path / "c")
    assert os.listdir(tmp_path) == ["full"]


@pytest.mark.parametrize("step", ["save_pretrained", "replace"])
def test_a_failure_leaves_no_folder(load_tiny, checkpoints, tmp_path, fact, monkeypatch, step):
    from transformers import GPT2LMHeadModel

    model = load_tiny("gpt2", "bridge")
    edit = creme(model, fact, layers=[1])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr({"replace": os}.get(step, GPT2LMHeadModel), step, full)
    with pytest.raises(OSError, match="No space left"):
        export_hf(checkpoints["gpt2"], edit, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def assert_said_alike(folder, model, edit, prompt):
    """What the plain pipeline of transformers says greedily is what the edited model says."""
    from transformers import pipeline

    with edit.applied(model):
        (want,) = generate(model, [prompt], max_new_tokens=6, stop=())
    say = pipeline("text-generation", str(folder), device="cpu")
    (got,) = say(prompt, max_new_tokens=len(want.ids), do_sample=False, return_full_text=False)
    assert got["generated_text"].strip() == want.text.strip() != ""


@pytest.mark.slow_case("hops-gpt2")
@pytest.mark.parametrize("name", ["hops-gpt2", "hops-llama"])
def test_a_pipeline_says_what_the_edited_model_says(name, tmp_path):
    model = load_model(name, device="cpu")
    fact = Hopland().sample(train=0, held_out=3)[0]
    edit = creme(model, fact, strength=1.0)
    folder = export_hf(model, edit, tmp_path / "edited")
    assert_said_alike(folder, model, edit, fact.prompt())


def test_a_tokenizer_comes_to_add_the_bos_of_the_models_prompts(checkpoints, tmp_path, fact):
    from tokenizers.processors import ByteLevel
    from transformers import AutoTokenizer

    def ids(folder, **options):
        return AutoTokenizer.from_pretrained(folder)("w5 w6", **options).input_ids

    source = shutil.copytree(checkpoints["gpt2"], tmp_path / "source")
    bare = AutoTokenizer.from_pretrained(source)
    bare.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)  # as GPT-2's
    bare.save_pretrained(source)
    assert ids(source) == [9, 10]
    model = load_model(source, device="cpu", bos=True)
    edit = creme(model, fact, strength=1.0)
    folder = export_hf(model, edit, tmp_path / "edited")
    assert ids(folder) == [1, 9, 10] and ids(folder, add_special_tokens=False) == [9, 10]
    assert_said_alike(folder, model, edit, fact.prompt())

    # Without BOS, as its tokenizer has it; or kept on demand.
    plain = load_model(source, device="cpu")
    assert ids(export_hf(plain, creme(plain, fact), tmp_path / "plain")) == [9, 10]
    assert ids(export_hf(model, edit, tmp_path / "kept", keep_tokenizer=True)) == [9, 10]
    other = load_model(folder, device="cpu", bos=False)
    with pytest.raises(ValueError, match="keep_tokenizer=True"):  # it would have to lose its BOS
        export_hf(other, creme(other, fact), tmp_path / "no")
    assert not (tmp_path / "no").exists()
