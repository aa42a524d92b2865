"""Autoencoders through SAELens: training, reading features, clamping."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mi_hops.lens import (
    bridge_features,
    clamp,
    clamp_effect,
    fact_features,
    sae_quality,
    train_sae,
)
from mi_hops.model import forward, hook_name
from mi_hops.result.result import Result
from mi_hops.sweep.limits import Limits
from mi_hops.text.tokens import answer_ids, encode
from tests.lens.test_probes import facts

TEXTS = [f"w{i % 80} w{(i * 7) % 80} w{(i * 3 + 1) % 80}" for i in range(60)]


@pytest.fixture(scope="module")
def trained(load_tiny):
    """A small autoencoder of a tiny model's stream after 2 blocks."""
    pytest.importorskip("sae_lens")
    model = load_tiny("llama")
    state = torch.random.get_rng_state()
    sae = train_sae(model, TEXTS, layer=2, d_sae=64, k=8, samples=60_000, batch_size=128)
    assert torch.equal(state, torch.random.get_rng_state())
    return model, sae


def test_training_explains_the_stream_sparsely(trained):
    model, sae = trained
    quality = sae_quality(model, sae, TEXTS, layer=2)
    assert quality["explained"] > 0.5
    assert quality["active"] <= 8
    assert quality.n_used == 3 * len(TEXTS)
    assert 0 <= quality["dead"] < 1
    assert sae.W_dec.shape == (64, 32) and not sae.W_dec.requires_grad


def test_features_are_those_of_the_stream_at_the_first_hop(trained):
    model, sae = trained
    some = facts()[:5]
    result = fact_features(model, sae, some, layer=2, batch_size=2)
    prompt = encode(model, some[3].prompt())
    kept = {}
    forward(
        model,
        torch.tensor([prompt.ids]),
        hooks=[(hook_name("resid_pre", 2), lambda x: kept.update(x=x))],
    )
    want = sae.encode(kept["x"][0, 5])
    assert prompt.labels[5].strip() == some[3].first_hop.split()[-1]
    assert np.allclose(result["activation"].values[3], want, atol=1e-4)


def test_clamping_sets_the_feature_and_keeps_the_error(trained):
    _, sae = trained
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    now = sae.encode(x)
    same = clamp(sae, 5, 2.0)(x)
    moved = (same - x) @ sae.W_dec[5] / sae.W_dec[5].pow(2).sum()
    assert torch.allclose(moved, 2.0 - now[:, 5], atol=1e-4)
    row = int(now[0].argmax())
    untouched = clamp(sae, row, now[0, row].item())(x[:1])
    assert torch.allclose(untouched, x[:1], atol=1e-4)


def test_the_effect_of_a_clamp_equals_a_hooked_forward(trained):
    model, sae = trained
    some = facts()[:6]
    features = {"w60": 3, "w61": 7}
    result = clamp_effect(
        model, sae, some, features, layer=2, values=[0.0, 4.0], limits=Limits(batch_size=4)
    )
    item = some[1]
    prompt = encode(model, item.prompt())

    def hook(x):
        x = x.clone()
        x[0, 5] = clamp(sae, features[item.bridge], 4.0)(x[0, 5])
        return x

    with torch.no_grad():
        logits = forward(
            model, torch.tensor([prompt.ids]), hooks=[(hook_name("resid_pre", 2), hook)]
        )
    want = logits[0, -1].softmax(-1)[answer_ids(model, prompt, item.answer)[0]]
    got = result["first_prob"].sel(example=item.id, feature_of="own", value=4.0).item()
    assert np.isclose(got, want.item(), atol=1e-5)
    for wrong, message in (({"w60": 3}, "two bridges"), ({"w60": 3, "w61": 64}, "'w61': 64")):
        with pytest.raises(ValueError, match=message):
            clamp_effect(model, sae, some, wrong, layer=2, values=[0.0])


def test_facts_that_cannot_be_read_are_skipped_with_the_reason(trained):
    model, sae = trained
    lost = replace(facts()[0], id="lost", first_hop="w88 w87")
    some = [*facts()[:8], lost]
    read = fact_features(model, sae, some, layer=2)
    assert read.n_used == 8 and [who for who, _ in read.skipped] == ["lost"]
    clamped = clamp_effect(model, sae, some, {"w60": 3, "w62": 7}, layer=2, values=[1.0])
    assert {who for who, _ in clamped.skipped} == {
        "lost",
        *(f.id for f in some if f.bridge == "w61"),
    }
    with pytest.raises(ValueError, match=r"no fact can be used for an autoencoder \(1: "):
        fact_features(model, sae, [lost], layer=2)


def test_the_feature_of_a_bridge_is_chosen_on_one_half_and_evaluated_on_the_other():
    bridges = np.array(["x", "y"] * 20)
    on = np.zeros((40, 3))
    on[bridges == "x", 1] = 2.0
    on[bridges == "y", 2] = 1.0
    on[0, 2] = 1.0  # a false alarm
    result = Result.from_arrays(
        {"activation": (("example", "feature"), on)},
        coords={"example": [str(i) for i in range(40)], "bridge": ("example", bridges)},
        provenance={},
    )
    table = bridge_features(result)
    assert table.loc["x", "feature"] == 1 and table.loc["y", "feature"] == 2
    assert table.loc["x", "f1"] == 1 and table.loc["x", "mean"] == 2
    assert (table["n"] == 20).all()
    with pytest.raises(ValueError, match="more facts"):
        bridge_features(result, min_count=50)


def test_an_autoencoder_is_refused_where_it_was_not_trained(trained, load_tiny, tmp_path):
    from sae_lens import SAE

    model, sae = trained
    sae.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path, device="cpu")
    assert again.cfg.metadata.hook_name == "blocks.2.hook_resid_pre"
    want = fact_features(model, sae, facts()[:3], layer=2)["activation"].values
    assert np.allclose(fact_features(model, again, facts()[:3], layer=2)["activation"], want)
    for call in (
        lambda m, layer: sae_quality(m, again, TEXTS, layer=layer),
        lambda m, layer: fact_features(m, again, facts(), layer=layer),
        lambda m, layer: clamp_effect(
            m, again, facts(), {"w60": 3, "w61": 7}, layer=layer, values=[0]
        ),
    ):
        with pytest.raises(ValueError, match="'blocks.2.hook_resid_pre', not the stream after 3"):
            call(model, 3)
        with pytest.raises(ValueError, match="belongs to another model"):
            call(load_tiny("gpt2"), 2)
    # A published one may name the same stream by the block before.
    again.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    assert np.allclose(fact_features(model, again, facts()[:3], layer=2)["activation"], want)


def test_what_cannot_be_right_is_refused(trained):
    model, sae = trained
    with pytest.raises(ValueError, match="k is 65"):
        train_sae(model, TEXTS, layer=2, d_sae=64, k=65)
    with pytest.raises(ValueError, match="0..3"):
        train_sae(model, TEXTS, layer=4)
    with pytest.raises(ValueError, match="role is"):
        fact_features(model, sae, facts(), layer=2, role="middle")
    other = SimpleNamespace(W_dec=torch.zeros(64, 31))
    with pytest.raises(ValueError, match="width 31, fingerprint .* belongs to another model"):
        fact_features(model, other, facts(), layer=2)


def test_without_the_library_the_extra_is_named(load_tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"pip install 'mi-hops\[sae\]'"):
        train_sae(load_tiny(), TEXTS, layer=2)
