"""How a study asks: wordings, worked examples, what counts as answered, and a budget of time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mi_hops import StudySettings, load_model
from mi_hops.facts import Facts
from mi_hops.reasoning.gap import find_gap
from mi_hops.study import run_study, write_report
from mi_hops.study.context import Run
from mi_hops.study.steps import STEPS
from tests.reasoning.tiny_facts import SIZES, set_outcomes, tiny_facts
from tests.reasoning.worded_facts import worded_facts

SMALL = replace(SIZES, wordings=2)


#: The folder of a study without steps.
EMPTY = SimpleNamespace(settings={"steps": []})


@pytest.fixture(scope="module")
def worded():
    facts = worded_facts()
    return replace(facts, facts=facts.facts[:240])


@pytest.fixture(scope="module")
def model():
    return load_model("hops-gpt2")


@pytest.mark.slow
def test_wordings_and_lead_are_chosen_first(model, worded, tmp_path):
    settings = StudySettings(sizes=SMALL, limit=40, shots=2, score="first_token")
    study = run_study(model, worded, out=tmp_path / "s", settings=settings, progress=False)
    assert study.settings["steps"][0] == "wordings"
    choice, gap = study.result("wordings"), study.result("gap")
    assert study.summary["wordings"]["shots"] == choice.shots == 2
    for shown in study.summary["wordings"]["relations"]:
        wording = choice.wordings[shown["relation"]]
        noun = f"{wording.noun} {wording.verb}"
        assert shown["text"] == (noun if shown["form"] == "suffix" else wording.statement)
    assert gap.forms == choice.forms and gap.score == "first_token"
    assert not {f.id for f in gap.facts} & {f.id for f in worded if f.split == "choosing"}
    for fact in gap.facts:
        first, second, question = (
            ask(gap.form).splitlines()
            for ask in (fact.first_prompt, fact.second_prompt, fact.prompt)
        )
        assert first[:2] == second[:2] == question[:2] and len(question) == 3
        lead = "\n".join(question[:2])
        assert not any(name in lead for name in (fact.subject, fact.bridge, fact.answer))
    assert study.summary["gap"]["score"] == "first_token"
    text = write_report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The wordings chosen" in text and "2 worked examples" in text
    assert "of the questions, and what the model says" in text
    # The same facts, asked by hand, give the same gap.
    again = find_gap(model, gap.facts, form=gap.form, score="first_token")
    assert [f.id for f in again.failed] == [f.id for f in gap.failed]


@pytest.mark.parametrize(
    ("score", "words"), [("answer", "(whole answer)"), ("first_token", "(first token)")]
)
def test_the_gap_is_drawn_by_the_score_of_the_study(load_tiny, score, words):
    model = load_tiny()
    facts = tiny_facts(model)
    gap = set_outcomes(find_gap(model, facts, form="suffix", score=score), [True] * len(facts))
    gap.data["first_token"][:] = 1.0
    gap.data["first_token"].loc[{"asked": "two_hop"}] = 0.0
    (step,) = (step for step in STEPS if step.name == "gap")
    summary = {"gap": step.summarise(gap, EMPTY), "left_out": {}}
    blocks = list(step.section(gap, SimpleNamespace(summary=summary)))
    by_split, hops = (block for block in blocks if block.kind == "figure")
    answered = 1.0 if score == "answer" else 0.0
    assert [*by_split.panels[0][1].data[0].y] == [answered]
    assert [*hops.panels[0][1].data[0].y] == [1.0, 1.0, answered]
    assert words in by_split.caption and words in hops.caption


def test_a_lead_without_facts_to_take_it_from_is_refused(worded):
    plain = Facts(tuple(f for f in worded if f.split != "choosing"), "made", 1)
    run = Run(None, plain, EMPTY, StudySettings(shots=2), False)
    with pytest.raises(ValueError, match="0 of these facts are of such a split"):
        _ = run.facts


def test_a_lead_for_facts_in_one_wording(worded):
    marked = Facts(worded.facts, "made", len(worded))
    run = Run(None, marked, EMPTY, StudySettings(shots=1), False)
    assert {f.split for f in run.facts} == {"reported"}
    assert all(f.prompt().count("\n") == 1 for f in run.facts)


def test_a_budget_is_spent_once(tmp_path, worded):
    """The trial of a step decides its facts; a study that is resumed takes as many."""

    class Kept:
        budget: dict = {}
        settings = {"steps": []}

        def write(self, name, text):
            assert name == "budget.json"

        def record(self, name):
            assert name == "budget"

    (step,) = (s for s in STEPS if s.name == "erasure")
    facts, tried = list(worded), []
    run = Run(None, worded, Kept(), StudySettings(budget=1e-9), False)
    assert run.affordable(step, facts, 100, tried.append) == 8
    assert run.affordable(step, facts, 100, tried.append) == 8
    assert [len(few) for few in tried] == [4]
    rich = Run(None, worded, Kept(), StudySettings(budget=1e9), False)
    rich.study.budget = {}
    assert rich.affordable(step, facts, 100, tried.append) == 100
    free = Run(None, worded, Kept(), StudySettings(), False)
    assert free.affordable(step, facts, 100, None) == 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shots": -1}, "shots is -1"),
        ({"budget": 0}, "minutes above 0"),
        ({"limit": 0}, "limit is 0; expected at least one fact"),
        ({"score": "rank"}, "score is 'rank'"),
    ],
)
def test_settings_that_make_no_sense(given, said):
    with pytest.raises(ValueError, match=said):
        StudySettings(**given)
