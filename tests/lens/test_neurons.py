"""Neurons add up to their MLP; the most active texts are those a plain loop finds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mi_hops.lens import logit_attribution, neuron_attribution, top_texts
from mi_hops.result import coloured_texts, save_page

PROMPTS = ("w1 w2 w3 w4 w5", "w9 w8")
TRACK = {"a": ["w7 w8", "w9"], "b": ["w20", "w21"]}
TEXTS = [f"w{4 + (i * 7) % 80} w{4 + (i * 3) % 80} w{4 + i % 80}" for i in range(40)]


@pytest.mark.parametrize("centre", [False, True])
def test_neurons_and_bias_add_up_to_the_mlp(tiny, centre):
    mlps = logit_attribution(tiny, PROMPTS, TRACK, centre=centre)["mlps"]
    found = neuron_attribution(tiny, PROMPTS, TRACK, centre=centre)
    added = found["neurons"].sum("neuron") + found["biases"]
    assert np.allclose(added.values, mlps.values, atol=1e-4)
    one = neuron_attribution(tiny, PROMPTS, TRACK, centre=centre, layers=1, batch_size=1)
    assert np.allclose(one["neurons"][:, 0], found["neurons"][:, 1], atol=1e-5)


def activity(model, text, layer, neuron=None, head=None):
    """By TransformerLens's own cache, on one text at a time."""
    _, cache = model.run_with_cache(model.to_tokens(text))
    if neuron is not None:
        return cache[f"blocks.{layer}.mlp.hook_post"][0, :, neuron]
    z = cache[f"blocks.{layer}.attn.hook_z"][0, :, head]
    return (z @ model.W_O[layer, head]).norm(dim=-1)


@pytest.mark.slow_case("llama-bridge-head", "gpt2-hooked-neuron")
@pytest.mark.parametrize("unit", [{"neuron": 9}, {"head": 3}], ids=["neuron", "head"])
def test_the_most_active_texts(tiny, unit):
    with torch.no_grad():
        each = [activity(tiny, text, 1, **unit) for text in TEXTS]
    peaks = torch.stack([values[1:].max() for values in each])
    order = peaks.sort(descending=True, stable=True).indices[:4].tolist()
    found = top_texts(tiny, iter(TEXTS), layer=1, **unit, top=4, max_tokens=30)
    assert found["example"].values.tolist() == [f"text {i}" for i in order]
    assert np.allclose(found["peak"], peaks[order], atol=1e-5)
    for row, i in enumerate(order):
        at = 1 + int(each[i][1:].argmax())
        assert np.allclose(found.values[row, : at + 1], each[i][: at + 1], atol=1e-5)
        assert "".join(found["token"].values[row]) == f"<bos>{TEXTS[i]}"
    assert found.provenance["texts"] == 40


def test_context_is_cut_around_the_peak_and_shown(tiny, tmp_path):
    text = " ".join(f"w{4 + i}" for i in range(40))
    found = top_texts(tiny, [text], layer=0, neuron=2, top=3, context=4)
    assert found.values.shape[0] == 1 and found.values.shape[1] <= 6
    assert np.nanmax(found.values) >= found["peak"].item() - 1e-6
    page = save_page(coloured_texts(found), tmp_path / "texts.html").read_text(encoding="utf-8")
    assert page.count("<span") == found.values.shape[1] and "text 0" in page


def test_a_feature_of_an_autoencoder(load_tiny):
    model = load_tiny("llama")
    basis = torch.eye(32)
    sae = SimpleNamespace(W_dec=basis, encode=lambda x: x.relu(), cfg=None)
    found = top_texts(model, TEXTS, layer=2, feature=5, sae=sae, top=2)
    with torch.no_grad():
        states = [
            model.run_with_cache(model.to_tokens(t))[1]["blocks.2.hook_resid_pre"][0] for t in TEXTS
        ]
    peaks = sorted((float(s[1:, 5].max()) for s in states), reverse=True)[:2]
    assert np.allclose(found["peak"], np.maximum(peaks, 0), atol=1e-5)


def test_bad_input(load_tiny):
    model = load_tiny()
    with pytest.raises(ValueError, match="got no unit; give one neuron"):
        top_texts(model, TEXTS, layer=1)
    with pytest.raises(ValueError, match="give one neuron, one head"):
        top_texts(model, TEXTS, layer=1, neuron=1, head=1)
    with pytest.raises(ValueError, match="one feature with its sae"):
        top_texts(model, TEXTS, layer=1, feature=1)
    with pytest.raises(ValueError, match=r"no neuron 128; there are 0..127"):
        top_texts(model, TEXTS, layer=1, neuron=128)
    with pytest.raises(ValueError, match=r"no head 4; there are 0..3"):
        top_texts(model, TEXTS, layer=1, head=4)
    with pytest.raises(ValueError, match="layer"):
        top_texts(model, TEXTS, layer=3, head=1)
    with pytest.raises(ValueError, match="top is 0"):
        top_texts(model, TEXTS, layer=1, neuron=1, top=0)
    with pytest.raises(ValueError, match="the corpus is empty"):
        top_texts(model, [], layer=1, neuron=1)
    with pytest.raises(ValueError, match="name something to track"):
        neuron_attribution(model, "w1", {})
