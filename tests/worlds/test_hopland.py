"""Hopland: one truth, splits that mean what they say, names that make spans real."""

from __future__ import annotations

from collections import Counter

import pytest

from mi_hops.facts.templates import FORMS
from mi_hops.worlds.hopland import SPLITS, Hopland


@pytest.fixture(scope="module")
def world():
    return Hopland()


@pytest.mark.slow
def test_the_seed_decides_everything(world):
    again, other = Hopland(), Hopland(seed=1)
    assert again.facts == world.facts
    assert again.barred == world.barred
    assert again.two_hop_facts() == world.two_hop_facts()
    assert other.facts != world.facts


@pytest.mark.slow
def test_chains_are_true_and_never_degenerate(world):
    for fact in world.two_hop_facts():
        assert world.facts[fact.subject, fact.relation1].object == fact.bridge
        assert world.facts[fact.bridge, fact.relation2].object == fact.answer
        assert fact.answer not in (fact.subject, fact.bridge)


def test_splits_mean_what_they_say(world):
    trained = set()
    for first, second, split in world.compositions():
        keys = [(f.subject, f.relation.name) for f in (first, second)]
        barred = tuple(key in world.barred for key in keys)
        assert {
            "train": (False, False),
            "seen_parts": (False, False),
            "first_unseen": (True, False),
            "second_unseen": (False, True),
            "both_unseen": (True, True),
        }[split] == barred
        if split == "train":
            trained.update(keys)
    assert not trained & world.barred
    seen = world.two_hop_facts("seen_parts")
    inside = sum(
        (f.subject, f.relation1) in trained and (f.bridge, f.relation2) in trained for f in seen
    )
    assert inside >= 0.99 * len(seen)


def test_sizes(world):
    counts = world.counts()
    assert counts["train"] / counts["facts"] > 6
    assert min(counts[s] for s in ("seen_parts", "first_unseen", "second_unseen")) >= 300


def test_names_share_words_and_have_one_to_three(world):
    names = list(world.kind_of)
    assert len(names) == len(set(names))
    assert set(Counter(len(n.split()) for n in names)) == {1, 2, 3}
    firsts = Counter(n.split()[0] for n in names if len(n.split()) > 1)
    assert sum(n > 1 for n in firsts.values()) > len(firsts) / 2


def test_prompts(world):
    for fact in world.two_hop_facts("seen_parts")[:200]:
        assert set(fact.prompts) == set(FORMS)
        for form in FORMS:
            assert fact.first_hop.lower() in fact.prompts[form].lower()
            assert fact.bridge not in fact.prompts[form]
            assert fact.bridge in fact.second_prompts[form]
            assert fact.subject in fact.first_prompts[form]


@pytest.mark.slow
def test_sample_brings_whole_first_hops(world):
    facts = world.sample(train=50, held_out=100)
    assert facts == world.sample(train=50, held_out=100)
    counts = Counter(f.split for f in facts)
    assert counts["train"] == 50
    assert all(counts[s] >= 100 for s in ("seen_parts", "first_unseen", "second_unseen"))
    everything = Counter((f.subject, f.relation1) for f in world.two_hop_facts("first_unseen"))
    drawn = Counter((f.subject, f.relation1) for f in facts if f.split == "first_unseen")
    assert all(everything[hop] == n for hop, n in drawn.items())


def test_refuses():
    with pytest.raises(ValueError, match="barred is 1"):
        Hopland(barred=1)
    with pytest.raises(ValueError, match="word lists give 8"):
        Hopland(people=5000)
    with pytest.raises(ValueError, match=r"unknown split\(s\) \['test'\]"):
        Hopland().two_hop_facts("test")
    assert set(SPLITS) == {f.split for f in Hopland().two_hop_facts()}
