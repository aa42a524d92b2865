"""Edits of single facts: what is asked of editors, and edits that lie on top of one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mi_hops.editing import (
    CremeRepair,
    HopRepair,
    OnTop,
    Request,
    creme,
    edit_hooks,
    hop_requests,
)
from mi_hops.editing.baselines import GraceRepair, MemitRepair, RomeRepair, memit, rome_many
from mi_hops.facts import HopEdit
from mi_hops.model import forward
from mi_hops.sweep.repair import Repair
from mi_hops.text.tokens import encode, pad
from tests.editing.conftest import assert_same_bits, make_fact, weights

QUICK = {"layer": 1, "steps": 3, "templates": ("{}",)}


def edit_of(i=0, hop="second", new="w80 w81"):
    return HopEdit.of(make_fact(i), hop, new, answer="w82 w83" if hop == "first" else "")


def both(i=0):
    """Both hops of fact i edited."""
    first = edit_of(i, "first", f"w84 w7{i}")
    return replace(first, hops=("first", "second"))


def test_what_is_taught_where():
    fact = make_fact()
    (first,) = hop_requests(edit_of(0, "first", "w84 w85"))
    assert (first.two_hop_prompt, first.target, first.first_hop) == (
        fact.first_prompts["suffix"],
        "w84 w85",
        "w5",
    )
    (second,) = hop_requests(edit_of(), "prefix")
    assert (second.two_hop_prompt, second.target, second.first_hop) == (
        fact.second_prompts["prefix"],
        "w80 w81",
        fact.bridge,
    )
    asked = hop_requests([both(), both(1), both()])  # what is asked twice is taught once
    assert [r.target for r in asked] == ["w84 w70", "w82 w83", "w84 w71", "w82 w83"]


def test_what_cannot_be_taught_together(tiny):
    one, other = edit_of(), edit_of(new="w86")
    with pytest.raises(ValueError, match=rf"{one.id}.* and .*{other.id}.* contradict"):
        hop_requests([one, edit_of(1), other])
    with pytest.raises(ValueError, match="contradict"):
        memit(tiny, [*hop_requests(one), *hop_requests(other)], layers=[1], steps=2)
    with pytest.raises(ValueError, match="no prompt of form 'prefix'; it has"):
        hop_requests(edit_of(0, "first", "w84"), "prefix")
    with pytest.raises(ValueError, match="appear"):
        unnamed = replace(edit_of().after, second_prompts={"suffix": "w1 w2"})
        hop_requests(HopEdit(before=make_fact(), after=unnamed, hops=("second",)))
    with pytest.raises(ValueError, match="no second-hop prompt"):
        creme(tiny, hop_requests(one)[0], layers=[1])


@pytest.mark.parametrize(
    "repair", [RomeRepair(**QUICK), GraceRepair(layer=1, steps=3)], ids=["rome", "grace"]
)
def test_a_repair_taught_single_facts_is_fitted_to_their_requests(tiny, repair):
    edits = [edit_of(i) for i in range(3)]
    before = weights(tiny)
    taught = HopRepair(repair, edits, form="suffix")
    states = taught.fit(tiny, [e.after for e in reversed(edits)])
    assert_same_bits(tiny, before)
    assert isinstance(taught, Repair) and taught.name == repair.name
    asked = [r for e in reversed(edits) for r in hop_requests(e, "suffix")]
    direct = repair.fit(tiny, asked)
    if isinstance(repair, GraceRepair):
        assert states[0].answers == direct[0].answers == ["w80 w81"] * 3
    else:
        for one, two in zip(states, direct, strict=True):
            assert torch.equal(one.changes[0].delta(), two.changes[0].delta())
            assert one.request == two.request
    with pytest.raises(ValueError, match=r"\[edit.after for edit in edits\]"):
        taught.fit(tiny, [make_fact(4)])


def test_two_edits_of_a_chain_are_made_one_after_the_other(tiny):
    edit = both()
    ((first, second),) = HopRepair(RomeRepair(**QUICK), [edit]).fit(tiny, [edit.after])
    asked = hop_requests(edit)
    (alone,) = rome_many(tiny, asked[:1], **QUICK)
    with alone.applied(tiny):
        (then,) = rome_many(tiny, asked[1:], **QUICK)
    torch.testing.assert_close(first.changes[0].delta(), alone.changes[0].delta())
    torch.testing.assert_close(second.changes[0].delta(), then.changes[0].delta())
    shared = HopRepair(GraceRepair(layer=1, steps=2), [edit]).fit(tiny, [edit.after])
    assert shared[0].answers == [r.target for r in asked]
    apart = HopRepair(GraceRepair(layer=1, steps=2, shared=False), [edit])
    with pytest.raises(ValueError, match="keeps the two edits"):
        apart.fit(tiny, [edit.after])


def test_an_edit_on_top_is_made_on_the_edited_model_and_both_act(tiny):
    edits = [edit_of(i) for i in range(2)]
    facts = [e.after for e in edits]
    below = HopRepair(MemitRepair(layers=[0, 1], steps=3, templates=("{}",)), edits)
    above = CremeRepair(layers=[1, 2], form="suffix", templates=("{}",))
    pair = OnTop(below, above)
    before = weights(tiny)
    states = pair.fit(tiny, facts)
    assert_same_bits(tiny, before)
    assert pair.name == "MEMIT + CREME" and isinstance(pair, Repair)
    rows = pad([encode(tiny, f.prompt("suffix")).ids for f in facts])
    with torch.no_grad():
        hooked = forward(tiny, rows.tokens, hooks=pair.hooks(tiny, states, None))
    for i, (lower, upper) in enumerate(states):
        with lower.applied(tiny):
            by_hand = creme(tiny, facts[i], layers=[1, 2], form="suffix", templates=("{}",))
            for mine, theirs in zip(upper.changes, by_hand.changes, strict=True):
                torch.testing.assert_close(mine.delta(), theirs.delta())
            with upper.applied(tiny), torch.no_grad():
                want = forward(tiny, rows.tokens[i : i + 1])
        end = int(rows.last[i])
        torch.testing.assert_close(hooked[i, end], want[0, end], atol=1e-4, rtol=1e-4)
    one = edit_hooks(tiny, [states[0], None])
    with torch.no_grad():
        rest = forward(tiny, rows.tokens, hooks=one)
        assert torch.equal(rest[1], forward(tiny, rows.tokens)[1])


def test_what_is_no_edit_cannot_lie_on_top(tiny):
    edit = edit_of()
    grace = HopRepair(GraceRepair(layer=1, steps=2), [edit])
    with pytest.raises(ValueError, match="only edits of weights"):
        OnTop(grace, CremeRepair(layers=[1], form="suffix")).fit(tiny, [edit.after])
    request = Request(two_hop_prompt="w3 w5", target="w6", first_hop="w5")
    assert request.to_dict() == {"two_hop_prompt": "w3 w5", "target": "w6", "first_hop": "w5"}
