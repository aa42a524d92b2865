"""New objects for single facts: true in the world they come from, and the same whatever else is asked."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from mi_hops.facts import HopEdit, hop_edits, load_geo, load_mquake_edits, single_fact
from mi_hops.worlds import Hopland
from tests.facts.test_mquake import RECORD


@pytest.fixture(scope="module")
def world():
    return Hopland(seed=3, people=16, works=6, companies=6, cities=6, countries=6)


@pytest.fixture(scope="module")
def chains(world):
    return world.two_hop_facts("seen_parts", "first_unseen")[:400]


def test_a_new_bridge_leads_where_the_world_says(world, chains):
    edits, left_out = hop_edits(chains, "first")
    assert len(edits) + len(left_out) == len(chains) and len(edits) > 200
    for edit in edits:
        old, new = edit.before, edit.after
        assert edit.hops == ("first",) and edit.id == new.id != old.id
        assert new.bridge not in (old.bridge, old.subject) and new.answer != old.answer
        second = world.facts[new.bridge, new.relation2]
        assert (new.answer, new.second_prompts) == (second.object, second.prompts())
        holders = {f.bridge for f in chains if f.relation1 == new.relation1}
        assert new.bridge in holders
        assert (new.prompts, new.first_prompts) == (old.prompts, old.first_prompts)
        assert not any(new.bridge in text for text in new.prompts.values())


def test_a_new_answer_changes_nothing_else(chains):
    edits, _ = hop_edits(chains, "second")
    answers = {}
    for fact in chains:
        answers.setdefault(fact.relation2, set()).add(fact.answer)
    assert len(edits) > 300
    for edit in edits:
        new = edit.after
        assert new.answer != edit.before.answer and new.answer in answers[new.relation2]
        assert replace(new, id=edit.before.id, answer=edit.before.answer) == edit.before


@pytest.mark.parametrize("hop", ["first", "second"])
def test_a_single_fact_gets_one_object_whatever_else_is_in_the_list(chains, hop):
    edits, _ = hop_edits(chains, hop)
    given = {}
    for edit in edits:
        (single,) = edit.singles
        assert given.setdefault(single.key, single.object) == single.object
    one = edits[0]
    (alone,) = hop_edits([one.before], hop, pool=chains)[0]
    assert alone.after == one.after
    assert {e.after.answer for e in hop_edits(chains, hop, seed=1)[0]} != {
        e.after.answer for e in edits
    }


@pytest.mark.parametrize("hop", ["first", "second"])
def test_edits_for_one_model_leave_each_others_other_hop_alone(chains, hop):
    def wrong(edits):
        """Chains whose unedited hop another edit changes."""
        taught = {single.key for edit in edits for single in edit.singles}
        other = "second" if hop == "first" else "first"
        return [e for e in edits if single_fact(e.after, other).key in taught]

    assert wrong(hop_edits(chains, hop)[0])
    edits, left_out = hop_edits(iter(chains), hop, together=True)
    assert len(edits) > 20 and not wrong(edits)
    assert len(edits) + len(left_out) == len(chains)
    assert any("in one model" in why for _, why in left_out)


def test_names_in_running_text_follow_the_new_objects():
    facts = load_geo()
    edits, _ = hop_edits(facts[:300], "first", pool=facts)
    by_bridge = {f.bridge: f for f in facts}
    assert len(edits) > 200
    for edit in edits:
        lent = by_bridge[edit.after.bridge].meta.get("in_text", {}).get("bridge")
        assert edit.after.meta.get("in_text", {}).get("bridge") == lent
        named = single_fact(edit.after, "second").named
        assert all(named.lower() in t.lower() for t in edit.after.second_prompts.values())


def test_an_object_of_ones_own(chains):
    fact = chains[0]
    second = HopEdit.of(fact, "second", "Quillish", aliases=["Quill"])
    assert second.after.answer == "Quillish" and second.singles[0].says("quill")
    first = HopEdit.of(fact, "first", "Ada Quill", answer="Quillish")
    assert (first.after.bridge, first.after.answer) == ("Ada Quill", "Quillish")
    assert first.after.second_prompts == {
        form: text.replace(fact.bridge, "Ada Quill") for form, text in fact.second_prompts.items()
    }


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda f: HopEdit.of(f, "second", f.answer.upper()), "is the old one"),
        (
            lambda f: HopEdit.of(replace(f, answer_aliases=("Q",)), "second", "q"),
            "is the old one",
        ),
        (lambda f: HopEdit.of(f, "first", f.bridge, answer="X"), "is the old one"),
        (lambda f: HopEdit.of(f, "first", "X"), "give it with answer="),
        (lambda f: HopEdit.of(f, "third", "X"), "hop is 'third'"),
        (
            lambda f: HopEdit(before=f, after=replace(f, bridge="X"), hops=("second",)),
            "first hop is not edited",
        ),
        (
            lambda f: HopEdit(before=f, after=replace(f, subject="X"), hops=("first",)),
            "same two-hop question",
        ),
        (lambda f: HopEdit(before=f, after=f, hops=()), "expected some of"),
        (
            lambda f: HopEdit.of(
                replace(f, second_prompts={"suffix": "It is"}), "first", "X", answer="Y"
            ),
            "does not name the bridge",
        ),
        (lambda f: HopEdit.of(f, "second", "X", aliases="XY"), "got the text 'XY'"),
    ],
    ids="old alias old-bridge no-answer hop moved other-question none unnamed text".split(),
)
def test_edits_that_are_none(chains, make, words):
    with pytest.raises(ValueError, match=words):
        make(chains[0])


# -- MQuAKE ---------------------------------------------------------------------------------------


def edited(first=True, second=False, **changes):
    """The record of the loader's tests with edits of its hops."""
    bridge = ("Q7", "Bo Lind") if first else ("Q2", "Ada Moss")
    answer = ("Q9", "Ostland") if second else ("Q8", "Sudland") if first else ("Q3", "Norland")
    hops = copy.deepcopy(RECORD["single_hops"])
    hops[0] |= {"answer": bridge[1], "answer_alias": []}
    hops[1] |= {
        "question": f"What is the country of citizenship of {bridge[1]}?",
        "answer": answer[1],
    }
    triples = [["Q1", "P50", bridge[0]], [bridge[0], "P27", answer[0]]]
    labels = [
        ["The Salt Road", "author", bridge[1]],
        [bridge[1], "country of citizenship", answer[1]],
    ]
    edits = [t for t, changed in zip(triples, (first, second), strict=True) if changed]
    record = {
        **copy.deepcopy(RECORD),
        "new_single_hops": hops,
        "new_answer": answer[1],
        "new_answer_alias": ["Kingdom of " + answer[1]],
        **changes,
    }
    record["orig"] |= {
        "new_triples": triples,
        "new_triples_labeled": labels,
        "edit_triples": edits,
    }
    return record


def read(tmp_path, *records):
    path = tmp_path / "cf.json"
    path.write_text(json.dumps(records))
    return load_mquake_edits(path)


@pytest.mark.parametrize(
    "first, second, hops",
    [(True, False, ("first",)), (False, True, ("second",)), (True, True, ("first", "second"))],
    ids="first second both".split(),
)
def test_the_edits_of_a_record(tmp_path, first, second, hops):
    (edit,), left_out = read(tmp_path, edited(first, second))
    old, new = edit.before, edit.after
    assert edit.hops == hops and not left_out
    assert (old.id, new.id) == ("mquake-12", f"mquake-12 -> {new.answer}")
    assert (old.bridge, old.answer) == ("Ada Moss", "Norland")
    assert new.bridge == ("Bo Lind" if first else "Ada Moss")
    assert new.answer == ("Ostland" if second else "Sudland")
    assert new.answer_aliases == (f"Kingdom of {new.answer}",)
    assert new.prompts == old.prompts and new.paraphrases == old.paraphrases
    assert new.second_prompts["suffix"] == f"The country of citizenship of {new.bridge} is"
    assert [(s.subject, s.object) for s in edit.singles] == [
        pair
        for pair, asked in (
            (("The Salt Road", new.bridge), first),
            ((new.bridge, new.answer), second),
        )
        if asked
    ]


def test_records_without_edits_are_told(tmp_path):
    unchanged = edited(False, False, case_id=13)
    longer = copy.deepcopy(RECORD) | {"single_hops": RECORD["single_hops"] * 2, "case_id": 14}
    longer |= {k: edited()[k] for k in ("new_single_hops", "new_answer", "new_answer_alias")}
    longer["orig"] = edited()["orig"]
    edits, left_out = read(tmp_path, edited(), unchanged, longer)
    assert [e.id for e in edits] == ["mquake-12 -> Sudland"]
    assert [name for name, _ in left_out] == ["record 1", "record 2"]
    assert "hops are ()" in left_out[0][1]


def test_longer_chains_are_left_out_with_their_reason():
    world = Hopland()
    chain, two = world.chain_facts(3, n=1)[0], world.two_hop_facts("seen_parts")[0]
    pool = world.two_hop_facts("seen_parts")[:200]
    edits, left_out = hop_edits([chain, two], "second", pool=[chain, *pool])
    assert left_out[0] == (chain.id, "more than two hops")
    assert [edit.before for edit in edits] == [two][: len(edits)]
    with pytest.raises(ValueError, match="the fact has 3 hops; an edit is of a two-hop fact"):
        HopEdit(before=chain, after=replace(chain, id="new"), hops=("second",))
    part = chain.part(1, 2)
    assert HopEdit.of(part, "second", "Nowhere").after.answer == "Nowhere"
