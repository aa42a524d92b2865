"""Lenses of the tuned-lens package: read as its own class reads, refused on other models."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from mi_hops import load_lens
from mi_hops.lens import TunedLens
from mi_hops.model import read_out


def saved(folder, model, *, bias=True, **changes):
    """A folder as that package writes it: linear layers by number, and its config."""
    generator = torch.Generator().manual_seed(1)
    n, d = int(model.cfg.n_layers), int(model.cfg.d_model)
    layers = torch.nn.ModuleList([torch.nn.Linear(d, d, bias=bias) for _ in range(n)])
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    torch.save(layers.state_dict(), folder / "params.pt")
    matrix = model.W_U.detach().T.float().numpy()
    config = {
        "base_model_name_or_path": "tiny",
        "d_model": d,
        "num_hidden_layers": n,
        "bias": bias,
        "base_model_revision": None,
        "unembed_hash": hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest(),
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return layers


@pytest.mark.parametrize("bias", [True, False])
def test_translators_are_added_to_the_stream_at_the_same_layers(tiny, tmp_path, bias):
    layers = saved(tmp_path / "lens", tiny, bias=bias)
    lens = load_lens(tiny, tmp_path / "lens")
    assert isinstance(lens, TunedLens) and lens.layers == (0, 1, 2) and lens.kind == "resid"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for i, linear in enumerate(layers):
        want = x + linear(x)
        assert torch.allclose(lens.translate(x, layer=i), want, atol=1e-6)
        assert torch.allclose(lens.logits(x, layer=i), read_out(tiny, want), atol=1e-5)
    again = load_lens(tiny, lens.save(tmp_path / "ours"))
    assert torch.equal(again.parameters["weight"], lens.parameters["weight"])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_it_reads_as_its_own_class(load_tiny, checkpoints, tmp_path, shape):
    nn = pytest.importorskip("tuned_lens.nn.lenses")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(checkpoints[shape])
    own = nn.TunedLens.from_model(theirs)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in own.layer_translators.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    own.save(tmp_path / "lens")
    model = load_tiny(shape)
    lens = load_lens(model, tmp_path / "lens")  # its digest of the unembedding is ours
    ids = torch.tensor([[1, 5, 6, 7]])
    states = theirs(ids, output_hidden_states=True).hidden_states
    for i in range(3):
        assert torch.allclose(lens.logits(states[i], layer=i), own(states[i], i), atol=1e-4)


def test_it_is_fetched_from_a_folder_of_a_space(load_tiny, tmp_path, monkeypatch):
    import huggingface_hub

    model, revision = load_tiny(), "0" * 40
    kept = tmp_path / "spaces--someone--lenses"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(revision)
    saved(kept / "snapshots" / revision / "lens" / "tiny", model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_lens(model, "spaces/someone/lenses/lens/tiny").layers == (0, 1, 2)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"):
        load_lens(model, "spaces/someone/others/lens/tiny")


def test_other_models_are_refused(load_tiny, tmp_path):
    model = load_tiny()
    saved(tmp_path / "lens", model)
    for other in (load_tiny("llama"), load_tiny("gpt2", processing="fold")):
        with pytest.raises(ValueError, match="was trained for 'tiny', with another unembedding"):
            load_lens(other, tmp_path / "lens")
        assert load_lens(other, tmp_path / "lens", transfer=True).trained_on == "tuned-lens: tiny"
    saved(tmp_path / "silent", model, unembed_hash=None)
    load_lens(model, tmp_path / "silent")


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


@pytest.mark.parametrize("broken", ["config", "short", "code"])
def test_broken_folders(load_tiny, tmp_path, capsys, broken):
    model, folder = load_tiny(), tmp_path / "lens"
    saved(folder, model)
    if broken == "config":
        (folder / "config.json").write_text("{")
    elif broken == "short":
        torch.save({"0.weight": torch.zeros(32, 32)}, folder / "params.pt")
    else:
        (folder / "params.pt").write_bytes(pickle.dumps({"0.weight": Harm()}))
    with pytest.raises(ValueError, match="has no lens in the tuned-lens format"):
        load_lens(model, folder)
    assert "harm" not in capsys.readouterr().out
