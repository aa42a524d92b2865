"""Choosing wordings: the trained wording is found, examples are never scored, and what is refused."""

from __future__ import annotations

import pytest

from mi_hops import load_model
from mi_hops.facts import Facts
from mi_hops.reasoning.wordings import WordingChoice, choose_wordings
from tests.reasoning.worded_facts import worded_facts


@pytest.fixture(scope="module")
def worded():
    return worded_facts()


@pytest.fixture(scope="module")
def choice(worded):
    return choose_wordings(load_model("hops-gpt2"), worded, per_relation=5)


@pytest.mark.slow
def test_the_trained_wording_is_chosen(choice, worded):
    chosen = choice.wordings
    right = sum(
        chosen[name].noun == relation.nouns[1][0]
        and chosen[name].statement == relation.statements[1]
        for name, relation in worded.relations.items()
        if name in chosen
    )
    assert right >= 0.9 * len(chosen)
    assert choice.shots == 0


@pytest.mark.slow
def test_what_is_chosen_is_data(choice, tmp_path):
    choice.save(tmp_path / "wordings.nc")
    again = WordingChoice.load(tmp_path / "wordings.nc")
    assert isinstance(again, WordingChoice)
    assert again.wordings == choice.wordings
    assert again["answer"].identical(choice["answer"])


@pytest.mark.slow
def test_only_facts_that_were_not_chosen_on_are_asked(choice, worded):
    asked, left_out = choice.apply(worded)
    assert {fact.id for fact in asked} | {who for who, _ in left_out} == {
        fact.id for fact in worded if fact.split != "choosing"
    }


def test_of_equal_numbers_of_examples_the_smallest_is_chosen(worded, monkeypatch):
    from types import SimpleNamespace

    from mi_hops.reasoning import wordings

    right = SimpleNamespace(right=True, first_token=True)
    monkeypatch.setattr(wordings, "answered", lambda _, prompts, *more: [right] * len(prompts))
    model = load_model("hops-gpt2")
    assert choose_wordings(model, worded, shots=(2, 0, 1), per_relation=1).shots == 0


def test_facts_without_wordings_are_refused(worded):
    model = load_model("hops-gpt2")
    with pytest.raises(ValueError, match="come in several wordings"):
        choose_wordings(model, Facts(worded.facts, "made", len(worded)))
    with pytest.raises(ValueError, match="score is 'rank'; expected one of"):
        choose_wordings(model, worded, score="rank")
    with pytest.raises(ValueError, match="forms are .*; expected one or more of"):
        choose_wordings(model, worded, forms=())
