"""Tasks: what their prompts say and where they differ, by the tokens alone; and on a real model."""

from __future__ import annotations

import numpy as np
import pytest

import mi_hops
from mi_hops.patching import attribute_edges, patch, tasks
from mi_hops.sweep import Sites

WORDS = [f"w{i}" for i in range(20, 60)]
MADE_UP = {"names": WORDS, "templates": ["w1 {A} w2 {B} w3 {S} w4", "{A} w5 {B} w6 w7 {S} w8"]}


def sides(pairs):
    return zip(pairs.clean, pairs.corrupted, pairs.answer, strict=True)


@pytest.mark.parametrize("corruption", ["abc", "swap"])
def test_indirect_objects_by_their_tokens(tiny, corruption):
    pairs = tasks.ioi(tiny, 12, corruption=corruption, **MADE_UP)
    assert len(pairs) == 12
    at = pairs.roles
    for i, (clean, corrupted, target) in enumerate(sides(pairs)):
        io, subject = clean.ids[at["IO"][i]], clean.ids[at["S1"][i]]
        assert clean.ids[at["S2"][i]] == subject
        assert (target.answer, target.wrong) == ((io,), (subject,))
        assert at["last"][i] == clean.last
        changed = {
            p for p, (a, b) in enumerate(zip(clean.ids, corrupted.ids, strict=True)) if a != b
        }
        names = {at[role][i] for role in ("IO", "S1", "S2")}
        assert changed == (names if corruption == "abc" else {at["S2"][i]})
        if corruption == "swap":
            assert corrupted.ids[at["S2"][i]] == io
        else:
            assert len({*(corrupted.ids[p] for p in names), io, subject}) == 5
    assert len({at["IO"][i] < at["S1"][i] for i in range(12)}) == 2  # either is named first
    again = tasks.ioi(tiny, 12, corruption=corruption, **MADE_UP)
    assert [p.ids for p in again.clean] == [p.ids for p in pairs.clean]
    other = tasks.ioi(tiny, 12, corruption=corruption, seed=1, **MADE_UP)
    assert [p.ids for p in other.clean] != [p.ids for p in pairs.clean]


def test_induction_by_its_tokens(tiny):
    pairs = tasks.induction(tiny, 9, length=6)
    at = pairs.roles
    for i, (clean, corrupted, target) in enumerate(sides(pairs)):
        previous, answer = at["previous"][i], at["answer"][i]
        assert clean.ids[previous] == clean.ids[clean.last]
        assert (clean.ids[answer],) == target.answer
        assert (corrupted.ids[answer],) == target.wrong
        differ = [p for p in range(len(clean)) if clean.ids[p] != corrupted.ids[p]]
        assert differ == [answer]
        assert clean.has_bos
        assert not {0, 2, 3} & set(clean.ids[1:])
    effect = patch(tiny, pairs, Sites(layers=0, positions={"answer": at["answer"]}))["effect"]
    assert np.allclose(effect, 1, atol=1e-3)  # nothing else differs


def test_two_hops_are_contrasted_facts():
    model = mi_hops.load_model("hops-llama")
    facts = mi_hops.Hopland().two_hop_facts("seen_parts")
    pairs = tasks.two_hop(model, 6, facts=facts)
    assert len(pairs) == 6
    assert set(pairs.roles) == {"subject", "first hop", "last"}
    of = {fact.id: fact for fact in facts}
    assert [of[label].answer for label in pairs.labels] == pairs.answer
    attribute_edges(model, pairs.select([0]), "heads", "logits")


def test_what_does_not_fit_is_listed_or_refused(tiny):
    unknown = {**MADE_UP, "templates": [*MADE_UP["templates"], "spoken {A} {B} {S}"]}
    pairs = tasks.ioi(tiny, 12, **unknown)
    assert len(pairs) == 12
    assert pairs.skipped
    assert all("does not know 'spoken'" in reason for _, reason in pairs.skipped)
    with pytest.raises(ValueError, match="can be used; the first: the tokenizer does not know"):
        tasks.ioi(tiny, 3, names=WORDS)
    with pytest.raises(ValueError, match="only 4 of 4 names are one token"):
        tasks.ioi(tiny, 3, names=WORDS[:4])
    with pytest.raises(ValueError, match="only 0 of"):
        tasks.docstring(tiny)
    with pytest.raises(ValueError, match="drawings of greater-than can be used"):
        tasks.greater_than(tiny, 2)
    with pytest.raises(ValueError, match="'abc' or 'swap'"):
        tasks.ioi(tiny, corruption="cba", **MADE_UP)
    with pytest.raises(ValueError, match="no template"):
        tasks.ioi(tiny, names=WORDS, templates=[])
    with pytest.raises(ValueError, match="does not fit"):
        tasks.induction(tiny, length=40)
    with pytest.raises(ValueError, match="length is 2"):
        tasks.induction(tiny, length=2)
    for task in (tasks.ioi, tasks.induction, tasks.two_hop, tasks.greater_than):
        with pytest.raises(ValueError, match="n is 0"):
            task(tiny, 0, **(MADE_UP if task is tasks.ioi else {}))


@pytest.mark.slow
def test_the_real_model_does_the_tasks(load_smollm2):
    """Each corruption takes away what the answer rests on."""
    model = load_smollm2("bridge")
    for task in (tasks.ioi, tasks.greater_than, tasks.docstring, tasks.induction):
        pairs = task(model, 12)
        assert len(pairs) == 12
        for clean, corrupted, target in sides(pairs):
            assert len(clean) == len(corrupted)
            assert target.answer[0] != target.wrong[0]
        found = patch(model, pairs, Sites(layers=0, positions={"last": pairs.roles["last"]}))
        clean, corrupted = (float(found[name].mean()) for name in ("clean", "corrupted"))
        assert clean > corrupted + 0.5, task.__name__
        assert clean > 0.5, task.__name__
    text = tasks.greater_than(model, 1)
    (prompt, target) = text.clean[0], text.answer[0]
    again = model.tokenizer.decode([*prompt.ids, *target.answer])
    assert again.startswith(prompt.text)
    assert again[len(prompt.text) :].isdigit()
