"""Shares of a logit add up to it, and agree with TransformerLens where that is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens import (
    JacobianReading,
    LogitLens,
    fact_attribution,
    fit_jacobian_lens,
    logit_attribution,
    logit_lens,
)
from mi_hops.model import capture, forward, hook_name
from mi_hops.text.tokens import answer_ids, encode

TEXTS = ("w1 w2 w3 w4 w5", "w9 w8", "w5 w6 w7 w8 w9 w10 w11")
TRACK = {"a": ["w7 w8", "w9", "w10"], "b": ["w20", "w21", "w22 w1"]}
PARTS = {"heads": 2, "mlps": 1, "attention_biases": 1, "embedding": 0, "constant": 0}


def total(result):
    """Sum of all parts, [example, tracked]."""
    return sum(result[n].values.sum(tuple(range(1, 1 + k))) for n, k in PARTS.items())


@pytest.mark.parametrize("centre", [False, True])
def test_the_parts_add_up_to_the_models_logits(tiny, centre):
    result = logit_attribution(tiny, TEXTS, TRACK, centre=centre)
    assert np.allclose(total(result), result["logit"].values, atol=1e-4)
    for i, text in enumerate(TEXTS):
        prompt = encode(tiny, text)
        with torch.no_grad():
            logits = forward(tiny, torch.tensor([prompt.ids]))[0, -1]
        logits = logits - logits.mean() if centre else logits
        for k, name in enumerate(TRACK):
            first = answer_ids(tiny, prompt, TRACK[name][i])[0]
            assert np.isclose(result["logit"].values[i, k], logits[first].item(), atol=1e-4)


def test_other_positions_and_folded_weights(load_tiny):
    model, folded = load_tiny("gpt2"), load_tiny("gpt2", processing="fold")
    both = [logit_attribution(m, TEXTS, TRACK, position=["w3", "w9", 2]) for m in (model, folded)]
    for result in both:
        assert np.allclose(total(result), result["logit"].values, atol=1e-3)
    # Folding moves value biases from heads into b_O and leaves the logits as they are.
    assert np.allclose(both[0]["logit"], both[1]["logit"], atol=1e-3)
    assert np.allclose(both[0]["mlps"], both[1]["mlps"], atol=1e-3)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_folded_hooked_transformers_agree_with_transformer_lens(load_tiny, shape):
    from transformer_lens.tools.analysis import direct_logit_attribution

    model = load_tiny(shape, "hooked", processing="fold")
    result = logit_attribution(model, TEXTS[0], {"a": "w7"}, centre=False)
    prompt = encode(model, TEXTS[0])
    tokens, answer = torch.tensor([prompt.ids]), answer_ids(model, prompt, "w7")[0]
    heads = direct_logit_attribution(model, tokens, answer, unit="head")
    parts = direct_logit_attribution(model, tokens, answer, unit="component")
    for label, value in zip(heads.labels, heads.attribution.flatten().tolist(), strict=True):
        if label.startswith("L") and "H" in label:
            layer, head = map(int, label[1:].split("H"))
            own = result["heads"].sel(layer=layer, head=head).item()
            assert np.isclose(own, value, atol=1e-3), label
    for label, value in zip(parts.labels, parts.attribution.flatten().tolist(), strict=True):
        if label.endswith("mlp_out"):
            own = result["mlps"].sel(layer=int(label.split("_")[0])).item()
            assert np.isclose(own, value, atol=1e-3), label


def test_heads_are_the_raw_lens_with_the_norms_weight_and_a_frozen_scale(load_tiny):
    model = load_tiny("llama")
    tokens = torch.tensor([encode(model, TEXTS[0]).ids])
    found, _ = capture(model, tokens, [hook_name("mlp_out", 1), hook_name("resid_post", 2)])
    final = found[hook_name("resid_post", 2)][0, -1]
    scale = (final.pow(2).mean() + 1e-5).rsqrt()
    gain = model.ln_final(torch.eye(32)[None])[0].diagonal() / (1 / 32 + 1e-5) ** -0.5
    first = answer_ids(model, encode(model, TEXTS[0]), "w7")[0]
    want = (found[hook_name("mlp_out", 1)][0, -1] * gain * scale) @ model.W_U[:, first]
    got = logit_attribution(model, TEXTS[0], {"a": "w7"}, centre=False)["mlps"]
    assert np.isclose(got.sel(layer=1).item(), want.item(), atol=1e-4)


def test_facts_are_read_at_their_roles(load_tiny):
    model = load_tiny()
    facts = [
        TwoHopFact(
            id=f"f{i}",
            subject="w5",
            relation1="r",
            bridge=f"w{20 + i}",
            relation2="q",
            answer="w40",
            first_hop="w3 of w5",
            prompts={"suffix": "w1 w3 of w5 is"},
        )
        for i in range(2)
    ]
    hop = fact_attribution(model, facts, role="first hop")
    want = logit_attribution(
        model, "w1 w3 of w5 is", {"bridge": "w21", "answer": "w40"}, position=4
    )
    assert np.allclose(hop["heads"].sel(example="f1"), want["heads"].isel(example=0), atol=1e-5)
    lost = replace(facts[0], id="lost", first_hop="w88")
    some = fact_attribution(model, [lost, *facts], role="first hop")
    assert np.array_equal(some["heads"], hop["heads"]) and some.n_used == 2
    assert [who for who, _ in some.skipped] == ["lost"]
    with pytest.raises(ValueError, match="no fact can be used for direct attribution"):
        fact_attribution(model, [lost], role="first hop")
    with pytest.raises(ValueError, match="first hop"):
        fact_attribution(model, facts, role="middle")
    with pytest.raises(ValueError, match="something to track"):
        logit_attribution(model, TEXTS, {})


def test_a_cache_is_shared_out_and_a_stream_that_is_no_sum_of_its_parts_is_refused(tiny):
    _, cache = tiny.run_with_cache(torch.tensor([encode(tiny, TEXTS[0]).ids]))
    got = logit_attribution(tiny, TEXTS[0], {"a": "w7"}, cache=cache)
    want = logit_attribution(tiny, TEXTS[0], {"a": "w7"})
    assert np.allclose(got["heads"], want["heads"], atol=1e-5)
    name = hook_name("mlp_out", 1)
    other = {key: cache[key] for key in cache.keys()} | {name: cache[name] + 1.0}  # noqa: SIM118
    with pytest.raises(ValueError, match="do not add up to the final stream"):
        logit_attribution(tiny, TEXTS[0], {"a": "w7"}, cache=other)


# -- the Jacobian lens --


@pytest.fixture(scope="module")
def fitted(load_tiny):
    """A Jacobian lens of each family."""
    texts = [f"w{i} " * 6 for i in range(5, 9)]
    return {s: fit_jacobian_lens(load_tiny(s), texts, dim_batch=32) for s in ("gpt2", "llama")}


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_a_jacobian_lens_reads_like_the_others(fitted, load_tiny, shape):
    lens, model = fitted[shape], load_tiny(shape)
    assert lens.layers == [1, 2, 3]
    assert not any(p.requires_grad for p in model.parameters())
    result = logit_lens(model, TEXTS[0], positions="each", lens=lens, layers=lens.layers)
    assert np.allclose(result["kl"].sel(layer=3), 0, atol=1e-5)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    matrix = lens.fitted.jacobians[0]
    want = LogitLens(model).logits(x @ matrix.T, layer=1)
    assert torch.allclose(lens.logits(x, layer=1), want, atol=1e-4)
    with pytest.raises(ValueError, match="not 0"):
        lens.logits(x, layer=0)


def test_a_jacobian_lens_is_the_average_of_gradients(fitted, load_tiny):
    # One prompt of two tokens after BOS: BOS and the last token are left out, so there is one place.
    model = load_tiny("llama")
    lens = fit_jacobian_lens(model, ["w5 w6"], dim_batch=32)
    tokens = torch.tensor([encode(model, "w5 w6").ids])
    start = capture(model, tokens, [hook_name("resid_post", 1)])[0][hook_name("resid_post", 1)]

    def final(middle):
        def put(x):
            return torch.cat([x[:, :1], middle[None, None], x[:, 2:]], dim=1)

        kept = {}
        hooks = [
            (hook_name("resid_post", 1), put),
            (hook_name("resid_post", 2), lambda x: kept.update(x=x)),
        ]
        forward(model, tokens, hooks=hooks)
        return kept["x"][0, 1]

    want = torch.autograd.functional.jacobian(final, start[0, 1])
    assert torch.allclose(lens.fitted.jacobians[1], want, atol=1e-4)


def test_a_jacobian_lens_is_saved_and_refused_by_other_models(fitted, load_tiny, tmp_path):
    from transformer_lens.tools.analysis import JacobianLens

    lens, model = fitted["gpt2"], load_tiny("gpt2")
    lens.fitted.save(str(tmp_path / "lens.pt"), dtype=torch.float32)
    again = JacobianReading(model, JacobianLens.load(str(tmp_path / "lens.pt")))
    x = torch.ones(1, 32)
    assert torch.equal(again.logits(x, layer=1), lens.logits(x, layer=1))
    for other, message in (
        (load_tiny("llama"), "belongs to another model"),
        (load_tiny("gpt2", processing="fold"), "unprocessed weights"),
    ):
        with pytest.raises(ValueError, match=message):
            JacobianReading(other, lens.fitted)
    deep = JacobianLens({2: torch.eye(32)}, n_prompts=1, d_model=32)
    with pytest.raises(ValueError, match="blocks up to 2"):
        JacobianReading(model, deep)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_identity_transport_is_the_logit_lens(load_tiny, backend):
    from transformer_lens.tools.analysis import JacobianLens

    model = load_tiny("llama", backend)
    eye = JacobianLens({0: torch.eye(32)}, n_prompts=1, d_model=32)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    want = LogitLens(model).logits(x, layer=1)
    assert torch.allclose(JacobianReading(model, eye).logits(x, layer=1), want, atol=1e-5)


@pytest.mark.parametrize(("backend", "processing"), [("bridge", "fold"), ("hooked", "none")])
def test_jacobian_lenses_are_fitted_on_an_unprocessed_bridge(load_tiny, backend, processing):
    with pytest.raises(ValueError, match="backend='bridge'"):
        fit_jacobian_lens(load_tiny("gpt2", backend, processing=processing), ["w1 w2 w3"])
