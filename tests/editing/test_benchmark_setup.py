"""What the editing benchmarks learn from, choose on and report share no fact and no prompt."""

from __future__ import annotations

from itertools import combinations

import pytest

from benchmarks.editing_setup import FORM, hops, set_up
from mi_hops.editing import Request
from mi_hops.worlds import Hopland


@pytest.mark.slow
def test_what_is_reported_chosen_on_and_learned_from_are_of_different_facts():
    setup = set_up("hops-gpt2", cases=30)
    by_id = {fact.id: fact for fact in Hopland().two_hop_facts()}
    cases = {"queries": setup.report, "choosing": setup.choose}
    assert len(setup.report) == len(setup.choose) == 30 and len(setup.practice) > 1000
    facts = {
        name: {
            hop for i in {q.source for q in sets} | {q.case for q in sets} for hop in hops(by_id[i])
        }
        for name, sets in (("queries", setup.queries), ("choosing", setup.choosing))
    }
    facts["practice"] = {hop for fact in setup.practice for hop in hops(fact)}
    for a, b in combinations(facts, 2):
        assert facts[a] and facts[b] and not facts[a] & facts[b], (a, b)

    stated = " ".join(setup.corpus)
    for name, sets in (("queries", setup.queries), ("choosing", setup.choosing)):
        assert not any(f"{q.prompt} " in stated for q in sets)
        given = {case.id: Request.from_fact(case, FORM, keep="hops") for case in cases[name]}
        for q in sets:
            request = given[q.case]
            assert q.set == "correction" or q.prompt not in {
                request.two_hop_prompt,
                request.second_hop_prompt,
                *request.keep,
            }
