"""Attention knockout against masks in plain transformers and scores of minus infinity; back-patching
against one pass a cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mi_hops.patching import back_patch, knockout
from mi_hops.sweep import Pairs
from mi_hops.text.tokens import encode
from tests.models import cases
from tests.patching.loops import ANSWERS, CLEAN, put, run, source

ASKED = Pairs(CLEAN, answer=ANSWERS)
ONE = Pairs(CLEAN[0], answer="w11")
N = 7


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_blocked_everywhere_is_an_attention_mask(load_tiny, checkpoints, shape, backend):
    from transformers import AutoModelForCausalLM

    model = load_tiny(shape, backend, "float64" if backend == "hooked" else "float32")
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[shape], attn_implementation="eager")
    plain = plain.to(torch.float64).eval()
    keys = {"two": slice(2, 4), "first": 0}
    for queries in ("last", slice(4, None)):
        found = knockout(model, ASKED, keys, queries, window=6, layers=1)
        for i, text in enumerate(CLEAN):
            tokens = torch.tensor([encode(model, text).ids])
            for name, blocked in (("two", [2, 3]), ("first", [0])):
                seen = torch.ones(N, N, dtype=torch.bool).tril()
                rows = [N - 1] if queries == "last" else [4, 5, 6]
                for q in rows:
                    seen[q, blocked] = False
                mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(~seen, -torch.inf)
                with torch.no_grad():
                    logits = plain(tokens, attention_mask=mask[None, None]).logits[0, -1]
                answer = int(ANSWERS[i].split()[0][1:]) + 4
                expected = float(logits.softmax(-1)[answer])
                got = float(found["score"].sel(position=name)[i, 0])
                assert got == pytest.approx(expected, rel=1e-4), (i, name)


def test_a_key_with_all_the_weight_leaves_nothing(tiny):
    """As in float16, where a score that lies 18 below the highest one gives a weight of 0."""

    def all_on_the_first(pattern, hook):
        alone = torch.zeros_like(pattern)
        alone[..., 0] = 1
        return alone

    with tiny.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", all_on_the_first)]):
        assert np.isfinite(knockout(tiny, ONE, {"other": 1})["score"]).all()
        with pytest.raises(ValueError, match="no attention is left: in torch.float32 .* bfloat16"):
            knockout(tiny, ONE, {"first": 0})


def test_one_block_equals_scores_of_minus_infinity(load_tiny):
    for shape in ("gpt2", "llama"):
        model = load_tiny(shape, "hooked", "float64")
        found = knockout(model, ONE)
        assert found["score"].dims == ("example", "layer", "position")
        one_head = knockout(model, ONE, heads=[2])
        tokens = torch.tensor([encode(model, CLEAN[0]).ids])
        for layer in range(3):
            for key in range(N):

                def block(x, hook, key=key, heads=slice(None)):
                    x[:, heads, -1, key] = -torch.inf
                    return x

                name = f"blocks.{layer}.attn.hook_attn_scores"
                for result, heads in ((found, slice(None)), (one_head, 2)):
                    hook = (name, lambda x, hook, h=heads, b=block: b(x, hook, heads=h))
                    logits = model.run_with_hooks(tokens, fwd_hooks=[hook])
                    expected = float(logits[0, -1].softmax(-1)[15])
                    got = float(result["score"].sel(layer=layer, position=key).squeeze())
                    assert got == pytest.approx(expected, abs=1e-10)


def test_classes_agree_and_batches_change_nothing(load_tiny):
    options = {"metric": "answer_logprob", "window": 2}
    for shape in ("gpt2", "llama"):
        models = [load_tiny(shape, b) for b in ("hooked", "bridge")]
        one, two = (knockout(m, ASKED, **options)["change"] for m in models)
        assert np.allclose(one, two, atol=2e-4)
        alone = knockout(models[0], ASKED.select([1]), **options)["change"][0]
        assert np.allclose(alone, one[1], atol=2e-5)
        # Keys behind the queries are not seen anyway.
        nothing = knockout(models[0], ASKED, {"later": -1}, 3)
        assert np.allclose(nothing["change"], 0, atol=1e-6)


def test_every_late_state_fed_back(tiny):
    found = back_patch(tiny, ASKED, {"last": -1, "moved": (2, 4)}, metric="answer_logprob")
    assert found["score"].dims == ("example", "position", "source", "target")
    assert list(found["source"].values) == [1, 2, 3]
    for i in (0, 2):
        text = CLEAN[i]
        for s in (1, 2, 3):
            value = source(tiny, text, "resid_post", s - 1)
            for t in range(3):
                for name, where, take in (("last", N - 1, N - 1), ("moved", 4, 2)):
                    got = float(found["score"].sel(position=name, source=s, target=t)[i])
                    if s <= t:
                        assert np.isnan(got)
                        continue
                    hook = put("resid_pre", t, value, [where], take=[take])
                    expected = run(tiny, text, [hook], "answer_logprob", ANSWERS[i])
                    assert got == pytest.approx(expected, abs=2e-4)
    change = found["score"] - found["intact"]
    assert np.allclose(change, found["change"], atol=1e-6, equal_nan=True)


def test_refuses(tiny):
    with pytest.raises(ValueError, match="sees nothing at all"):
        knockout(tiny, ONE, "all", "last")
    with pytest.raises(ValueError, match="got 2 of queries for 3 examples"):
        knockout(tiny, ASKED, queries=[-1, -2])
    with pytest.raises(ValueError, match="score an answer"):
        knockout(tiny, CLEAN)
    with pytest.raises(ValueError, match="expected some of 0..3"):
        back_patch(tiny, ONE, sources=[4])
    with pytest.raises(ValueError, match="later than a target"):
        back_patch(tiny, ONE, sources=[1], targets=[2])
    with pytest.raises(ValueError, match="expected one metric"):
        back_patch(tiny, ONE, metric=["rank", "first_prob"])
