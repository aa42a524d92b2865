"""The record itself: what it refuses and how it travels."""

from __future__ import annotations

import pytest

from mi_hops.facts import Hop, TwoHopFact

MISERY = {
    "id": "misery",
    "subject": "Misery",
    "relation1": "author",
    "bridge": "Stephen King",
    "relation2": "citizenship",
    "answer": "American",
    "first_hop": "the author of Misery",
    "prompts": {
        "suffix": "The citizenship of the author of Misery is",
        "prefix": "The author of Misery is a citizen of the nation called",
    },
}


def test_prompts_are_picked_by_form_and_default_to_the_first():
    fact = TwoHopFact(**MISERY, second_prompts={"suffix": "The citizenship of Stephen King is"})
    assert fact.prompt() == MISERY["prompts"]["suffix"]
    assert fact.prompt("prefix") == MISERY["prompts"]["prefix"]
    assert fact.second_prompt() == "The citizenship of Stephen King is"
    with pytest.raises(ValueError, match=r"'question'.*'prefix', 'suffix'"):
        fact.prompt("question")
    with pytest.raises(ValueError, match="no first-hop prompt"):
        fact.first_prompt()


@pytest.mark.parametrize("field", ["id", "bridge", "answer", "first_hop"])
def test_an_empty_name_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is empty"):
        TwoHopFact(**{**MISERY, field: " "})


def test_a_bridge_that_is_the_answer_is_refused_whatever_its_case():
    with pytest.raises(ValueError, match="bridge and answer are both"):
        TwoHopFact(**{**MISERY, "answer": "stephen king "})


@pytest.mark.parametrize("text", ["", "   ", "The citizenship is "])
@pytest.mark.parametrize("table", ["prompts", "first_prompts", "second_prompts"])
def test_a_prompt_that_is_empty_or_ends_in_white_space_is_refused(table, text):
    with pytest.raises(ValueError, match=rf"{table}\['suffix'\]"):
        TwoHopFact(**{**MISERY, table: {"suffix": text}})


@pytest.mark.parametrize("field", ["paraphrases", "bridge_aliases", "answer_aliases"])
def test_a_text_where_a_list_of_texts_belongs_is_refused(field):
    with pytest.raises(ValueError, match=rf"'misery', {field}: got the text 'USA'.*\['USA'\]"):
        TwoHopFact(**MISERY, **{field: "USA"})
    with pytest.raises(ValueError, match="aliases of a hop: got the text 'USA'"):
        Hop(relation="r", object="US", aliases="USA")


def test_a_fact_needs_a_prompt():
    with pytest.raises(ValueError, match="no two-hop prompt"):
        TwoHopFact(**{**MISERY, "prompts": {}})


def test_a_fact_survives_its_dictionary():
    fact = TwoHopFact(
        **MISERY,
        paraphrases=["Where is the author of Misery a citizen?"],
        answer_aliases=("USA",),
        meta={"row": 3, "places": ["a", "b"]},
    )
    record = fact.to_dict()
    assert record["paraphrases"] == ["Where is the author of Misery a citizen?"]
    assert not {"split", "bridge_aliases", "first_prompts"} & set(record)
    assert TwoHopFact.from_dict(record) == fact


def test_a_record_with_wrong_fields_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown field.*'colour'"):
        TwoHopFact.from_dict({**MISERY, "colour": "red"})
    with pytest.raises(ValueError, match="missing field.*'relation2'"):
        TwoHopFact.from_dict({k: v for k, v in MISERY.items() if k != "relation2"})
