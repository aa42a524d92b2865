"""Locating: every cell against a forward pass of its own, windows, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.model import capture, forward, hook_name
from mi_hops.patching import patch
from mi_hops.reasoning.locate import locate, located_layers
from mi_hops.result.result import Result
from mi_hops.sweep import Pairs, Sites
from mi_hops.text.tokens import answer_ids, encode
from tests.reasoning.tiny_facts import tiny_facts


@pytest.mark.slow_case("llama-bridge-2", "gpt2-hooked-1")
@pytest.mark.parametrize("form", ["suffix", "prefix"])
@pytest.mark.parametrize("window", [1, 2])
def test_cells_equal_single_forward_passes(tiny, form, window):
    facts = tiny_facts(tiny, 2)
    result = locate(tiny, facts, form=form, window=window)
    for fact in facts:
        prompt, guide = encode(tiny, fact.prompt(form)), encode(tiny, fact.second_prompt(form))
        answer = answer_ids(tiny, prompt, fact.answer)[0]
        tokens = torch.tensor([prompt.ids])
        tail = {"suffix": 1, "prefix": 2}[form]
        clean = forward(tiny, tokens)[0, -1].softmax(-1)[answer].item()
        ends = {"first hop": [tail], "between": list(range(tail - 1, 0, -1)), "last": [0]}
        for kind in ("attn_out", "mlp_out", "resid_post"):
            names = [hook_name(kind, i) for i in range(3)]
            acts, _ = capture(tiny, torch.tensor([guide.ids]), names)
            for role, end in ends.items():
                for layer in range(3):
                    cell = result["effect"].sel(
                        example=fact.id, kind=kind, position=role, layer=layer
                    )
                    if not end:
                        assert np.isnan(cell.item())
                        continue
                    span = range(layer, layer + 1)
                    if window == 2 and kind != "resid_post":
                        span = range(max(0, layer - 1), layer + 1)

                    def fn(x, i, end=end, acts=acts, names=names):
                        x = x.clone()
                        for e in end:
                            x[0, -1 - e] = acts[names[i]][0, -1 - e]
                        return x

                    hooks = [(names[i], lambda x, i=i: fn(x, i)) for i in span]
                    logits = forward(tiny, tokens, hooks=hooks)
                    expected = logits[0, -1].softmax(-1)[answer].item() - clean
                    assert cell.item() == pytest.approx(expected, abs=1e-5)


def test_the_block_output_at_the_last_token_gives_the_guides_answer(tiny):
    """Replacing the last block's output at the last token makes the prompt say what the guide does."""
    result = locate(tiny, tiny_facts(tiny, 3))
    last = result["effect"].sel(kind="resid_post", position="last", layer=2)
    assert np.allclose(last, result["guide"] - result["clean"], atol=1e-5)


def test_prompts_that_end_differently_are_skipped(tiny):
    facts = tiny_facts(tiny, 2)
    odd = replace(facts[0], id="odd", second_prompts={"suffix": "w11 w12 w40 w14"})
    result = locate(tiny, [*facts, odd])
    assert [who for who, _ in result.skipped] == ["odd"]
    assert "do not end alike" in result.skipped[0][1]
    with pytest.raises(ValueError, match="no fact can be used"):
        locate(tiny, [odd])
    with pytest.raises(ValueError, match="no kinds; expected one or more"):
        locate(tiny, facts, kinds=())
    with pytest.raises(ValueError, match="window is 0"):
        locate(tiny, facts, window=0)


def test_effects_are_the_changes_that_patch_finds(tiny):
    """One cell of locating is activation patching of the guide into the two-hop prompt."""
    facts = tiny_facts(tiny, 3)
    located = locate(tiny, facts)
    pairs = Pairs(
        [fact.second_prompt() for fact in facts],
        [fact.prompt() for fact in facts],
        answer=[fact.answer for fact in facts],
        labels=[fact.id for fact in facts],
    )
    sites = Sites(["attn_out", "mlp_out", "resid_post"], positions={"last": -1})
    patched = patch(tiny, pairs, sites, metric="first_prob")
    assert np.allclose(
        located["effect"].sel(position="last"), patched["change"].sel(position="last"), atol=1e-6
    )


def test_located_layers_by_hand():
    effect = np.array([[[[0.0, 0.2, 0.4, 0.19, -0.5]]]])
    result = Result.from_arrays(
        {"effect": (("example", "kind", "position", "layer"), effect)},
        coords={"kind": ["attn_out"], "position": ["last"], "layer": range(5)},
        provenance={},
    )
    assert located_layers(result) == [1, 2]
    assert located_layers(result, share=0.4) == [1, 2, 3]
    negative = Result.from_arrays(
        {"effect": (("example", "kind", "position", "layer"), -abs(effect))},
        coords={"kind": ["attn_out"], "position": ["last"], "layer": range(5)},
        provenance={},
    )
    assert located_layers(negative) == []
