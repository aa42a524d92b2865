"""MQuAKE-CF records become facts by the rule of the two template orders; the records are made up."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mi_hops.facts import (
    FactsFileError,
    Wording,
    load_facts,
    load_mquake,
    load_wordings,
    save_jsonl,
)
from mi_hops.facts.mquake_words import WORDINGS
from mi_hops.facts.templates import SLOT, capitalise

RECORD = {
    "case_id": 12,
    "questions": [
        "Which country gave the writer of The Salt Road a passport?",
        "Of which country is the author of The Salt Road a citizen?",
        "What is the nationality of the person who wrote The Salt Road?",
    ],
    "answer": "Norland",
    "answer_alias": ["Kingdom of Norland", "Norland"],
    "new_answer": "Sudland",
    "single_hops": [
        {
            "question": "Who is the author of The Salt Road?",
            "cloze": "The author of The Salt Road is",
            "answer": "Ada Moss",
            "answer_alias": ["A. Moss"],
        },
        {
            "question": "What is the country of citizenship of Ada Moss?",
            "cloze": "Ada Moss is a citizen of",
            "answer": "Norland",
            "answer_alias": [],
        },
    ],
    "orig": {
        "triples": [["Q1", "P50", "Q2"], ["Q2", "P27", "Q3"]],
        "triples_labeled": [
            ["The Salt Road", "author", "Ada Moss"],
            ["Ada Moss", "country of citizenship", "Norland"],
        ],
        "edit_triples": [["Q2", "P27", "Q4"]],
    },
}


def record(**changes):
    """The record above with `changes` laid over it; "orig" may be changed in part."""
    new = copy.deepcopy(RECORD)
    new["orig"].update(changes.pop("orig", {}))
    new.update(changes)
    return new


def load(tmp_path, *records, **options):
    path = tmp_path / "cf.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return load_mquake(path, **options)


def relations(first, second):
    return {"triples": [["Q1", first, "Q2"], ["Q2", second, "Q3"]]}


def templates(folder, clozes, questions=None):
    folder.mkdir(exist_ok=True)
    (folder / "cloze_templates.json").write_text(json.dumps(clozes))
    if questions is not None:
        (folder / "question_templates.json").write_text(json.dumps(questions))
    return folder


def test_a_record_becomes_a_fact_in_both_orders(tmp_path):
    facts = load(tmp_path, RECORD)
    fact = facts[0]
    assert facts.describe().endswith("cf.json: 1 read / 0 dropped / 0 repaired")
    assert (fact.id, fact.subject, fact.bridge, fact.answer) == (
        "mquake-12",
        "The Salt Road",
        "Ada Moss",
        "Norland",
    )
    assert (fact.relation1, fact.relation2) == ("P50", "P27")
    assert fact.first_hop == "the author of The Salt Road"
    assert fact.prompts == {
        "suffix": "The country of citizenship of the author of The Salt Road is",
        "prefix": "The author of The Salt Road holds a passport of",
        "question": "Of which country is the author of The Salt Road a citizen?",
    }
    assert fact.paraphrases == (RECORD["questions"][0], RECORD["questions"][2])
    assert fact.first_prompts == {
        "suffix": "The author of The Salt Road is",
        "prefix": "The Salt Road is a text by",
        "question": "Who is the author of The Salt Road?",
    }
    assert fact.second_prompts == {
        "suffix": "The country of citizenship of Ada Moss is",
        "prefix": "Ada Moss holds a passport of",
        "question": "What is the country of citizenship of Ada Moss?",
    }
    assert fact.bridge_aliases == ("A. Moss",)
    assert fact.answer_aliases == ("Kingdom of Norland",)
    assert fact.meta["bridge_id"] == "Q2"
    # The edits of the benchmark are not read.
    assert "Sudland" not in json.dumps(fact.to_dict())


#: As RECORD, with a third and a fourth hop.
LONGER = copy.deepcopy(RECORD)
LONGER["case_id"] = 90
LONGER["questions"] = [
    "What is the capital of the country of citizenship of the author of The Salt Road?",
    "In which city is the government of the writer's country, Norland?",
    "From where is the homeland of the writer of The Salt Road ruled?",
]
LONGER["answer"], LONGER["answer_alias"] = "Port Ost", ["Ost"]
LONGER["single_hops"] += [
    {"question": "Where is Norland ruled from?", "answer": "Port Ost", "answer_alias": []}
]
LONGER["orig"]["triples"] += [["Q3", "P36", "Q5"]]
LONGER["orig"]["triples_labeled"] += [["Norland", "capital", "Port Ost"]]


def test_a_record_of_three_hops_becomes_a_fact_of_three(tmp_path):
    two, three = load(tmp_path, RECORD, LONGER)
    assert (two.n_hops, three.n_hops) == (2, 3)
    assert three.names == ("The Salt Road", "Ada Moss", "Norland", "Port Ost")
    assert [hop.relation for hop in three.hops] == ["P50", "P27", "P36"]
    assert [hop.phrase for hop in three.hops] == [
        "the author of The Salt Road",
        "the country of citizenship of the author of The Salt Road",
        "",
    ]
    assert three.prompts["suffix"] == (
        "The capital of the country of citizenship of the author of The Salt Road is"
    )
    assert three.prompts["question"] == LONGER["questions"][0]
    # The second question names a bridge.
    assert three.paraphrases == (LONGER["questions"][2],)
    assert three.answer_aliases == ("Ost",)
    assert three.meta["bridge_ids"] == ["Q2", "Q3"]
    # Seen from its last bridge, the second hop is asked as the record asks it.
    assert three.bridge == "Norland"
    assert three.second_prompts["question"] == "Where is Norland ruled from?"
    first = three.at(1)
    assert (first.bridge, first.bridge_aliases) == ("Ada Moss", ("A. Moss",))
    assert (
        first.second_prompts["suffix"] == "The capital of the country of citizenship of Ada Moss is"
    )
    assert first.second_prompts["question"] == (
        "What is the capital of the country of citizenship of Ada Moss?"
    )
    # Its first two hops are the shorter record's fact.
    part = three.part(1, 2)
    own = two.hops
    assert part.hops == (own[0], replace(own[1], aliases=()))  # the aliases of the answer
    assert {**part.prompts, "question": ""} == {**two.prompts, "question": ""}


def test_a_record_of_four_hops(tmp_path):
    record = copy.deepcopy(LONGER)
    record["answer"], record["answer_alias"] = "the Ostward", []
    record["single_hops"] += [{"question": "Where is it?", "answer": "Ostward", "answer_alias": []}]
    record["orig"]["triples"] += [["Q5", "P30", "Q6"]]
    record["orig"]["triples_labeled"] += [["Port Ost", "continent", "Ostward"]]
    (fact,) = load(tmp_path, record)
    assert (fact.n_hops, fact.bridges) == (4, ("Ada Moss", "Norland", "Port Ost"))
    assert fact.at(2).first_prompts == fact.part(1, 2).prompts
    assert fact.at(2).second_prompts == fact.part(3, 4).prompts
    path = save_jsonl([fact], tmp_path / "four.jsonl")
    assert list(load_facts(path)) == [fact]


def test_a_longer_record_that_is_no_chain_is_dropped_and_reported(tmp_path):
    back = copy.deepcopy(LONGER)
    back["orig"]["triples_labeled"][-1][2] = back["answer"] = "Ada Moss"
    apart = copy.deepcopy(LONGER)
    apart["orig"]["triples"][2][0] = "Q9"
    named = copy.deepcopy(LONGER)
    named["orig"]["triples_labeled"][0][0] = "Norland, My Love"
    facts = load(tmp_path, back, apart, named, LONGER)
    assert [note.reason for note in facts.dropped] == [
        "entity occurs twice",
        "hops do not meet",
        "bridge named in its prompt",
    ]
    assert (
        "'Ada Moss' occurs twice in The Salt Road -> Ada Moss -> Norland" in facts.dropped[0].done
    )
    assert [fact.n_hops for fact in facts] == [3]


def test_without_a_question_that_holds_the_phrase_one_is_built(tmp_path):
    fact = load(tmp_path, record(questions=["Where is she from?"]))[0]
    assert fact.prompts["question"] == "Of which country is the author of The Salt Road a citizen?"
    assert fact.paraphrases == ("Where is she from?",)


def test_templates_of_a_folder_replace_statements_and_questions(tmp_path):
    folder = templates(
        tmp_path / "t",
        {"P27": "[X] is a citizen of __", "P50": "The author of [X] is __", "P9": "[X] eats __"},
        {"P27": "Where does [X] vote?"},
    )
    words = load_wordings(folder)
    assert words["P27"].noun == WORDINGS["P27"].noun
    assert (words["P27"].statement, words["P27"].question) == (
        "[X] is a citizen of",
        "Where does [X] vote?",
    )
    assert words["P36"] == WORDINGS["P36"]
    assert "P9" not in words
    fact = load(tmp_path, record(questions=[]), templates=folder)[0]
    assert fact.prompts["prefix"] == "The author of The Salt Road is a citizen of"
    assert fact.prompts["question"] == "Where does the author of The Salt Road vote?"
    # One wording only: the prefix order would repeat the suffix order.
    assert set(fact.first_prompts) == {"suffix", "question"}


def test_the_file_is_known_by_its_content(tmp_path):
    load(tmp_path, RECORD)
    folder = templates(tmp_path / "t", {"P27": "[X] is a citizen of __"})
    facts = load_facts(tmp_path / "cf.json", templates=folder)
    assert facts[0].prompts["prefix"].endswith("is a citizen of")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"single_hops": RECORD["single_hops"] * 2}, "no chain of hops"),
        ({"orig": {"triples": [["Q1", "P50", "Q2"]] * 3}}, "no chain of hops"),
        ({"answer": "the salt road"}, "entity occurs twice"),
        ({"orig": {"triples": [["Q1", "P50", "Q2"], ["Q9", "P27", "Q3"]]}}, "hops do not meet"),
        ({"orig": relations("P999", "P27")}, "relation without wording"),
        ({"orig": relations("P50", "P999")}, "relation without wording"),
        ({"answer": "ada moss"}, "bridge equals answer"),
        (
            {"orig": {"triples_labeled": [["Ada Moss: a Life", "x", "Ada Moss"], ["a", "b", "c"]]}},
            "bridge named in its prompt",
        ),
    ],
)
def test_a_record_that_is_no_two_hop_question_is_dropped_and_reported(tmp_path, change, reason):
    facts = load(tmp_path, RECORD, record(case_id=13, **change))
    assert [fact.id for fact in facts] == ["mquake-12"]
    assert [(note.row, note.reason) for note in facts.dropped] == [(1, reason)]


def test_a_wording_given_by_hand_serves_a_relation_of_its_own(tmp_path):
    eats = Wording("the food of [X]", "[X] eats", "What does [X] eat?", verb="is called")
    fact = load(tmp_path, record(orig=relations("P50", "P999")), wordings={"P999": eats})[0]
    assert fact.prompts["suffix"] == "The food of the author of The Salt Road is called"
    assert fact.prompts["prefix"] == "The author of The Salt Road eats"


def test_a_paraphrase_that_names_the_bridge_is_left_out_and_reported(tmp_path):
    facts = load(tmp_path, record(questions=["Where is the author, Ada Moss, from?"]))
    assert facts[0].paraphrases == ()
    assert [note.reason for note in facts.repaired] == ["paraphrase names the bridge"]


def test_an_article_doubled_by_a_template_is_removed_and_reported(tmp_path):
    folder = templates(tmp_path / "t", {"P27": "The name of the [X] homeland is __"})
    facts = load(tmp_path, RECORD, templates=folder)
    assert facts[0].prompts["prefix"] == "The name of the author of The Salt Road homeland is"
    assert [note.reason for note in facts.repaired] == ["doubled article"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 3}, "'answer' is 3; expected str"),
        ({"questions": [1]}, "expected a list of texts"),
        (
            {"orig": {"triples": [["Q1", "P50"], ["Q2", "P27", "Q3"]]}},
            "is not a list .subject, relation",
        ),
        ({"orig": {"triples_labeled": []}}, "0 labelled triples"),
        ({"case_id": 12}, "the id 'mquake-12' was used in record 0"),
    ],
)
def test_a_malformed_record_is_an_error_with_its_number_or_is_dropped(tmp_path, change, said):
    bad = record(**{"case_id": 13, **change})
    with pytest.raises(FactsFileError, match=rf"cf\.json: record 1: .*{said}"):
        load(tmp_path, RECORD, bad)
    facts = load(tmp_path, RECORD, bad, on_error="drop")
    assert (len(facts), facts.read, [note.row for note in facts.dropped]) == (1, 2, [1])


@pytest.mark.parametrize("field", ["questions", "answer", "answer_alias", "single_hops", "orig"])
def test_a_missing_field_is_named_with_those_there_are(tmp_path, field):
    bad = {k: v for k, v in RECORD.items() if k != field}
    with pytest.raises(FactsFileError, match=rf"record 0: no field '{field}'; there are \['"):
        load(tmp_path, bad)


def test_a_file_of_another_shape_is_refused_with_its_place(tmp_path):
    path = tmp_path / "cf.json"
    path.write_text('[\n{"a": 1},\n{"b" 2}]')
    with pytest.raises(FactsFileError, match=r"cf\.json: line 3, column 6: not JSON"):
        load_facts(path)
    path.write_text("{}")
    with pytest.raises(FactsFileError, match="expected a JSON list of records, found dict"):
        load_mquake(path)
    path.write_text("[]")
    with pytest.raises(FactsFileError, match="no records"):
        load_mquake(path)
    with pytest.raises(FactsFileError, match="record 0: expected an object, found 5"):
        load(tmp_path, 5)


def test_templates_that_are_missing_or_malformed_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_wordings(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="cloze_templates"):
        load_wordings(tmp_path)
    for clozes, said in (
        ({"P27": "[X] and [X] are __"}, r"P27: .* must be a text with \[X\] exactly once"),
        ({"P27": "[X] is a citizen of"}, "P27: .* must end in ' __'"),
        ({"P27": 3}, "P27: 3 must be a text"),
        ([], "expected a JSON object"),
    ):
        with pytest.raises(FactsFileError, match=said):
            load_wordings(templates(tmp_path / "t", clozes))


def test_every_wording_of_our_own_has_its_slot_where_the_rule_wants_it():
    assert len(WORDINGS) == 44
    for relation, wording in WORDINGS.items():
        assert wording.noun.startswith("the "), relation
        assert wording.noun.endswith(f" {SLOT}"), relation
        assert wording.statement.startswith(f"{SLOT} "), relation
        assert wording.question.endswith("?"), relation
        assert capitalise(wording.noun) + " is" != wording.statement
    assert len({wording.noun for wording in WORDINGS.values()}) == len(WORDINGS)
    assert len({wording.statement for wording in WORDINGS.values()}) == len(WORDINGS)


def test_the_templates_of_the_benchmark_fit_our_noun_phrases():
    folder = os.environ.get("MI_HOPS_DATA")
    if not folder:
        pytest.skip("MI_HOPS_DATA is not set; it names the folder with mquake/")
    published = Path(folder) / "mquake"
    clozes = json.loads((published / "cloze_templates.json").read_text(encoding="utf-8"))
    words = load_wordings(published)
    assert set(words) == set(clozes)
    for relation, wording in words.items():
        assert f"{wording.statement} __" == clozes[relation]


def test_longer_records_are_asked_in_the_benchmarks_templates(tmp_path):
    folder = os.environ.get("MI_HOPS_DATA")
    if not folder:
        pytest.skip("MI_HOPS_DATA is not set; it names the folder with mquake/")
    (fact,) = load(tmp_path, LONGER, templates=Path(folder) / "mquake")
    assert fact.hops[1].prompts["prefix"] == "Ada Moss is a citizen of"
    assert fact.part(1, 2).prompts["prefix"] == "The author of The Salt Road is a citizen of"
    # One wording only: the prefix order would repeat the suffix order.
    assert set(fact.prompts) == {"suffix", "question"}
    assert fact.at(1).second_prompts["suffix"].startswith("The capital of the country of citizen")
