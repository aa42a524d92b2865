"""Several wordings of a relation, and leads of worked examples; on a made-up world."""

from __future__ import annotations

import pytest

from mi_hops.facts import (
    TwoHopFact,
    WordedRelation,
    Wording,
    default_wordings,
    few_shot_lead,
    reword,
    with_lead,
)
from mi_hops.facts.templates import FORMS
from mi_hops.facts.wordings import alike

OWNER = WordedRelation(
    "owner",
    "company",
    "person",
    nouns=(("the owner of [X]", "is"), ("the person who owns [X]", "is called")),
    statements=("[X] is owned by", "[X] belongs to"),
    questions=("Who owns [X]?", "Question: Who is the owner of [X]?\nAnswer:"),
)
TOWN = WordedRelation(
    "town",
    "person",
    "town",
    nouns=(("the town of [X]", "is"),),
    statements=("[X] lives in", "[X] has a house in"),
    questions=("Where does [X] live?",),
)
RELATIONS = {"owner": OWNER, "town": TOWN}


def make(name, person, town, **changes):
    fact = TwoHopFact(
        id=name,
        subject=name,
        relation1="owner",
        bridge=person,
        relation2="town",
        answer=town,
        first_hop="-",
        prompts={"prefix": "-"},
        **changes,
    )
    return reword(fact, default_wordings(RELATIONS))


FACTS = [make(f"Firm{letter}", f"Person{letter}", f"Town{letter}") for letter in "ABCDEFGH"]


def test_rewording_gives_an_ordinary_fact():
    first, second = OWNER.wording(suffix=1, prefix=1), TOWN.wording(prefix=1)
    fact = FACTS[0].with_wording(first, second)
    assert fact.first_hop == "the person who owns FirmA"
    assert fact.prompts == {
        "suffix": "The town of the person who owns FirmA is",
        "prefix": "The person who owns FirmA has a house in",
        "question": "Where does the person who owns FirmA live?",
    }
    assert fact.first_prompt("suffix") == "The person who owns FirmA is called"
    assert fact.first_prompt("prefix") == "FirmA belongs to"
    assert fact.second_prompt("prefix") == "PersonA has a house in"
    assert TwoHopFact.from_dict(fact.to_dict()) == fact
    assert (fact.id, fact.bridge, fact.answer) == ("FirmA", "PersonA", "TownA")


def test_names_in_running_text():
    meta = {"in_text": {"subject": "the Firm", "bridge": "the Duke"}}
    fact = make("Firm", "Duke", "Ayr", meta=meta)
    assert fact.first_hop == "the owner of the Firm"
    assert fact.first_prompt("prefix") == "The Firm is owned by"
    assert fact.second_prompt("prefix") == "The Duke lives in"


def test_an_example_has_its_articles():
    other = make("FirmZ", "Duke", "Ayr", meta={"in_text": {"bridge": "the Duke"}})
    lead = few_shot_lead(FACTS[0], [other], shots=1, form="prefix")
    assert lead == "FirmZ is owned by the Duke.\n"


def test_a_lead_is_put_before_every_prompt():
    plain = reword(FACTS[0], default_wordings(RELATIONS))
    fact = with_lead(plain, FACTS, shots=2)
    for form in ("prefix", "suffix"):
        lead = few_shot_lead(plain, FACTS, shots=2, form=form)
        for ask in ("prompt", "first_prompt", "second_prompt"):
            assert getattr(fact, ask)(form) == lead + getattr(plain, ask)(form)
    assert fact.first_hop == plain.first_hop
    assert with_lead(plain, FACTS, shots=0) == plain


def test_options_differ_in_their_form_alone():
    assert [w.statement for w in OWNER.options("prefix")] == list(OWNER.statements)
    assert {w.noun for w in OWNER.options("prefix")} == {"the owner of [X]"}
    assert [(w.noun, w.verb) for w in OWNER.options("suffix")] == list(OWNER.nouns)
    assert len(OWNER.options("question")) == 2
    with pytest.raises(ValueError, match="the form is 'poem'; there are"):
        OWNER.options("poem")


def test_a_relation_without_wording_is_named():
    with pytest.raises(
        ValueError, match="fact 'FirmA': no wording was given for the relation 'town'"
    ):
        reword(FACTS[0], {"owner": OWNER.wording()})


@pytest.mark.parametrize("text", ["is owned by", "[X] and [X] are owned by"])
def test_a_wording_without_its_slot(text):
    with pytest.raises(ValueError, match=r"relation 'owner': the wording .* \[X\] exactly once"):
        WordedRelation("owner", "company", "person", OWNER.nouns, (text,), OWNER.questions)


# --- leads ------------------------------------------------------------------------------------------


def test_a_lead_asks_the_hops_in_turn():
    lead = few_shot_lead(FACTS[0], FACTS, shots=3, form="prefix")
    first, second, two_hop = lead.splitlines()
    assert lead.endswith(".\n")
    assert "is owned by Person" in first
    assert second.startswith("Person") and "lives in Town" in second
    assert two_hop.startswith("The owner of Firm") and "lives in Town" in two_hop
    assert few_shot_lead(FACTS[0], FACTS, shots=0, form="prefix") == ""


@pytest.mark.parametrize("form", FORMS)
def test_no_example_names_what_is_asked(form):
    for fact in FACTS:
        lead = few_shot_lead(fact, FACTS, shots=5, form=form)
        letter = fact.id[-1]
        assert not any(f"{kind}{letter}" in lead for kind in ("Firm", "Person", "Town"))


def test_examples_share_no_name_with_the_fact():
    same_town = make("FirmX", "PersonX", "TownA")
    alias = make("FirmZ", "PersonZ", "TownZ", bridge_aliases=("PérsonA",))
    others = [same_town, alias, *FACTS[1:4]]
    lead = few_shot_lead(FACTS[0], others, shots=3, form="prefix")
    assert not any(name in lead for name in ("FirmX", "PersonX", "FirmZ", "PersonZ"))
    with pytest.raises(ValueError, match="there are 3"):
        few_shot_lead(FACTS[0], others, shots=4, form="prefix")


def test_examples_share_no_name_with_one_another_while_there_are_enough():
    same_town = [make(f"Firm{n}", f"Person{n}", "TownZ") for n in "123"]
    for seed in range(5):
        options = {"form": "prefix", "seed": seed}
        lead = few_shot_lead(FACTS[0], [*same_town, *FACTS[1:3]], shots=3, **options)
        assert sum(f"Person{n}" in lead or f"Firm{n}" in lead for n in "123") == 1
        lead = few_shot_lead(FACTS[0], [*same_town, *FACTS[1:3]], shots=5, **options)
        assert len(set(lead.splitlines())) == 5


def test_facts_share_their_lead_where_they_can():
    fixed = few_shot_lead(FACTS[0], FACTS[2:], shots=2, form="prefix")
    assert few_shot_lead(FACTS[1], FACTS[2:], shots=2, form="prefix") == fixed
    assert few_shot_lead(FACTS[1], FACTS[:1:-1], shots=2, form="prefix") == fixed
    seeds = {few_shot_lead(FACTS[0], FACTS[2:], shots=2, form="prefix", seed=s) for s in range(9)}
    assert len(seeds) > 1


def test_other_relations_stand_in_where_there_are_too_few():
    river = [TwoHopFact(**{**fact.to_dict(), "relation2": "river"}) for fact in FACTS[1:3]]
    both = TwoHopFact(**{**FACTS[3].to_dict(), "relation1": "maker"})
    lead = few_shot_lead(FACTS[0], [*river, both, FACTS[4]], shots=3, form="prefix")
    lines = lead.splitlines()
    assert FACTS[4].subject in lines[0] and FACTS[3].bridge in lines[1]
    assert len(lines) == 3


def test_too_few_others():
    with pytest.raises(
        ValueError, match="lead of 8 worked examples needs as many facts .*; there are 7"
    ):
        few_shot_lead(FACTS[0], FACTS, shots=8, form="prefix")
    with pytest.raises(ValueError, match="there are 0, so ask for fewer shots or give more facts"):
        few_shot_lead(FACTS[0], [FACTS[0]], shots=1, form="prefix")
    with pytest.raises(ValueError, match="shots is -1"):
        few_shot_lead(FACTS[0], FACTS, shots=-1, form="prefix")


# --- names that give others away ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Mexico City", "Mexico", True),
        ("Tunis", "Tunisia", True),
        ("Brasília", "Brazil", True),
        ("Algiers", "Algerian", True),
        ("Munich", "Germany", False),
        ("New York City", "New Zealand", False),  # "new" tells nothing
        ("Kansas City", "Mexico City", False),
        ("26", "26", True),
        ("2", "26", False),
        ("Fe", "iron", False),
    ],
)
def test_alike(one, other, expected):
    assert alike(one, "Nothing", other) is expected


def test_the_slot_is_checked_in_a_wording():
    with pytest.raises(ValueError, match=r"'the owner' must contain \[X\] exactly once"):
        Wording("the owner", "[X] is owned by", "Who owns [X]?")
