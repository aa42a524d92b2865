"""What is asked of a model placed on several devices, and of its repairs, is answered alike."""

from __future__ import annotations

import pytest

from mi_hops import CremeRepair, MemoryInjection
from mi_hops.editing import creme_sequential
from mi_hops.reasoning import (
    Known,
    Layout,
    build_sets,
    erase_bridge,
    evaluate,
    evaluate_sequential,
    failure_types,
    find_gap,
    fluency,
    locate,
    reason_aloud,
)
from tests.places import assert_same
from tests.reasoning.tiny_chains import tiny_chains
from tests.reasoning.tiny_facts import set_outcomes, tiny_facts

WORDS = Layout("w50 {prompt} w51", " {prompt} {object} w52", " w53", "w54")


def questions(model, facts):
    known = Known(answered={f.id for f in facts[2:]}, second_hop={f.id for f in facts}, said={})
    return build_sets(model, facts[:2], known=known, pool=facts, form="suffix", per_case=2)


def scores(model, facts):
    repairs = [CremeRepair(layers=[0, 1, 2]), MemoryInjection([1], 3.0)]
    asked = questions(model, facts)
    return evaluate(model, repairs, asked, facts[:2], metrics=["first_logprob"], max_new_tokens=3)


def piled(model, facts):
    edits = creme_sequential(model, facts[:2], layers=[0, 1])
    asked = questions(model, facts)
    return evaluate_sequential(model, edits, asked, facts[:2], sizes=(1,), generate=False)


def types(model, facts):
    gap = find_gap(model, facts, form="suffix")
    return failure_types(model, set_outcomes(gap, [i % 2 == 0 for i in range(len(facts))]))


CALLS = {
    "find_gap": find_gap,
    "find_gap, chains": lambda model, facts: find_gap(model, tiny_chains()),
    "failure_types": types,
    "erase_bridge": lambda model, facts: erase_bridge(model, facts, controls=1),
    "locate": lambda model, facts: locate(model, facts, window=2),
    "evaluate": scores,
    "evaluate_sequential": piled,
    "fluency": lambda model, facts: fluency(
        model, CremeRepair(layers=[1]), facts[:2], form="suffix", n_tokens=6
    ),
    "reason_aloud": lambda model, facts: reason_aloud(
        model, facts[:2], facts[2:], shots=1, layout=WORDS, max_new_tokens=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_same_on_two_devices(pair, name):
    facts = tiny_facts(pair[0], 4)
    assert_same(pair, lambda model: CALLS[name](model, facts))
