"""Facts of any number of hops: their parts, their views, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mi_hops.facts import (
    FactsFileError,
    Hop,
    TwoHopFact,
    Wording,
    load_chains,
    load_facts,
    load_jsonl,
    reword,
    save_jsonl,
    with_lead,
)
from mi_hops.facts.hops import put
from mi_hops.facts.templates import FORMS
from mi_hops.worlds.hopland import CHAIN_SPLITS, Hopland


@pytest.fixture(scope="module")
def world():
    return Hopland()


@pytest.fixture(scope="module")
def threes(world):
    return world.chain_facts(3, n=60)


@pytest.fixture(scope="module")
def fours(world):
    """Few of the many chains of four hops."""
    found = []
    for i, (chain, split) in enumerate(world.chains(4)):
        if i % 500 == 0:
            found.append(world.record(*chain, split=split))
        if len(found) == 40:
            return found
    raise AssertionError("there are more chains than that")


# --- two hops are the common case ------------------------------------------------------------------


@pytest.mark.slow
def test_two_hops_make_todays_fact(world):
    """Whatever a two-hop fact is made of, its hops make it again, bit for bit."""
    geo = load_facts("geo")
    for fact in [*world.two_hop_facts()[::200], *geo[::100]]:
        again = TwoHopFact.from_hops(
            fact.hops,
            id=fact.id,
            subject=fact.subject,
            prompts=fact.prompts,
            split=fact.split,
            meta=fact.meta,
        )
        assert again == fact
        assert again.to_dict() == fact.to_dict()
        assert (fact.n_hops, fact.bridges, fact.at_bridge, fact.chain) == (2, (fact.bridge,), 1, ())
        assert fact.at(1) == fact == fact.part(1, 2)
        assert "chain" not in fact.to_dict()


# --- views and parts -------------------------------------------------------------------------------


def test_parts_of_a_chain_are_the_worlds_own_facts(world, threes, fours):
    """What is made from a chain's texts equals what the world writes from its single facts."""
    for fact in [*threes, *fours]:
        singles = [
            world.facts[name, hop.relation]
            for name, hop in zip(fact.names, fact.hops, strict=False)
        ]
        assert [hop.object for hop in fact.hops] == [single.object for single in singles]
        for first in range(1, fact.n_hops):
            for last in range(first + 1, fact.n_hops + 1):
                own = world.record(*singles[first - 1 : last], split=fact.split)
                assert replace(fact.part(first, last), id=own.id) == own


def test_a_view_leads_to_its_bridge_and_on_from_it(threes, fours):
    for fact in [*threes, *fours]:
        n = fact.n_hops
        for k in range(1, n):
            seen = fact.at(k)
            assert seen.at_bridge == k
            assert (seen.id, seen.names, seen.prompts) == (fact.id, fact.names, fact.prompts)
            assert (seen.bridge, seen.first_hop) == (fact.bridges[k - 1], fact.hops[k - 1].phrase)
            to = fact.hops[0].prompts if k == 1 else fact.part(1, k).prompts
            on = fact.hops[-1].prompts if k == n - 1 else fact.part(k + 1, n).prompts
            assert (seen.first_prompts, seen.second_prompts) == (to, on)
            assert seen.at(n - 1) == fact
            for form in FORMS:  # the frame that locating and editing need
                at = fact.prompts[form].lower().index(seen.first_hop.lower())
                tail = fact.prompts[form][at + len(seen.first_hop) :]
                assert seen.second_prompts[form].endswith(seen.bridge + tail)


def test_chains_survive_dictionary_and_file(threes, tmp_path):
    geo = load_chains()[::200]
    facts = [*threes[:5], *geo, threes[7].at(1)]
    for fact in facts:
        assert TwoHopFact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact
    assert list(load_facts(save_jsonl(facts, tmp_path / "chains.jsonl"))) == facts


def test_a_chain_is_asked_in_other_words_and_after_a_lead():
    chains = load_chains()
    fact = next(c for c in chains if c.answer == "yen" and c.split == "reported")
    other = {
        name: relation.wording(suffix=1, prefix=1) for name, relation in chains.relations.items()
    }
    again = reword(fact, other)
    assert again.prompts != fact.prompts
    phrase = fact.meta["in_text"]["subject"]
    for hop, made in zip(fact.hops[:-1], again.hops, strict=False):
        phrase = other[hop.relation].noun.replace("[X]", phrase)
        assert made.phrase == phrase
    assert phrase[1:] in again.prompts["prefix"]
    assert reword(fact.at(1), other) == again.at(1)
    default = {name: relation.wording() for name, relation in chains.relations.items()}
    assert reword(again, default) == fact
    with pytest.raises(ValueError, match="got 2 wordings for 3 hops"):
        fact.with_wording(*[Wording("the x of [X]", "[X] is", "What is [X]?")] * 2)

    choosing = [f for f in chains if f.split == "choosing"]
    led = with_lead(fact, choosing, shots=2)
    lead = led.prompts["suffix"].removesuffix(fact.prompts["suffix"])
    assert lead.count("\n") == 2
    tables = ("prompts", "first_prompts", "second_prompts")
    for seen, plain in ((led, fact), (led.at(1), fact.at(1))):
        for table in tables:
            assert getattr(seen, table)["suffix"] == lead + getattr(plain, table)["suffix"]
    assert [h.prompts["suffix"] for h in led.hops] == [
        lead + h.prompts["suffix"] for h in fact.hops
    ]


# --- hopland ---------------------------------------------------------------------------------------


def test_chains_of_hopland_are_held_out_and_labelled_by_their_parts(world, threes):
    assert {f.split for f in threes} == set(CHAIN_SPLITS)
    assert world.chain_facts(3, n=60) == threes
    assert len({f.id for f in threes}) == len(threes) == 180
    split_of = {
        (a.subject, a.relation.name, b.relation.name): split for a, b, split in world.compositions()
    }
    for fact in threes:
        assert len({name.casefold() for name in fact.names}) == 4
        parts = {
            split_of[fact.names[k], fact.hops[k].relation, fact.hops[k + 1].relation]
            for k in (0, 1)
        }
        barred = any(
            (name, hop.relation) in world.barred
            for name, hop in zip(fact.names, fact.hops, strict=False)
        )
        if fact.split == "unseen_part":
            assert barred
        else:
            assert not barred
            assert (parts == {"train"}) == (fact.split == "trained_parts")
    with pytest.raises(ValueError, match="hops is 2; expected 3 or more"):
        next(world.chains(2))


# --- refusals --------------------------------------------------------------------------------------


def hops(*objects):
    """Hops of a little chain from A, each "the next of" the one before."""
    found, name, phrase = [], "A", "A"
    for i, end in enumerate(objects):
        phrase = f"the next of {phrase}" if i < len(objects) - 1 else ""
        prompts = {"suffix": f"The next of {name} is"}
        found.append(Hop(relation="next", object=end, phrase=phrase, prompts=prompts))
        name = end
    return found


def make(*objects, **changes):
    prompts = {"suffix": "The " + "next of the " * (len(objects) - 1) + "next of A is"}
    return TwoHopFact.from_hops(
        hops(*objects), id="x", subject="A", **{"prompts": prompts, **changes}
    )


def test_a_repeated_entity_is_refused_with_the_chain():
    assert make("B", "C", "D").names == ("A", "B", "C", "D")
    for objects, twice in (
        (("B", "C", "b "), "b "),
        (("B", "A", "D"), "A"),
        (("B", "C", "A"), "A"),
    ):
        with pytest.raises(ValueError, match=f"the entity '{twice}' occurs twice in A -> B"):
            make(*objects)
    with pytest.raises(ValueError, match="bridge and answer are both"):
        make("B", "b")


def test_hops_that_are_not_there_are_refused():
    fact = make("B", "C", "D")
    for bridge in (0, 3, -1):
        with pytest.raises(ValueError, match=rf"bridge {bridge} of 3 hops; .* a bridge of 1\.\.2"):
            fact.at(bridge)
    for first, last in ((0, 2), (2, 2), (3, 2), (1, 4)):
        with pytest.raises(ValueError, match=f"hops {first} to {last} of 3; a part has two"):
            fact.part(first, last)
    with pytest.raises(ValueError, match="bridge 0 of 1 hops"):
        make("B")


def test_a_chain_that_contradicts_its_fact_is_refused():
    fact = make("B", "C", "D")
    with pytest.raises(ValueError, match="does not lead over the bridge 'E' to the answer 'D'"):
        replace(fact, bridge="E")
    with pytest.raises(ValueError, match="does not lead over the bridge 'C' to the answer 'F'"):
        replace(fact, answer="F")
    with pytest.raises(ValueError, match=r"chain has 2 hop\(s\); it is for three or more"):
        replace(fact, chain=fact.chain[1:])
    with pytest.raises(ValueError, match="hop 2 of A -> B -> +-> D has no object"):
        replace(fact, chain=(fact.chain[0], replace(fact.chain[1], object=" "), fact.chain[2]))
    bad = replace(fact.chain[1], prompts={"suffix": "The next of B is "})
    with pytest.raises(ValueError, match=r"prompts of hop 2\['suffix'\]"):
        replace(fact, chain=(fact.chain[0], bad, fact.chain[2]))


def test_a_form_that_cannot_be_made_is_left_out_or_refused():
    """A whole question that does not hold a bridge's description has no view from that bridge."""
    prompts = {
        "suffix": "The next of the next of the next of A is",
        "question": "Three on from A?",
    }
    fact = make("B", "C", "D", prompts=prompts)
    assert fact.at(1).second_prompts == {"suffix": "The next of the next of B is"}
    assert "question" in fact.at(1).prompts
    only = make("B", "C", "D", prompts={"question": "Three on from A?"})
    assert only.at(1).second_prompts == {}
    with pytest.raises(ValueError, match="no question about hops 2 to 3 can be made of its texts"):
        only.part(2, 3)
    assert only.part(1, 2).prompts == {"suffix": "The next of the next of A is"}


def test_names_and_descriptions_change_places():
    assert put("the author of X lives", "The author of X", "ada") == "Ada lives"
    assert put("1\nThe author of X lives", "the author of X", "the poet") == "1\nThe poet lives"
    assert put("Is the author of X well?", "the author of X", "Ada") == "Is Ada well?"
    assert put("the author of Xu", "the author of X", "Ada") == ""
    assert put("X and X", "X", "Y") == ""
    assert put("the Moss home", "Moss", "the author of X") == "the author of X home"
    assert put("A", "", "B") == ""
    assert put("A fan of the band is", "band", "The Beatles") == "A fan of the Beatles is"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop(),
        lambda c: c[0].update(object=3),
        lambda c: c[0].update(colour="red"),
        lambda c: c[0].pop("relation"),
        lambda c: c[0].update(prompts={"suffix": 1}),
        lambda c: c[0].update(aliases="B"),
    ],
)
def test_a_file_with_a_bad_chain_is_refused_with_its_line(tmp_path, change):
    record = make("B", "C", "D").to_dict()
    change(record["chain"])
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(FactsFileError, match="line 1: .*(chain|hops)"):
        load_jsonl(path)
