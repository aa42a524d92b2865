"""Searching heads, and side effects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mi_hops.injection import (
    Encoder,
    MemoryInjection,
    chosen_heads,
    encode_memories,
    greedy_heads,
    injection_grid,
    side_effects,
)
from mi_hops.injection.controls import Controls
from mi_hops.model import forward, hook_name
from mi_hops.result import split_halves
from mi_hops.text.tokens import encode
from tests.injection.test_grid import FACTS, fact, one_by_one

CONTROLS = ("permuted_bridge",)
UNRELATED = ("w60 w61 w62", "w63 w64")


def test_all_heads_together_write_the_whole_memory(load_tiny):
    # The tiny models' W_O is square and invertible: its rows span the residual space.
    model = load_tiny()
    whole = encode_memories(model, ["w20"])
    parts = encode_memories(model, ["w20"], Encoder(heads=[0, 1, 2, 3]))[0]
    assert torch.allclose(parts, whole[0], atol=1e-4)


def test_greedy_heads_take_the_best_head_of_each_round_and_report_the_other_half(tiny):
    facts = [*FACTS, *(fact(i) for i in range(9, 13))]
    searched = MemoryInjection([1, 2], 3.0, positions="last")
    found = greedy_heads(tiny, facts, searched, max_heads=2, controls=Controls(CONTROLS, seed=1))
    heads, means = chosen_heads(found), found["chosen_at"].values
    order = list(zip(found["layer"].values.tolist(), found["head"].values.tolist(), strict=True))
    assert 1 <= len(order) <= 2 and found["size"].values.tolist() == [1, 2][: len(order)]
    choosing, reporting = split_halves([f.id for f in facts], seed=1)
    assert found["example"].values.tolist() == reporting
    chosen = [f for f in facts if f.id in choosing]

    def mean(heads, part):
        repair = replace(
            searched, layers=sorted(heads), strength=3.0, encoding=Encoder(heads=heads)
        )
        return one_by_one(tiny, part, repair, "first_logprob")

    singles = {(layer, h): mean({layer: [h]}, chosen).mean() for layer in (1, 2) for h in range(4)}
    assert order[0] == max(singles, key=singles.get)
    assert np.isclose(means[0], max(singles.values()), atol=1e-4)
    if len(order) == 2:
        assert means[1] > means[0]
        assert np.isclose(mean(heads, chosen).mean(), means[1], atol=1e-4)
    got = found["first_logprob"].sel(memory="bridge").isel(size=-1).values
    want = mean(heads, [f for f in facts if f.id in reporting])
    assert np.allclose(got, want, atol=1e-4)
    assert found["memory"].values.tolist() == ["bridge", "permuted_bridge", "random heads"]
    assert chosen_heads(found, 1) == {order[0][0]: (order[0][1],)}


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({}, {"choose_by": "greedy"}, "choose_by is 'greedy'"),
        ({}, {"controls": ("norm_matched",)}, "leave norm_matched out"),
        ({"encoding": Encoder(heads=[1])}, {}, "without heads"),
        ({"kind": "mlp_out"}, {}, "at attn_out"),
    ],
)
def test_heads_are_searched_for_an_injection_of_the_bridge(load_tiny, settings, more, message):
    with pytest.raises(ValueError, match=message):
        greedy_heads(load_tiny(), FACTS, MemoryInjection(1, 1.0, **settings), **more)


def test_negative_strength_suppresses_what_positive_strength_brings_up(tiny):
    grid = injection_grid(
        tiny, FACTS, strengths=(-2, 2), layers=[2], positions="last", controls=("answer",)
    )
    answer = grid["first_logprob"].sel(memory="answer", layer=2)
    up, down = (answer.sel(strength=s).mean().item() for s in (2, -2))
    assert down < grid["first_logprob_before"].mean().item() < up


def test_side_effects_by_hand(tiny):
    injection = MemoryInjection(1, 3.0)
    result = side_effects(tiny, FACTS[:2], injection, UNRELATED, batch_size=2)
    states = injection.fit(tiny, FACTS[:2])
    for item, state in zip(FACTS[:2], states, strict=True):
        for text in (*UNRELATED, item.second_prompts["suffix"]):
            tokens = torch.tensor([encode(tiny, text).ids])
            add = [(hook_name("attn_out", 1), lambda x, v=state.vectors[1]: x + 3 * v)]
            with torch.no_grad():
                before, after = (
                    forward(tiny, tokens, hooks=h)[0, -1].log_softmax(-1) for h in ([], add)
                )
            kl = (before.exp() * (before - after)).sum().item()
            if text in UNRELATED:
                assert np.isclose(result["kl"].sel(example=item.id, prompt=text), kl, atol=1e-4)
                changed = float(before.argmax() != after.argmax())
                assert result["top_changed"].sel(example=item.id, prompt=text) == changed
            else:
                assert np.isclose(result["explicit_kl"].sel(example=item.id), kl, atol=1e-4)


def test_side_effects_leave_prompts_without_the_first_hop_alone(load_tiny):
    injection = MemoryInjection(1, 3.0, positions="first hop")
    result = side_effects(load_tiny(), FACTS[:2], injection, UNRELATED)
    assert not result["kl"].values.any() and not result["top_changed"].values.any()
    assert not result["touched"].values.any() and not result["explicit_touched"].values.any()
    # The last token is there whatever the first hop is.
    both = side_effects(
        load_tiny(), FACTS[:2], replace(injection, positions=["first hop", "last"]), UNRELATED
    )
    last = side_effects(load_tiny(), FACTS[:2], replace(injection, positions="last"), UNRELATED)
    assert both["touched"].values.all() and both["explicit_touched"].values.all()
    assert np.allclose(both["kl"].values, last["kl"].values) and both["kl"].values.all()
    with pytest.raises(ValueError, match="unrelated prompt"):
        side_effects(load_tiny(), FACTS, injection, [])
    with pytest.raises(ValueError, match=r"no fact can be used for side effects \(5: "):
        side_effects(load_tiny(), FACTS, injection, UNRELATED, form="question")
