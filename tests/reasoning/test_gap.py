"""The gap and the failure types, on models whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mi_hops.facts.fact import TwoHopFact
from mi_hops.lens import fact_trajectories
from mi_hops.reasoning import gap as gap_module
from mi_hops.reasoning.failures import TYPES, failure_types
from mi_hops.reasoning.gap import HOPS, find_gap
from mi_hops.sweep.generate import Answered
from tests.reasoning.tiny_facts import tiny_facts


def test_every_combination_is_counted(monkeypatch, load_tiny):
    """Answers are dictated, so that the table is known by hand."""
    facts, right = [], {}
    for i in range(8):
        bits = (i & 4 > 0, i & 2 > 0, i & 1 > 0)
        prompts = [f"w{20 + i} w{j}" for j in range(3)]
        right |= dict(zip(prompts, bits, strict=True))
        facts.append(
            TwoHopFact(
                id=str(i), subject="s", relation1="a", bridge=f"b{i}", relation2="b",
                answer=f"o{i}", first_hop=f"w{20 + i}", prompts={"suffix": prompts[2]},
                first_prompts={"suffix": prompts[0]}, second_prompts={"suffix": prompts[1]},
                split="even" if i % 2 == 0 else "odd",
            )
        )  # fmt: skip

    def dictated(model, prompts, answers, aliases, **options):
        return [
            Answered(a if right[p] else p.split()[0].replace("w2", "b"), right[p], False, right[p])
            for p, a in zip(prompts, answers, strict=True)
        ]

    monkeypatch.setattr(gap_module, "answered", dictated)
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
    assert failure_types(tiny, found).empty


def test_failure_types_follow_the_rule(tiny, monkeypatch):
    """Every failure gets the first type whose rule holds, recomputed from the columns."""
    facts = tiny_facts(tiny)
    found = find_gap(tiny, facts)
    found.frame[["first", "second"]] = True
    found.frame["two_hop"] = [False, False, False, False, True, True]
    found.frame.loc[0, "said"] = facts[0].bridge
    frame = failure_types(tiny, found)
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
    assert set(faint["type"]) <= {"incomplete", "short-cut", "distorted"}
    assert "distorted" not in set(failure_types(tiny, found, faint=0.0)["type"])


def test_failures_that_the_lens_cannot_read_are_reported(tiny):
    facts = tiny_facts(tiny, 4)
    facts[0] = replace(facts[0], first_hop="w80 w81")  # absent
    facts[1] = replace(facts[1], first_hop="w1")  # all over the prompt
    facts[3] = replace(facts[3], first_hop="w80")
    found = find_gap(tiny, facts)
    found.frame[["first", "second"]] = True
    found.frame["two_hop"] = [False, False, False, True]
    frame = failure_types(tiny, found)
    assert frame["id"].tolist() == ["2"]
    (absent, why), (ambiguous, times) = frame.attrs["skipped"]
    assert (absent, ambiguous) == ("0", "1")
    assert "does not occur" in why and "occurs" in times
    found.frame["two_hop"] = [False, False, True, True]
    nothing = failure_types(tiny, found)
    assert nothing.empty and "type" in nothing
    assert [who for who, _ in nothing.attrs["skipped"]] == ["0", "1"]
