"""The gap and the failure types, on models whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from mi_hops.facts.fact import TwoHopFact
from mi_hops.facts.unusable import NoUsableFactError
from mi_hops.lens import fact_trajectories
from mi_hops.reasoning.failures import TYPES, FailureTypes, failure_types
from mi_hops.reasoning.gap import HOPS, Gap, find_gap
from mi_hops.result.result import Result
from tests.reasoning.tiny_facts import dictate, set_outcomes, tiny_facts

FORMS = ("suffix", "prefix")


def test_every_combination_is_counted(monkeypatch, load_tiny):
    """Answers are dictated, so that the table is known by hand."""
    facts, instead = [], {}
    for i in range(8):
        bits = (i & 4 > 0, i & 2 > 0, i & 1 > 0)
        prompts = [f"w{20 + i} w{j}" for j in range(3)]
        instead |= {p: f"b{i}" for p, bit in zip(prompts, bits, strict=True) if not bit}
        facts.append(
            TwoHopFact(
                id=str(i),
                subject="s",
                relation1="a",
                bridge=f"b{i}",
                relation2="b",
                answer=f"o{i}",
                first_hop=f"w{20 + i}",
                prompts={"suffix": prompts[2]},
                first_prompts={"suffix": prompts[0]},
                second_prompts={"suffix": prompts[1]},
                split="even" if i % 2 == 0 else "odd",
            )
        )

    dictate(monkeypatch, instead)
    found = find_gap(load_tiny(), facts)
    assert found.table()["n"].tolist() == [1] * 8
    assert [f.id for f in found.failed] == ["6"]
    assert [f.id for f in found.passed] == ["7"]
    share, low, high = found.gap
    assert share == 0.5
    assert 0 < low < share < high < 1
    assert found.table()["says_bridge"].sum() == 4
    splits = found.by_split().set_index("split")
    assert splits.loc["even", "two_hop"] == 0
    assert splits.loc["odd", "n_known"] == 1


def test_a_model_that_says_what_it_says(tiny):
    facts = tiny_facts(tiny)
    said = find_gap(tiny, facts).frame
    # The answer of the even facts' second hop is what the model says first.
    assert said["id"].tolist() == [f.id for f in facts]
    assert set(said.columns) >= {*HOPS, "said", "says_bridge", "first_token", "split"}
    single = [find_gap(tiny, [f]).frame.iloc[0]["said"] for f in facts]
    assert said["said"].tolist() == single


def test_facts_that_cannot_be_asked_are_reported(tiny):
    facts = tiny_facts(tiny, 2)
    found = find_gap(
        tiny,
        [
            facts[0],
            replace(facts[1], id="no first", first_prompts={}),
            replace(facts[1], id="no second", second_prompts={}),
        ],
        form="suffix",
    )
    assert dict(found.skipped) == {
        "no first": "no first-hop prompt",
        "no second": "no second-hop prompt",
    }
    with pytest.raises(ValueError, match="no facts"):
        find_gap(tiny, [])


def test_no_fact_known_gives_no_gap(tiny):
    found = find_gap(tiny, [replace(f, bridge="w81 w82 w83") for f in tiny_facts(tiny, 3)])
    assert found.failed == []
    assert all(x != x for x in found.gap)
    with pytest.raises(NoUsableFactError, match="no facts were given for assigning failure types"):
        failure_types(tiny, found)


@pytest.mark.slow_case("llama-bridge")
def test_failure_types_follow_the_rule(tiny, monkeypatch):
    """Every failure gets the first type whose rule holds, recomputed from the columns."""
    facts = tiny_facts(tiny)
    found = find_gap(tiny, facts)
    set_outcomes(found, [False, False, False, False, True, True])
    found.data["said"][0, 0, 2] = facts[0].bridge
    frame = failure_types(tiny, found).frame
    assert frame["type"].isin(TYPES).all()
    assert frame.loc[0, "type"] == "incomplete"
    assert (frame["bridge_peak"] > 0).all()
    for row in frame.iloc[1:].itertuples():
        if row.type == "short-cut":
            assert row.said == row.said_for_subject
        if row.type == "hasty":
            assert row.said_layer <= row.bridge_layer
    # The bridge is read by all its tokens, as the papers do.
    held = fact_trajectories(tiny, facts[:4])["mean_token_prob"].sel(tracked="bridge")
    peaks = held.isel(layer=slice(1, None)).max(["position", "layer"])
    assert frame["bridge_peak"].to_numpy() == pytest.approx(peaks.values, abs=1e-6)
    faint = failure_types(tiny, found, faint=1e9)
    assert set(faint["type"].values) <= {"incomplete", "short-cut", "distorted"}
    assert "distorted" not in failure_types(tiny, found, faint=0.0)["type"].values


def test_failures_are_those_of_the_form_asked_for(tiny):
    facts = tiny_facts(tiny)
    both, one = (find_gap(tiny, facts, form=form) for form in (["suffix", "prefix"], "prefix"))
    both.data["answer"][:] = 1.0
    one.data["answer"][:] = 1.0
    both.data["answer"].loc[{"asked": "two_hop", "form": "prefix"}] = [0, 0, 0, 1, 1, 1]
    both.data["answer"].loc[{"asked": "two_hop", "form": "suffix"}] = [1, 0, 1, 1, 0, 1]
    one.data["answer"].loc[{"asked": "two_hop"}] = [[0], [0], [0], [1], [1], [1]]
    there = failure_types(tiny, both, form="prefix")
    pd.testing.assert_frame_equal(there.frame, failure_types(tiny, one).frame)
    assert there["example"].values.tolist() == ["0", "1", "2"]


def test_a_form_that_the_gap_was_not_asked_in_is_refused(load_tiny):
    model = load_tiny()
    for asked in ("suffix", None):
        found = set_outcomes(find_gap(model, tiny_facts(model, 2), form=asked), [False, False])
        with pytest.raises(ValueError, match="form is 'prefix'; the gap was asked in .*name one"):
            failure_types(model, found, form="prefix")


def test_failures_that_the_lens_cannot_read_are_reported(tiny):
    facts = tiny_facts(tiny, 4)
    facts[0] = replace(facts[0], first_hop="w80 w81")  # absent
    facts[1] = replace(facts[1], first_hop="w1")  # all over the prompt
    facts[3] = replace(facts[3], first_hop="w80")
    found = find_gap(tiny, facts)
    set_outcomes(found, [False, False, False, True])
    kinds = failure_types(tiny, found)
    assert kinds.frame["id"].tolist() == ["2"]
    (absent, why), (ambiguous, times) = kinds.skipped
    assert (absent, ambiguous) == ("0", "1")
    assert "does not occur" in why and "occurs" in times
    set_outcomes(found, [False, False, True, True])
    with pytest.raises(NoUsableFactError, match="1: … does not occur .*; 1: … occurs"):
        failure_types(tiny, found)


@pytest.mark.slow_case("gpt2-hooked")
def test_a_gap_is_a_result_that_is_saved_with_its_facts(tiny, tmp_path):
    facts = tiny_facts(tiny)
    facts[4] = replace(facts[4], subject="", first_prompts={"suffix": "w1 w2"})
    found = find_gap(tiny, [*facts, replace(facts[0], id="x", second_prompts={})], form=FORMS)
    assert isinstance(found, Result)
    again = Gap.load(found.save(tmp_path / "gap.nc"))
    assert list(again.facts) == list(found.facts) == facts
    assert again.failed == found.failed and again.passed == found.passed
    assert again.skipped == found.skipped == [("x", "no second-hop prompt")]
    pd.testing.assert_frame_equal(again.frame, found.frame, check_dtype=False)
    other = again.in_form("prefix")
    alone = find_gap(tiny, facts, form="prefix")
    assert (other.form, again.form, find_gap(tiny, facts[:1]).form) == ("prefix", "suffix", None)
    assert other.frame["two_hop"].tolist() == alone.frame["two_hop"].tolist()
    assert other.table().equals(alone.table())
    share = found.mean()
    assert not isinstance(share, Gap)
    assert (
        float(share["answer"].sel(form="prefix", asked="two_hop")) == alone.frame["two_hop"].mean()
    )
    assert (
        found["said"].sel(example="0", form="suffix", asked="two_hop").item()
        == found.frame.loc[0, "said"]
    )
    assert found.provenance["method"] == "find_gap"
    with pytest.raises(ValueError, match="not a gap"):
        Gap.load(failure_like(tmp_path))


def failure_like(folder):
    data = {"x": ("example", [1.0])}
    return Result.from_arrays(data, provenance={}).save(folder / "other.nc")


@pytest.mark.slow_case("gpt2-hooked")
def test_figures_and_cells_are_small(tiny, tmp_path):
    facts = tiny_facts(tiny, 8)
    found = set_outcomes(find_gap(tiny, facts, form=FORMS), [i % 2 == 0 for i in range(8)])
    bars = found.plot()
    assert [b.name for b in bars.data] == list(FORMS)
    assert bars.data[0].y[2] == 0.5
    assert found.plot("says_bridge").data
    kinds = failure_types(tiny, found)
    shares = kinds.shares()
    assert shares["share"].sum() == pytest.approx(1)
    assert list(shares.index) == list(TYPES)
    assert sum(kinds.plot().data[0].y) == pytest.approx(1)
    again = FailureTypes.load(kinds.save(tmp_path / "kinds.nc"))
    assert again.frame["type"].tolist() == kinds.frame["type"].tolist()
    for shown in (found, kinds):
        assert len(repr(shown)) < 2000
        assert "<table>" in shown._repr_html_() and len(shown._repr_html_()) < 2000


def test_a_form_that_no_fact_has_is_refused_with_a_hint(tiny):
    with pytest.raises(ValueError, match="'sufix'; they have .*; did you mean 'suffix'"):
        find_gap(tiny, tiny_facts(tiny, 2), form="sufix")


def test_two_facts_of_one_id_are_refused(load_tiny):
    model = load_tiny()
    one, other = tiny_facts(model, 2)
    with pytest.raises(ValueError, match="fact ids must be unique; these are not: .'0'"):
        find_gap(model, [one, replace(other, id=one.id)])


def test_both_scores_are_kept(tiny):
    facts = tiny_facts(tiny, 8)
    found = find_gap(tiny, facts, form=FORMS, score="first_token")
    assert found.score == "first_token"
    first = found["first_token"].sel(asked="two_hop", form=FORMS[0]).values.astype(bool)
    assert found.frame["two_hop"].tolist() == first.tolist()
    whole = found.scored_by("answer")
    assert (
        whole.frame["two_hop"].tolist()
        == find_gap(tiny, facts, form=FORMS).frame["two_hop"].tolist()
    )
    # The first token is the most probable one where its rank is 1, and never without it.
    assert (found["rank"].values == 1).tolist() == found["first_token"].values.astype(bool).tolist()
    other = found["first_token"].sel(asked="two_hop").isel(form=1).values.astype(bool)
    assert found.frame["other_form"].tolist() == other.tolist()
    with pytest.raises(ValueError, match="score is 'rank'; expected one of"):
        find_gap(tiny, facts, score="rank")


def test_facts_may_come_from_a_generator_or_alone(load_tiny):
    model = load_tiny()
    facts = tiny_facts(model, 3)
    found = find_gap(model, iter(facts))
    assert found.frame["id"].tolist() == [f.id for f in facts]
    assert find_gap(model, facts[0]).frame["id"].tolist() == [facts[0].id]
