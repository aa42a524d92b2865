"""Longer chains in the methods: every hop counts, and a view is a two-hop fact like any other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mi_hops.editing import Request, creme
from mi_hops.injection import MemoryInjection
from mi_hops.lens import fact_trajectories, who_comes_first
from mi_hops.reasoning import Gap, erase_bridge, find_gap, locate
from mi_hops.reasoning.gap import HOPS, asked_of
from mi_hops.result.result import Result
from mi_hops.result.statistics import proportion_ci
from mi_hops.sweep import answered, generate
from tests.reasoning.tiny_chains import tiny_chain, tiny_chains
from tests.reasoning.tiny_facts import dictate, tiny_facts

# --- the gap ---------------------------------------------------------------------------------------


def test_a_chain_is_in_the_gap_where_every_hop_is_known(monkeypatch, load_tiny):
    instead, facts = {}, []
    for i in range(16):
        fact = tiny_chain(i % 8, "w60", split="a" if i < 8 else "b")
        fact = replace(fact, id=str(i)).with_prompts(lambda form, text, i=i: f"{text} w{i}")
        bits = [i & 8 > 0, i & 4 > 0, i & 2 > 0, i & 1 > 0]
        asked = [*(hop.prompts["suffix"] for hop in fact.hops), fact.prompts["suffix"]]
        said = ["", "", "", fact.bridges[0]]  # where it is not the answer
        instead |= {p: text for p, text, bit in zip(asked, said, bits, strict=True) if not bit}
        facts.append(fact)
    dictate(monkeypatch, instead)
    model = load_tiny()
    found = find_gap(model, facts)
    assert [f.id for f in found.failed] == ["14"]
    assert [f.id for f in found.passed] == ["15"]
    frame = found.frame
    known = frame["first"] & frame["second"]
    assert known.tolist() == [i >= 14 for i in range(16)]
    # Seen from the last bridge the first two hops lead to it; from the first bridge one does.
    assert frame["first"].tolist() == [i >= 12 for i in range(16)]
    seen = find_gap(model, [fact.at(1) for fact in facts]).frame
    assert seen["first"].tolist() == [i >= 8 for i in range(16)]
    assert seen["two_hop"].tolist() == frame["two_hop"].tolist()
    # Any bridge counts as one.
    assert found["says_bridge"].values[:, 0].tolist() == [1 - i % 2 for i in range(16)]
    (row,) = found.by_hops().to_dict("records")
    assert (row["hops"], row["n"], row["n_known"], row["n_failed"]) == (3, 16, 2, 1)
    assert (row["gap"], row["gap_lower"], row["gap_upper"]) == (0.5, *proportion_ci(1, 2))
    assert found.by_split().set_index("split")["n_known"].to_dict() == {"a": 0, "b": 2}
    assert np.isnan(found.by_split().set_index("split").loc["a", "gap"])
    assert "questions with every hop known" in found.describe()


def test_facts_of_two_and_three_hops_together(tiny, tmp_path):
    twos, threes = tiny_facts(tiny, 3), tiny_chains(3)
    mixed = find_gap(tiny, [*twos, *threes], form=("suffix", "prefix"))
    assert mixed["asked"].values.tolist() == ["first", "second", "third", "two_hop"]
    # What is asked of a two-hop fact does not depend on the chains beside it.
    alone = find_gap(tiny, twos, form=("suffix", "prefix"))
    assert alone["asked"].values.tolist() == list(HOPS)
    ids = [fact.id for fact in twos]
    here = mixed.data.sel(example=ids, asked=list(HOPS))
    for name in ("answer", "first_token", "rank", "said"):
        assert (here[name].values == alone[name].values).all(), name
    assert np.isnan(mixed["answer"].sel(example=ids, asked="third")).all()
    assert (mixed["said"].sel(example=ids, asked="third") == "").all()
    # Every hop of a chain is its own question.
    for fact in threes:
        for name, hop in zip(asked_of(3), fact.hops, strict=False):
            (said,) = answered(tiny, [hop.prompts["suffix"]], [hop.object], [()], max_new_tokens=6)
            here = mixed.data.sel(example=fact.id, form="suffix", asked=name)
            assert (here["said"].item(), here["answer"].item()) == (said.text, float(said.right))
    assert mixed.by_hops()["n"].tolist() == [3, 3]
    assert len(mixed.plot().data[0].y) == 4
    again = Gap.load(mixed.save(tmp_path / "gap.nc"))
    assert list(again.facts) == [*twos, *threes]
    pd.testing.assert_frame_equal(again.frame, mixed.frame, check_dtype=False)
    pd.testing.assert_frame_equal(
        again.in_form("prefix").by_hops(), mixed.in_form("prefix").by_hops()
    )
    assert len(mixed.sel(example=ids).by_hops()) == 1


def test_a_chain_that_cannot_be_asked_is_reported(tiny):
    fact = tiny_chain(0, "w60")
    hops = [fact.hops[0], replace(fact.hops[1], prompts={}), fact.hops[2]]
    mute = replace(fact, id="mute", chain=hops)
    found = find_gap(tiny, [fact, mute], form="suffix")
    assert found.skipped == [("mute", "no second-hop prompt")]
    assert asked_of(8) == (
        *("first", "second", "third", "fourth", "fifth", "sixth"),
        *("hop 7", "hop 8", "two_hop"),
    )


# --- the lens --------------------------------------------------------------------------------------


def test_all_bridges_are_read_as_each_is_by_itself(tiny):
    facts = tiny_chains(3)
    whole = fact_trajectories(tiny, facts, bridges="all")
    assert whole["tracked"].values.tolist() == ["bridge 1", "bridge 2", "answer"]
    assert whole["position"].values.tolist() == ["hop 1", "hop 2", "last"]
    for k in (1, 2):
        seen = fact_trajectories(tiny, [fact.at(k) for fact in facts])
        for name in ("prob", "mean_token_prob", "rank"):
            for tracked, own in ((f"bridge {k}", "bridge"), ("answer", "answer")):
                for position, place in ((f"hop {k}", "first hop"), ("last", "last")):
                    ours = whole[name].sel(tracked=tracked, position=position).values
                    assert (ours == seen[name].sel(tracked=own, position=place).values).all()


def test_all_bridges_of_two_hops_are_the_one(tiny):
    facts = tiny_facts(tiny, 3)
    seen = fact_trajectories(tiny, facts)
    whole = fact_trajectories(tiny, facts, bridges="all")
    for name in ("prob", "mean_token_prob", "any_prob", "entropy"):
        assert (whole[name].values == seen[name].values).all()
    with pytest.raises(
        ValueError, match=r"these facts have \[2, 3\] hops; all bridges are read of"
    ):
        fact_trajectories(tiny, [*facts, *tiny_chains(1)], bridges="all")
    with pytest.raises(ValueError, match="bridges is 'both'; expected 'seen' or 'all'"):
        fact_trajectories(tiny, facts, bridges="both")


def test_who_comes_first_by_hand():
    names = ["bridge 1", "bridge 2", "answer"]
    # [example, layer, position, tracked]; the embedding counts for nothing.
    curves = np.zeros((2, 5, 1, 3))
    curves[:, 0] = 0.9
    curves[0, :, 0, 0], curves[1, 2:, 0, 0] = [0.9, 0.4, 0.6, 0.1, 0.0], 0.5
    curves[0, 2:, 0, 1], curves[1, 2:, 0, 1] = 0.1, 0.1
    curves[:, 4, 0, 2] = 0.7
    dims = ("example", "layer", "position", "tracked")
    result = Result.from_arrays(
        {"prob": (dims, curves), "mean_token_prob": (dims, curves)},
        coords={"example": ["a", "b"], "layer": range(5), "position": ["last"], "tracked": names},
        provenance={},
    )
    table = who_comes_first(result).set_index(["one", "other"])
    first = table.loc[("bridge 1", "bridge 2")]
    assert (first["layer_one"], first["layer_other"]) == (1.5, 2.0)
    assert (first["one_first"], first["other_first"], first["n"]) == (0.5, 0.0, 2)
    assert (first["one_first_lower"], first["one_first_upper"]) == proportion_ci(1, 2)
    assert table.loc[("bridge 2", "answer"), "one_first"] == 1.0
    assert len(table) == 3
    with pytest.raises(ValueError, match="'bridge 1' is to be read at 'hop 1'; the result has"):
        who_comes_first(result, position={"bridge 1": "hop 1"})
    with pytest.raises(ValueError, match="no names tracked through layers"):
        who_comes_first(result.mean())


# --- a view is a two-hop fact ----------------------------------------------------------------------


@pytest.mark.slow_case("llama-bridge-2")
@pytest.mark.parametrize("bridge", [1, 2])
def test_methods_do_with_a_view_what_they_do_with_a_two_hop_fact(tiny, bridge):
    """Without its chain a view is an ordinary two-hop fact with the same texts."""
    views = [fact.at(bridge) for fact in tiny_chains(3)]
    plain = [replace(view, chain=()) for view in views]
    assert all(fact.n_hops == 2 for fact in plain)
    found = [
        (
            locate(tiny, facts, form="suffix")["effect"].values,
            erase_bridge(tiny, facts, variants=("exact",), layers=[0, 1], controls=1)[
                "bridge"
            ].values,
        )
        for facts in (views, plain)
    ]
    for ours, theirs in zip(*found, strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
    ours, theirs = (Request.from_fact(facts[0]) for facts in (views, plain))
    assert ours == theirs
    assert ours.second_hop_prompt == ("w12 w11 w40 w13" if bridge == 1 else "w12 w50 w13")
    edits = [creme(tiny, facts[0], layers=[1], templates=("{}",)) for facts in (views, plain)]
    for mine, other in zip(*(edit.changes for edit in edits), strict=True):
        assert mine.layer == other.layer
        assert (mine.left == other.left).all() and (mine.right == other.right).all()


def test_any_bridge_or_all_can_be_injected(tiny):
    facts = tiny_chains(2)
    for memory, texts in (
        ("bridge", [("w50",), ("w51",)]),
        (lambda fact: fact.bridges, [("w40", "w50"), ("w41", "w51")]),
    ):
        repair = MemoryInjection(1, 2.0, memory=memory, positions="first hop")
        states = repair.fit(tiny, facts)
        assert [state.texts for state in states] == texts
        said = generate(
            tiny, [fact.prompt() for fact in facts], repair=repair, states=states, max_new_tokens=1
        )
        assert len(said) == 2
    both = MemoryInjection(1, 2.0, memory=lambda fact: fact.bridges).fit(tiny, facts)
    ones = [MemoryInjection(1, 2.0).fit(tiny, [fact.at(k) for fact in facts]) for k in (1, 2)]
    for state, first, second in zip(both, *ones, strict=True):
        assert np.allclose(state.vectors, first.vectors + second.vectors, atol=1e-6)
