"""Query sets: what belongs in each, seeds, skipped cases, and no leakage."""

from __future__ import annotations

import dataclasses

import pytest

from mi_hops.editing import Request
from mi_hops.facts.fact import TwoHopFact
from mi_hops.reasoning.gap import find_gap
from mi_hops.reasoning.queries import SETS, Query, QuerySets, SetCount
from mi_hops.reasoning.sets import Known, build_sets
from mi_hops.text.matching import normalise
from mi_hops.worlds import Hopland
from tests.reasoning.tiny_facts import tiny_facts


@pytest.fixture(scope="module")
def world():
    return Hopland(seed=3, people=16, works=6, companies=6, cities=6, countries=6)


@pytest.fixture(scope="module")
def built(world):
    failed = world.two_hop_facts("first_unseen")[::20][:12]
    pool = world.two_hop_facts("seen_parts", "first_unseen", "second_unseen")
    answered = {f.id for f in pool if f.split == "seen_parts"}
    wrong = {f.id: f.bridge for f in failed}
    known = Known(answered=answered, second_hop={f.id for f in pool}, said=wrong)
    sets = build_sets(None, failed, known=known, pool=pool, form="suffix", per_case=4, seed=7)
    return failed, pool, answered, sets


def _names(fact):
    return {normalise(n) for n in (fact.subject, fact.bridge, fact.answer)}


def test_the_cases_own_sets(built):
    failed, _, _, sets = built
    for fact in failed:
        mine = {name: [q for q in sets if q.case == fact.id and q.set == name] for name in SETS}
        (correction,) = mine["correction"]
        assert (correction.prompt, correction.answer) == (fact.prompts["suffix"], fact.answer)
        assert correction.wrong == fact.bridge
        assert {q.prompt for q in mine["paraphrase"]} == {
            fact.prompts["prefix"],
            fact.prompts["question"],
        }
        assert [q.prompt for q in mine["other_order"]] == [fact.prompts["prefix"]]
        unedited = ("prefix", "question")
        assert [q.prompt for q in mine["first_hop"]] == [fact.first_prompts[f] for f in unedited]
        assert {(q.answer, q.wrong) for q in mine["first_hop"]} == {(fact.bridge, fact.answer)}
        assert [q.prompt for q in mine["second_hop"]] == [fact.second_prompts[f] for f in unedited]
        assert {(q.answer, q.wrong) for q in mine["second_hop"]} == {(fact.answer, None)}


def test_no_query_but_the_correction_is_a_prompt_that_an_edit_is_made_from_or_keeps(built):
    failed, _, _, sets = built
    for fact in failed:
        request = Request.from_fact(fact, "suffix", keep="hops")
        given = {request.two_hop_prompt, request.second_hop_prompt, *request.keep}
        asked = {q.prompt for q in sets if q.case == fact.id and q.set != "correction"}
        assert len(given) == 3 and not given & asked


def test_a_single_hop_of_one_form_is_asked_in_it(built):
    fact = built[0][0]
    only = {"suffix": fact.first_prompts["suffix"]}
    case = dataclasses.replace(fact, first_prompts=only)
    sets = build_sets(None, [case], known=Known(), form="suffix")
    assert [q.prompt for q in sets.of("first_hop")] == [only["suffix"]]


def test_generalisation_keeps_the_first_hop_and_is_true_in_the_world(world, built):
    failed, _, _, sets = built
    by_id = {f.id: f for f in failed}
    truth = {f.prompts["suffix"]: f for f in world.two_hop_facts()}
    found = sets.of("generalisation")
    assert len(found) > len(failed)
    for q in found:
        case, asked = by_id[q.case], truth[q.prompt]
        assert (asked.subject, asked.relation1) == (case.subject, case.relation1)
        assert asked.relation2 != case.relation2
        assert asked.answer == q.answer != case.answer
        assert q.wrong == case.answer
    for case in failed:
        answers = [q.answer for q in found if q.case == case.id]
        assert len(answers) == len(set(answers)) <= 4


def test_specificity_is_unrelated_and_answered(built):
    failed, pool, answered, sets = built
    cases, facts = {f.id: f for f in failed}, {f.id: f for f in pool}
    for q in sets.of("specificity", "specificity_same_relation"):
        case, source = cases[q.case], facts[q.source]
        assert source.id in answered
        assert not _names(case) & _names(source)
        assert (q.prompt, q.answer) == (source.prompts["suffix"], source.answer)
        assert q.wrong == case.answer
        if q.set == "specificity_same_relation":
            assert source.relation2 == case.relation2
    assert sets.counts()["specificity"].queries == 4 * len(failed)


def test_neutral_statements_are_true_and_part_of_no_case(world, built):
    failed, _, _, sets = built
    truth = {s.prompts()["suffix"]: s for s in world.facts.values()}
    hops = {(f.subject, f.relation1) for f in failed} | {(f.bridge, f.relation2) for f in failed}
    neutral = sets.of("neutral")
    assert len(neutral) == 4 * len(failed)
    for q in neutral:
        single = truth[q.prompt]
        assert single.object == q.answer
        assert (single.subject, single.relation.name) not in hops


def test_texts_of_ones_own_stand_for_the_statements(built):
    failed, pool, answered, _ = built
    case = failed[0]
    texts = [f"We met {case.subject} there.", *(f"The {n} rivers ran  dry." for n in range(9))]
    options = {"known": Known(answered=answered), "form": "suffix", "per_case": 4}
    sets = build_sets(None, failed, pool=pool, texts=texts, **options)
    neutral = sets.of("neutral").of_cases(case.id)
    assert len(neutral) == 4 and sets.settings["texts"] == 10
    assert {q.answer for q in neutral} == {"dry."}
    assert {q.prompt for q in neutral} <= {f"The {n} rivers ran" for n in range(9)}
    alone = build_sets(None, failed[:1], pool=[], texts=texts, **options)
    assert neutral.queries == alone.of("neutral").queries
    only = build_sets(None, failed[:1], pool=pool, texts=texts[:1], **options)
    assert ("neutral", case.id, "every text names it") in only.skipped
    with pytest.raises(ValueError, match="text 0 is 'dry'"):
        build_sets(None, failed, pool=pool, texts=["dry"], **options)


def test_nothing_repeats_the_correction_prompt(built):
    *_, sets = built
    own = {q.case: q.prompt for q in sets.of("correction")}
    assert all(q.prompt != own[q.case] for q in sets if q.set != "correction")
    case, prompt = next(iter(own.items()))
    leak = Query(case=case, set="paraphrase", query_id="leak", prompt=prompt, answer="x")
    with pytest.raises(ValueError, match="leakage.*'leak'.*'paraphrase'"):
        QuerySets((*sets.queries, leak), sets.cases)


@pytest.mark.slow
def test_no_case_is_asked_what_another_case_was_repaired_on(world):
    """Cases that share first hops, and that the model is said to answer: what could be drawn."""
    pool = world.two_hop_facts("first_unseen", "second_unseen")
    failed = pool[::3]
    ids = {f.id for f in pool}
    known = Known(answered=ids, second_hop=ids)
    options = {"known": known, "pool": pool, "form": "suffix", "per_case": 9}
    drawn = ("generalisation", "specificity", "specificity_same_relation")
    corrections = {f.prompts["suffix"] for f in failed}
    sets = build_sets(None, failed, **options)
    assert not corrections & {q.prompt for q in sets.of(*drawn)}
    for name in drawn:
        assert len(sets.of(name)) > len(failed)
        single = (build_sets(None, [fact], **options) for fact in failed[:30])
        alone = {q.prompt for sets_of_one in single for q in sets_of_one.of(name)}
        assert corrections & alone


def test_a_case_whose_other_second_hops_are_all_cases_is_skipped_with_the_reason():
    other = _fact(
        "b", relation2="pet", answer="dog", prompts={"suffix": "The author of Misery keeps a"}
    )
    sets = build_sets(None, [_fact(), other], known=Known(second_hop={"b"}), pool=[other])
    why = sets.counts()["generalisation"].why
    assert why["every other second hop is a case, or not of this wording"] == 1


def test_draws_come_from_the_seed_and_the_case(built):
    failed, pool, answered, sets = built
    said = {f.id: f.bridge for f in failed}
    known = Known(answered=answered, second_hop=lambda f: True, said=said)
    options = {"known": known, "pool": pool, "form": "suffix", "per_case": 4}
    again = build_sets(None, failed, seed=7, **options)
    assert again.queries == sets.queries
    other = build_sets(None, failed, seed=8, **options)
    assert other.of("specificity").queries != sets.of("specificity").queries
    alone = build_sets(None, failed[3:4], seed=7, **options)
    drawn = ("specificity", "specificity_same_relation", "generalisation")
    mine = [q for q in sets.of(*drawn) if q.case == failed[3].id]
    assert list(alone.of(*drawn)) == mine


def _fact(id="a", **changes):
    fields = {
        "id": id,
        "subject": "Misery",
        "relation1": "author",
        "bridge": "King",
        "relation2": "home",
        "answer": "Maine",
        "first_hop": "the author of Misery",
        "prompts": {"suffix": "The home of the author of Misery is"},
    }
    return TwoHopFact(**{**fields, **changes})


def test_known_second_hops_only_and_first_hops_put_in_place():
    other = _fact(
        "b",
        subject="It",
        relation2="pet",
        answer="dog",
        first_hop="the author of It",
        prompts={"suffix": "The author of It keeps a"},
    )
    sets = build_sets(None, [_fact()], known=Known(second_hop={"b"}), pool=[other])
    (query,) = sets.of("generalisation")
    assert (query.prompt, query.answer) == ("The author of Misery keeps a", "dog")
    sets = build_sets(None, [_fact()], known=Known(), pool=[other])
    assert sets.counts()["generalisation"].why == {"no other second hop is known": 1}


def test_skipped_cases_are_counted_with_reasons():
    same = {"suffix": "The home of the author of Misery is"}
    fact = _fact(prompts={**same, "prefix": same["suffix"]})
    sets = build_sets(None, [fact, _fact("b")], known=Known(), pool=[])
    counts = sets.counts()
    assert counts["correction"] == SetCount(queries=2, cases=2, skipped=0, why={})
    assert counts["other_order"].why == {
        "only the correction prompt itself": 1,
        "no other template order": 1,
    }
    assert counts["specificity"].why == {"no unrelated answered question": 2}
    assert counts["first_hop"].why == {"no first-hop prompt": 2}
    text = sets.describe()
    assert "2 cases, 2 queries" in text
    assert "neutral: 0 queries of 0 cases, 2 cases skipped (2 every single fact is part" in text


def test_a_gap_says_what_is_known(tiny):
    """Sets from a gap, from what it knows, and from a model that is asked, are the same."""
    facts = tiny_facts(tiny, 8)
    gap = find_gap(tiny, facts, form="suffix")
    frame, ids = gap.frame, [f.id for f in facts]
    known = Known(
        answered=[f.id for f in gap.passed],
        second_hop=frame.loc[frame["second"], "id"].tolist(),
        said=dict(zip(ids, frame["said"], strict=True)),
    )
    cases = facts[:3]
    from_gap = build_sets(tiny, cases, gap=gap, per_case=2, seed=3)
    options = {"pool": facts, "form": "suffix", "per_case": 2, "seed": 3}
    assert from_gap == build_sets(tiny, cases, known=known, **options)
    assert from_gap == build_sets(tiny, cases, **options)
    assert from_gap.settings["form"] == "suffix"
    with pytest.raises(ValueError, match="give one of them"):
        build_sets(tiny, cases, gap=gap, known=known)
    both, other = (find_gap(tiny, facts, form=form) for form in (["suffix", "prefix"], "prefix"))
    in_other = build_sets(tiny, cases, gap=both, form="prefix", per_case=2)
    assert in_other == build_sets(tiny, cases, gap=other, per_case=2)
    assert in_other != build_sets(tiny, cases, known=known, pool=facts, form="prefix", per_case=2)


def test_a_wrong_answer_that_is_right_is_left_out():
    fact = _fact(answer_aliases=("ME",))
    for said, kept in (("the me.", None), ("King", "King"), (" ", None)):
        sets = build_sets(None, [fact], known=Known(said={"a": said}), pool=[])
        assert sets.queries[0].wrong == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The home is "}, "prompt is 'The home is '"),
        ({"answer": ""}, "answer is ''"),
        ({"wrong": "MAINE"}, "the wrong answer 'MAINE' is the answer"),
    ],
)
def test_bad_queries_are_refused(change, message):
    query = Query(case="a", set="correction", query_id="q", prompt="The home is", answer="Maine")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(query, **change)


def test_bad_requests_are_refused():
    nothing = {"known": Known(), "pool": []}
    with pytest.raises(ValueError, match="got 2 with 1 different ids"):
        build_sets(None, [_fact(), _fact()], **nothing)
    with pytest.raises(ValueError, match="got 0"):
        build_sets(None, [], **nothing)
    with pytest.raises(ValueError, match="per_case is 0"):
        build_sets(None, [_fact()], per_case=0, **nothing)
    with pytest.raises(ValueError, match="no fact has a two-hop prompt of form 'prefix'"):
        build_sets(None, [_fact()], form="prefix", **nothing)
    sets = build_sets(None, [_fact()], **nothing)
    with pytest.raises(ValueError, match="no set.*'other'"):
        sets.of("other")
    with pytest.raises(ValueError, match="unknown case.*'a'"):
        QuerySets(sets.queries, ("b",))
