"""Edits that pile up: each size equals the edited weights, scored on the facts edited so far."""

from __future__ import annotations

import pytest

from mi_hops.editing import AppliedError, EditRepair, creme_joint, creme_sequential, stack
from mi_hops.reasoning.evaluate import evaluate
from mi_hops.reasoning.evaluation import Evaluation
from mi_hops.reasoning.queries import Query, QuerySets
from mi_hops.reasoning.sequential import evaluate_sequential, retention
from mi_hops.sweep.generate import generate
from tests.reasoning.tiny_facts import tiny_facts
from tests.repairs import NoRepair


@pytest.fixture
def piled(tiny):
    facts = tiny_facts(tiny, 4)
    edits = creme_sequential(tiny, facts, layers=[0, 1], keep=None)
    queries = [
        Query(
            case=f.id, set="correction", query_id=f"{f.id}/own", prompt=f.prompt(), answer=f.answer
        )
        for f in facts
    ]
    return facts, edits, queries


def test_each_size_equals_the_weights_edited_so_far(tiny, piled):
    facts, edits, queries = piled
    found = evaluate_sequential(tiny, edits, queries, facts, sizes=(1, 3, 100), generate=False)
    assert list(dict.fromkeys(found.frame["repair"])) == ["1 edit", "3 edits", "4 edits"]
    assert found.provenance["repairs"] == ["1 edit", "3 edits", "4 edits"]
    for n, label in ((1, "1 edit"), (3, "3 edits"), (4, "4 edits")):
        mine = found.frame[found.frame["repair"] == label]
        assert mine["edit"].tolist() == list(range(1, n + 1))
        with stack(edits[:n], check=False).applied(tiny):
            weights = evaluate(tiny, [NoRepair()], queries[:n], facts[:n], generate=False)
        assert mine["first_prob_after"].tolist() == pytest.approx(
            weights.frame["first_prob_after"].tolist(), abs=1e-5
        )
    assert (found.table().loc[("4 edits", "correction", "cases_used"), "value"]) == 4


def test_it_is_saved_and_loaded_as_any_evaluation(tiny, piled, tmp_path):
    facts, edits, queries = piled
    found = evaluate_sequential(tiny, edits, queries, facts, sizes=(2,), generate=False)
    again = Evaluation.load(found.save(tmp_path / "piled.nc"))
    assert again.frame["edit"].tolist() == found.frame["edit"].tolist()
    assert again.case_ids_of == found.case_ids_of == {"2 edits": ("0", "1")}
    assert again.describe() == found.describe()


@pytest.mark.parametrize("as_list", [False, True])
def test_each_size_has_its_own_cases_and_the_sets_keep_their_reasons(tiny, piled, as_list):
    facts, edits, queries = piled
    ids = tuple(f.id for f in facts)
    left_out = queries[1:]  # the first case has no query
    skipped = (("correction", ids[0], "for a reason"),)
    sets = left_out if as_list else QuerySets(tuple(left_out), ids, skipped, {"seed": 3})
    found = evaluate_sequential(tiny, edits, sets, facts, sizes=(1, 2), generate=False)
    table = found.table()["value"]
    for label, used, without in (("2 edits", 1, 1), ("4 edits", 3, 1)):
        assert table[label, "correction", "cases_used"] == used
        assert table[label, "correction", "cases_skipped"] == without
    why = "no query" if as_list else "for a reason"
    assert found.skipped == (("correction", ids[0], why),)
    assert found.provenance.get("sets") == (None if as_list else {"seed": 3})
    assert f"3 queries of 3 cases, 1 cases skipped (1 {why})" in found.describe()
    assert "2 edits: asked for 2 of the cases only" in found.describe()


def test_a_joint_edit_is_scored_as_the_weights_with_it(tiny, piled):
    facts, _, queries = piled
    joint = creme_joint(tiny, facts, layers=[0, 1], keep=None)
    scored = evaluate(tiny, [EditRepair(joint)], queries, facts, generate=False)
    with joint.applied(tiny):
        weights = evaluate(tiny, [NoRepair()], queries, facts, generate=False)
    after, want = (e.frame["first_prob_after"].to_numpy() for e in (scored, weights))
    assert after == pytest.approx(want, abs=1e-5)
    assert abs(after - scored.frame["first_prob_before"]).max() > 1e-3


def test_refusals(tiny, piled):
    facts, edits, queries = piled
    with pytest.raises(ValueError, match="one edit per fact; got 3 for 4"):
        evaluate_sequential(tiny, edits[:3], queries, facts)
    with pytest.raises(ValueError, match="from 1"):
        evaluate_sequential(tiny, edits, queries, facts, sizes=(0,))
    with pytest.raises(ValueError, match="none of the 0 queries"):
        evaluate_sequential(tiny, edits, [], facts)
    with edits[0].applied(tiny), pytest.raises(AppliedError, match="undo it first"):
        evaluate_sequential(tiny, edits, queries, facts)


def test_retention_is_the_share_of_edits_and_of_answers_that_are_left(tiny, piled):
    facts, edits, queries = piled
    said = generate(tiny, [f.second_prompt() for f in facts], max_new_tokens=1)
    queries += [
        Query(
            case=f.id,
            set="specificity",
            query_id=f"{f.id}/other",
            prompt=f.second_prompt(),
            answer=reply.text or "w1",
        )
        for f, reply in zip(facts, said, strict=True)
    ]
    found = evaluate_sequential(tiny, edits, queries, facts, sizes=(2,), generate=False)
    rates = retention(found, "first_correct")
    assert rates.index.tolist() == ["2 edits", "4 edits"]
    for label, row in rates.iterrows():
        mine = found.frame[found.frame["repair"] == label].set_index("set")
        own, other = mine.loc["correction"], mine.loc["specificity"]
        assert row["ERR"] == own["first_correct_after"].mean()
        kept = other[other["first_correct_before"] == 1]["first_correct_after"]
        assert row["TRR"] == kept.mean() and row["TRR_n"] == len(kept)
    with pytest.raises(ValueError, match="needs the score 'wit'"):
        retention(found, "wit")
