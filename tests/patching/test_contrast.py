"""Pairs of facts: what must agree agrees, what must differ differs."""

from __future__ import annotations

import pytest

from mi_hops.facts.fact import TwoHopFact
from mi_hops.patching import contrast, patch
from mi_hops.sweep import Sites
from mi_hops.text.tokens import encode, last_position


def fact(name, subject, bridge, answer, r1="of", r2="w80"):
    return TwoHopFact(
        id=name,
        subject=subject,
        relation1=r1,
        bridge=bridge,
        relation2=r2,
        answer=answer,
        first_hop=f"w70 w71 {subject}",
        prompts={"suffix": f"{r2} w72 w70 w71 {subject} w73"},
    )


FACTS = [
    fact("a", "w1", "w30", "w40 w41"),
    fact("b", "w2", "w31", "w42"),
    fact("same bridge as a", "w3", "w30", "w43"),
    fact("same start as a", "w4", "w32", "w40 w44"),
    fact("longer", "w5 w6", "w33", "w45"),
    fact("longer too", "w7 w8", "w34", "w46"),
    fact("other relation", "w9", "w35", "w47", r2="w81"),
]


def test_pairs_fit(tiny):
    pairs = contrast(tiny, FACTS, seed=1)
    assert pairs.skipped == [("other relation", "no fact of the same relations and lengths")]
    by_prompt = {f.prompt(): f for f in FACTS}
    assert len(pairs) == 6
    for clean, corrupted, right, wrong in zip(
        pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, strict=True
    ):
        one, two = by_prompt[clean], by_prompt[corrupted]
        assert (right, wrong) == (one.answer, two.answer)
        assert one.bridge != two.bridge
        assert one.answer.split()[0] != two.answer.split()[0]
        assert len(encode(tiny, clean)) == len(encode(tiny, corrupted))
    for i, clean in enumerate(pairs.clean):
        prompt = encode(tiny, clean)
        assert pairs.roles["subject"][i] == last_position(prompt, by_prompt[clean].subject)
        assert pairs.roles["first hop"][i] == last_position(prompt, by_prompt[clean].first_hop)
        assert pairs.roles["last"][i] == prompt.last
    partner = dict(zip(pairs.labels, pairs.corrupted, strict=True))
    assert by_prompt[partner["longer"]].id == "longer too"
    assert by_prompt[partner["a"]].id == "b"  # the only one left


def test_goes_into_patching_as_it_is(tiny):
    pairs = contrast(tiny, FACTS)
    result = patch(tiny, pairs, Sites("attn_out", positions=pairs.roles))
    assert list(result["example"].values) == pairs.labels
    assert list(result["position"].values) == ["subject", "first hop", "last"]
    part = pairs.select([1, 3])
    assert part.labels == [pairs.labels[1], pairs.labels[3]]
    assert part.roles["last"] == [pairs.roles["last"][i] for i in (1, 3)]


def test_no_question_is_its_own_partner(load_tiny):
    """A first hop with two bridges gives two facts of one prompt, and nothing to patch between them."""
    model, other_bridge = load_tiny(), fact("a again", "w1", "w36", "w48")
    with pytest.raises(ValueError, match="none of 2 facts has a partner"):
        contrast(model, [FACTS[0], other_bridge])
    pairs = contrast(model, [FACTS[0], other_bridge, FACTS[1]])
    assert pairs.corrupted[:2] == [FACTS[1].prompt()] * 2 and len(pairs) == 3


def test_seeded_and_partners(tiny):
    one, two = (contrast(tiny, FACTS, seed=3) for _ in range(2))
    assert vars(one) == vars(two)
    only = contrast(tiny, FACTS[:1], partners=FACTS[1:2])
    assert only.corrupted == [FACTS[1].prompt()]
    with pytest.raises(ValueError, match="none of 1 facts has a partner"):
        contrast(tiny, FACTS[:1])
