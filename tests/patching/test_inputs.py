"""Input attribution: completeness, differences of the score itself, TransformerLens's own loop."""

from __future__ import annotations

import pytest
import torch

from mi_hops import Pairs
from mi_hops.patching import attribute_inputs
from tests.models import models

TEXTS = ["w5 w6 w7 w8", "w9 w10 w11"]
ASKED = Pairs(TEXTS, ["w5 w20 w7 w8", "w9 w21 w11"], answer=["w30 w31", "w32"])


@pytest.fixture(params=models("gpt2", "llama"))
def wide(request, load_tiny):
    return load_tiny(*request.param, dtype="float64")


def score(model, text, answer, change):
    """Log-probability of an answer of one token, with the embeddings changed by TransformerLens's hook."""
    ids = model.to_tokens(f"{text}")
    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: change(x))]):
        logits = model(ids, return_type="logits")
    return float(logits[0, -1].log_softmax(-1)[model.to_single_token(answer)])


@pytest.mark.slow
def test_path_attributions_add_up_to_the_difference(wide):
    for baseline, worst in (("corrupted", 1e-6), ("mean", 0.05)):
        found = attribute_inputs(wide, ASKED, baseline=baseline, steps=100)
        added = found["attribution"].sum("position")
        missed = abs(added - (found["score"] - found["empty"])) / abs(
            found["score"] - found["empty"]
        )
        assert float(missed.max()) < worst
        assert found["completeness_error"].values == pytest.approx(missed.values, abs=1e-9)


def test_a_share_of_no_difference_is_nan(wide):
    found = attribute_inputs(
        wide, ASKED, baseline="corrupted", steps=2, metric=lambda x: 3 + 1e-20 * x[:, 0]
    )
    assert found["completeness_error"].isnull().all()


def test_only_tokens_that_differ_contribute_against_corrupted_prompts(wide):
    found = attribute_inputs(wide, ASKED, baseline="corrupted", steps=5)["attribution"]
    changed = (found.fillna(0) != 0).values
    assert changed.tolist() == [
        [False, False, True, False, False],
        [False, False, True, False, False],
    ]
    one = attribute_inputs(wide, ASKED, baseline="corrupted", method="occlusion")
    # One token differs, so to take it away is to run the corrupted prompt.
    assert one["attribution"].sum("position").values == pytest.approx(
        (one["score"] - one["empty"]).values, abs=1e-9
    )


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_occlusion_is_a_pass_with_that_token_taken_away(wide, baseline):
    found = attribute_inputs(
        wide, Pairs(TEXTS[1], answer="w32"), method="occlusion", baseline=baseline
    )
    other = torch.zeros_like(wide.W_E[0]) if baseline == "zero" else wide.W_E.mean(0)
    whole = score(wide, TEXTS[1], "w32", lambda x: x)
    assert found["score"].item() == pytest.approx(whole, abs=1e-9)
    for i in range(4):

        def change(x, i=i):
            x = x.clone()
            x[:, i] = other.detach()
            return x

        want = whole - score(wide, TEXTS[1], "w32", change)
        assert found["attribution"].values[0, i] == pytest.approx(want, abs=1e-9)


def test_gradient_times_input_is_a_finite_difference(wide):
    asked = Pairs(TEXTS[1], answer="w32")
    found = attribute_inputs(wide, asked, method="gradient", baseline="zero")["attribution"]
    h = 1e-3  # plain LLaMA norms in float32, so a smaller step drowns
    for i in range(4):

        def change(x, sign, i=i):
            x = x.clone()
            x[:, i] *= 1 + sign * h
            return x

        up, down = (score(wide, TEXTS[1], "w32", lambda x, s=s: change(x, s)) for s in (1.0, -1.0))
        assert found.values[0, i] == pytest.approx((up - down) / (2 * h), abs=1e-3)


@pytest.mark.parametrize("method", ["gradient", "integrated", "occlusion"])
def test_prompts_together_are_prompts_alone(wide, method):
    options = {"method": method, "steps": 3}
    both = attribute_inputs(wide, ASKED, **options)
    assert both["token"].values[1].tolist()[-1] == "" and both["attribution"].isnull().sum() == 1
    for i, text in enumerate(TEXTS):
        alone = attribute_inputs(wide, Pairs(text, answer=ASKED.answer[i]), **options)
        n = alone.data.sizes["position"]
        assert both["attribution"].values[i, :n] == pytest.approx(alone.values[0], abs=1e-9)


def test_bad_input(load_tiny):
    model = load_tiny()
    asked = Pairs("w5 w6", answer="w7")
    with pytest.raises(ValueError, match="method is 'lime'"):
        attribute_inputs(model, asked, method="lime")
    with pytest.raises(ValueError, match="baseline is 'blank'"):
        attribute_inputs(model, asked, baseline="blank")
    with pytest.raises(ValueError, match="needs corrupted prompts"):
        attribute_inputs(model, asked, baseline="corrupted")
    with pytest.raises(ValueError, match="metric 'rank' has no gradient"):
        attribute_inputs(model, asked, metric="rank")
    with pytest.raises(ValueError, match="one metric other than 'kl'"):
        attribute_inputs(model, asked, metric="kl")
    occluded = attribute_inputs(model, asked, metric="rank", method="occlusion")
    assert occluded["attribution"].shape == (1, 3)
