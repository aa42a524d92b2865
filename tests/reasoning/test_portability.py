"""Questions through an edited fact: true in the world with that fact changed, and known ones only."""

from __future__ import annotations

import pandas as pd
import pytest

from mi_hops.facts import HopEdit, hop_edits, load_geo, single_fact
from mi_hops.facts.templates import capitalise, prompts_about
from mi_hops.reasoning import Evaluation, chain_scores, evaluate, find_gap, portability_sets
from mi_hops.worlds import Hopland
from tests.reasoning.tiny_facts import dictate, tiny_facts
from tests.repairs import NoRepair

FORMS = ("suffix", "prefix", "question")
STAY = ("old_answer", "other_hop", "same_subject", "same_relation", "specificity", "neutral")


@pytest.fixture
def ask(monkeypatch, load_tiny):
    """Gaps in which every question is answered, but for some prompts."""

    def gap_of(facts, unknown=()):
        dictate(monkeypatch, dict.fromkeys(unknown, ""))
        return find_gap(load_tiny(), facts, form="suffix")

    return gap_of


@pytest.fixture(scope="module")
def world():
    return Hopland(seed=3, people=8, works=4, companies=4, cities=4, countries=6)


@pytest.fixture(scope="module")
def chains(world):
    return world.two_hop_facts()


def of(queries, name, case):
    return [q for q in queries if q.set == name and q.case == case]


def test_questions_through_a_new_bridge_are_those_of_the_changed_world(world, chains, ask):
    gap = ask(chains)
    edits = hop_edits(chains[::97], "first", pool=chains)[0][:12]
    queries = portability_sets(edits, gap, per_case=4)
    for edit in edits:
        new, old = edit.after, edit.before
        (taught,) = of(queries, "efficacy", edit.id)
        assert (taught.prompt, taught.answer) == (new.first_prompts["suffix"], new.bridge)
        assert taught.wrong == old.bridge
        assert {q.prompt for q in of(queries, "wordings", edit.id)} == {
            new.first_prompts[f] for f in FORMS[1:]
        }
        (own,) = of(queries, "portability_own", edit.id)
        assert (own.prompt, own.answer, own.wrong) == (
            new.prompts["suffix"],
            new.answer,
            old.answer,
        )
        assert {q.prompt for q in of(queries, "portability_wordings", edit.id)} == {
            new.prompts[f] for f in FORMS[1:]
        }
        others = of(queries, "portability_chains", edit.id)
        whole = {(q.prompt, q.answer) for q in of(queries, "portability", edit.id)}
        assert len(whole) == 3 + len(others) == 3 + 3 * 4
        phrase, truth = new.first_hop, {}
        for single in world.facts.values():
            if single.subject == new.bridge and single.relation.name != new.relation2:
                texts = prompts_about(single.relation.wording, phrase).values()
                truth |= dict.fromkeys(texts, single)
        for q in others:
            assert phrase in q.prompt or capitalise(phrase) in q.prompt
            assert q.answer == truth[q.prompt].object
            before = world.facts.get((old.bridge, truth[q.prompt].relation.name))
            assert q.wrong == (before.object if before else None)
        stale = {(q.prompt, q.answer) for q in of(queries, "old_answer", edit.id)}
        asked = {q.prompt: q for q in of(queries, "portability", edit.id)}
        assert stale == {(q.prompt, q.wrong) for q in asked.values() if q.wrong}


def test_questions_that_end_in_an_edited_second_hop(world, chains, ask):
    gap = ask(chains)
    edits = hop_edits(chains[::97], "second", pool=chains)[0][:12]
    queries = portability_sets(edits, gap, per_case=3)
    for edit in edits:
        new, old = edit.after, edit.before
        (taught,) = of(queries, "efficacy", edit.id)
        assert (taught.prompt, taught.answer) == (new.second_prompts["suffix"], new.answer)
        for q in of(queries, "portability_chains", edit.id):
            through = next(f for f in chains if f.id == q.source)
            assert (through.bridge, through.relation2) == (new.bridge, new.relation2)
            assert through.id != old.id and q.prompt in through.prompts.values()
            assert (q.answer, q.wrong) == (new.answer, old.answer)


def test_what_is_to_stay_is_untouched_by_the_edit(world, chains, ask):
    for hop in ("first", "second"):
        edits = hop_edits(chains[::97], hop, pool=chains)[0][:8]
        queries = portability_sets(edits, ask(chains), per_case=3)
        truth = {t: s for s in world.facts.values() for t in s.prompts().values()}
        for edit in edits:
            (single,) = edit.singles
            for name in ("other_hop", "same_subject", "same_relation", "neutral"):
                for q in of(queries, name, edit.id):
                    fact = truth[q.prompt]
                    key = (fact.subject, fact.relation.name)
                    assert fact.object == q.answer and key != (single.subject, single.relation)
                    assert (fact.subject == single.subject) or name != "same_subject"
                    assert (fact.relation.name == single.relation) or name != "same_relation"
            for q in of(queries, "specificity", edit.id):
                other = next(f for f in chains if f.id == q.source)
                mine = {edit.before.bridge, edit.after.bridge, edit.before.subject}
                assert not mine & {other.subject, other.bridge, other.answer}


def test_a_question_whose_other_hop_is_not_known_is_not_asked(chains, ask):
    edit = hop_edits(chains[:50], "first", pool=chains)[0][0]
    unknown = {edit.after.second_prompts["suffix"]}
    queries = portability_sets([edit], ask(chains, unknown))
    assert not of(queries, "portability_own", edit.id) and not of(queries, "other_hop", edit.id)
    assert (
        "other hop is not known"
        in dict((s, why) for s, _, why in queries.skipped)["portability_own"]
    )
    assert all(q.answer != edit.after.answer for q in of(queries, "portability_chains", edit.id))
    assert of(queries, "portability_chains", edit.id)


def test_reverse_where_the_facts_have_one(ask):
    facts = load_geo()
    capitals = [
        f for f in facts if f.relation1 == "country of capital" and f.relation2 == "continent"
    ]
    back = [f for f in facts if f.relation2 == "capital"]
    chosen = [*capitals[:40], *back]
    edits = hop_edits(capitals[:40], "first", pool=chosen)[0]
    queries = portability_sets(edits, ask(chosen))
    asked = queries.of("reverse")
    assert len(asked)
    for q in asked:
        edit = next(e for e in edits if e.id == q.case)
        assert edit.after.bridge in q.prompt and q.answer == edit.before.subject
        assert q.wrong not in (None, q.answer)
    none = portability_sets(hop_edits(back, "second")[0][:3], ask(back))
    assert {why for s, _, why in none.skipped if s == "reverse"} == {"no known reverse relation"}


def test_the_draws_do_not_depend_on_the_other_cases(chains, ask):
    gap = ask(chains)
    edits = hop_edits(chains[::97], "first", pool=chains)[0][:6]
    together = portability_sets(edits, gap, per_case=2, seed=5)
    alone = portability_sets(edits[:1], gap, per_case=2, seed=5)
    drawn = lambda sets: [q for q in sets if q.case == edits[0].id and q.set != "neutral"]  # noqa: E731
    assert drawn(together) == drawn(alone)
    assert drawn(portability_sets(edits[:1], gap, per_case=2, seed=6)) != drawn(alone)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"edits": []}, "make some with hop_edits"),
        ({"per_case": 0}, "expected at least 1"),
        ({"twice": True}, "must be unique"),
    ],
    ids="none zero twice".split(),
)
def test_bad_input(chains, ask, change, words):
    edits = hop_edits(chains[:20], "first", pool=chains)[0][:1]
    edits = change.pop("edits", edits * (2 if change.pop("twice", False) else 1))
    with pytest.raises(ValueError, match=words):
        portability_sets(edits, ask(chains[:20]), **change)


def test_it_is_scored_like_any_other_set(load_tiny):
    model = load_tiny("llama", "bridge")
    facts = tiny_facts(model)
    edits = [HopEdit.of(f, "second", "w80") for f in facts[:3]]
    gap = find_gap(model, facts, form="suffix")
    queries = portability_sets(edits, gap)
    scores = evaluate(model, NoRepair(), queries, [e.after for e in edits], generate=False)
    frame = scores.frame
    assert (frame["exact_match_before"] == frame["exact_match_after"]).all()
    assert "efficacy" in scores.summary().columns
    assert single_fact(edits[0].after, "second").object == "w80"


def test_mquakes_numbers_by_hand():
    rows = [
        # case, set, before, after
        ("a", "efficacy", 0, 1),
        ("a", "other_hop", 1, 1),
        ("a", "portability_own", 0, 0),
        ("a", "portability_wordings", 0, 1),
        ("b", "efficacy", 0, 1),
        ("b", "efficacy", 0, 0),
        ("b", "portability_own", 0, 0),
        ("c", "efficacy", 1, 1),
        ("c", "other_hop", 1, 0),
        ("d", "efficacy", 0, 1),  # whose other hop is not known, so that nobody asked it
    ]
    frame = pd.DataFrame(rows, columns=["case", "set", "exact_match_before", "exact_match_after"])
    found = chain_scores(Evaluation(frame.assign(repair="R"), ("a", "b", "c", "d"), (), {}))
    names = ["edit_wise", "instance_wise", "multi_hop"]
    assert found.loc["R", names].tolist() == [3 / 4, 1 / 3, 1 / 2]
    assert found.loc["R", [f"{name}_n" for name in names]].tolist() == [4, 3, 2]
    assert found.loc["unrepaired", "edit_wise"] == 1 / 4
    with pytest.raises(ValueError, match="generation_correct"):
        chain_scores(Evaluation(frame.assign(repair="R"), ("a",), (), {}), "generation_correct")
    probable = frame.assign(repair="R", first_prob_before=0.2, first_prob_after=0.7)
    with pytest.raises(ValueError, match="'first_prob'; expected an accuracy"):
        chain_scores(Evaluation(probable, ("a", "b", "c", "d"), (), {}), "first_prob")
