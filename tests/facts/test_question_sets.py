"""TwoHopFact, SOCRATES, MuSiQue, HotpotQA and 2WikiMultiHopQA in their published layouts; records made up."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from mi_hops.editing import Request
from mi_hops.facts import FactsFileError, load_facts, load_hotpot, load_musique, load_two_hop_fact

CHAIN = {
    "uid": "7",
    "fact_comp_type": "song-singer-mother",
    "e1.value": "Low Tide",
    "r1.category": "singer",
    "r1(e1).prompt": "The singer of 'Low Tide' is",
    "e2.value": "Ada Moss",
    "e2.aliases": "(('A. Moss', 'Ada Moss'), ('Ada M.',))",
    "r2.category": "mother",
    "r2(e2).prompt": "The mother of Ada Moss is",
    "e3.value": "Ida Lind",
    "e3.aliases": "(('Ida Lind',),)",
    "r2(r1(e1)).prompt": "The mother of the singer of 'Low Tide' is",
}


def chains(**changes):
    return pd.DataFrame([CHAIN | changes])


def write(path, *records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records))
    path.write_text(text, encoding="utf-8")
    return path


# --- TwoHopFact and SOCRATES ---------------------------------------------------------------------


def test_a_chain_tells_its_first_hop_by_the_prompt_about_the_bridge(tmp_path):
    chains().to_csv(tmp_path / "TwoHopFact.csv", index=False)
    facts = load_facts(tmp_path / "TwoHopFact.csv")
    fact = facts[0]
    assert facts.describe().endswith("1 read / 0 dropped / 0 repaired")
    assert (fact.id, fact.subject, fact.bridge, fact.answer) == (
        "7",
        "Low Tide",
        "Ada Moss",
        "Ida Lind",
    )
    assert (fact.relation1, fact.relation2) == ("singer", "mother")
    assert fact.first_hop == "the singer of 'Low Tide'"
    assert fact.prompts == {"suffix": "The mother of the singer of 'Low Tide' is"}
    assert fact.first_prompts == {"suffix": "The singer of 'Low Tide' is"}
    assert fact.second_prompts == {"suffix": "The mother of Ada Moss is"}
    assert (fact.bridge_aliases, fact.answer_aliases) == (("A. Moss", "Ada M."), ())
    assert fact.meta["fact_comp_type"] == "song-singer-mother"
    # What an edit asks for: the bridge in the place of the first hop, nothing else changed.
    assert Request.from_fact(fact).first_hop == fact.first_hop


def test_a_frame_of_socrates_with_lists_of_aliases():
    row = {k: v for k, v in CHAIN.items() if k not in ("e2.aliases", "e3.aliases", "e1.value")}
    row |= {"e2.minimal_aliases": ["A. Moss"], "e3.minimal_aliases": [], "r1.template_id": "t1"}
    del row["r1.category"]
    fact = load_facts(pd.DataFrame([row]))[0]
    assert (fact.bridge_aliases, fact.subject, fact.relation1) == (
        ("A. Moss",),
        "the singer of 'Low Tide'",
        "t1",
    )


def test_the_form_follows_the_place_of_the_first_hop():
    prefix = chains(
        **{
            "r2(e2).prompt": "Ada Moss was born to",
            "r2(r1(e1)).prompt": "The singer of 'Low Tide' was born to",
        }
    )
    assert set(load_two_hop_fact(prefix)[0].prompts) == {"prefix"}
    question = chains(
        **{
            "r2(e2).prompt": "Who is the mother of Ada Moss?",
            "r2(r1(e1)).prompt": "Who is the mother of the singer of 'Low Tide'?",
        }
    )
    fact = load_two_hop_fact(question)[0]
    assert set(fact.prompts) == set(fact.second_prompts) == {"question"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"e3.value": "Ada Moss"}, "bridge equals answer"),
        ({"r2(e2).prompt": "Her mother is"}, "bridge not in second-hop prompt"),
        ({"r2(e2).prompt": "A mother of Ada Moss is"}, "first hop cannot be identified"),
        (
            {"r2(r1(e1)).prompt": "The mother of the singer Ada Moss is"},
            "bridge named in its prompt",
        ),
    ],
)
def test_chains_that_are_no_two_hop_question_are_counted(changes, reason):
    facts = load_two_hop_fact(chains(**changes))
    assert [note.reason for note in facts.dropped] == [reason]


def test_malformed_chains():
    with pytest.raises(FactsFileError, match=r"row 0: e3.value is ''; expected a text"):
        load_two_hop_fact(chains(**{"e3.value": ""}))
    with pytest.raises(FactsFileError, match=r"row 0: e2.aliases is 'A. Moss'; expected a list"):
        load_two_hop_fact(chains(**{"e2.aliases": "A. Moss"}))
    dropped = load_two_hop_fact(chains(**{"e3.value": ""}), on_error="drop").dropped
    assert dropped[0].reason == "empty cell"
    with pytest.raises(FactsFileError, match=r"no column \['r2\(e2\).prompt'\]"):
        load_two_hop_fact(chains().drop(columns="r2(e2).prompt"))


# --- MuSiQue -------------------------------------------------------------------------------------


def musique(question, *steps, **more):
    decomposition = [
        {"id": i, "question": q, "answer": a, "paragraph_support_idx": i}
        for i, (q, a) in enumerate(steps)
    ]
    return {
        "id": "2hop__1_2",
        "paragraphs": [],
        "question": question,
        "question_decomposition": decomposition,
        "answer": steps[-1][1],
        "answer_aliases": ["B. Lind"],
        "answerable": True,
    } | more


RELATIONS = musique(
    "Who is married to the Green performer?",
    ("Green >> performer", "Ada Moss"),
    ("#1 >> spouse", "Bo Lind"),
)


def load_one(tmp_path, record):
    return load_musique(write(tmp_path / "musique.jsonl", record, lines=True))


def test_two_facts_without_objects_become_statements(tmp_path):
    facts = load_facts(write(tmp_path / "musique_ans_v1.0_dev.jsonl", RELATIONS, lines=True))
    fact = facts[0]
    assert (fact.id, fact.subject, fact.relation1, fact.relation2) == (
        "2hop__1_2",
        "Green",
        "performer",
        "spouse",
    )
    assert fact.prompts == {"suffix": "The spouse of the performer of Green is"}
    assert fact.first_prompts == {"suffix": "The performer of Green is"}
    assert fact.second_prompts == {"suffix": "The spouse of Ada Moss is"}
    assert fact.paraphrases == ("Who is married to the Green performer?",)
    assert fact.answer_aliases == ("B. Lind",)
    assert Request.from_fact(fact)


def test_a_question_in_the_words_of_its_second_step(tmp_path):
    record = musique(
        "In which town was the owner of Quill born?",
        ("Who owns Quill?", "Ada Moss"),
        ("In which town was #1 born?", "Low Wick"),
    )
    fact = load_one(tmp_path, record)[0]
    assert fact.first_hop == "the owner of Quill"
    assert fact.first_prompts == {"question": "Who owns Quill?"}
    assert fact.second_prompts == {"question": "In which town was Ada Moss born?"}


def test_a_question_that_names_the_first_relation(tmp_path):
    record = musique(
        "Where does the Green performer come from?",
        ("Green >> performer", "Ada Moss"),
        ("What town is #1 from?", "Low Wick"),
    )
    fact = load_one(tmp_path, record)[0]
    assert fact.first_hop == "the Green performer"
    assert fact.first_prompts == {"question": "Who is the Green performer?"}
    assert fact.second_prompts == {"question": "Where does Ada Moss come from?"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (musique("Who?", ("A >> b", "c"), ("#1 >> d", "e"), ("#2 >> f", "g")), "not two hops"),
        (musique("Who?", ("A >> b", "c"), ("D >> e", "f")), "not two hops"),
        (RELATIONS | {"answerable": False}, "not answerable"),
        (musique("Who?", ("A >> author", "c"), ("#1 >> spouse", "C")), "bridge equals answer"),
        (
            musique("Where is that?", ("Quill >> located in", "Low Wick"), ("#1 >> head", "Bo")),
            "first hop cannot be identified",
        ),
    ],
)
def test_records_whose_hops_cannot_be_told_are_counted(tmp_path, record, reason):
    facts = load_one(tmp_path, record)
    assert (len(facts), [note.reason for note in facts.dropped]) == (0, [reason])


def test_malformed_lines_of_musique(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"question": "Who?"}\n')
    with pytest.raises(FactsFileError, match=r"line 1: no field 'question_decomposition'"):
        load_musique(path)
    path.write_text("[1]\n")
    with pytest.raises(FactsFileError, match=r"line 1: expected an object"):
        load_musique(path)


# --- 2WikiMultiHopQA and HotpotQA ----------------------------------------------------------------

WIKI = {
    "_id": "a1",
    "type": "compositional",
    "question": "Who is the mother of the director of film Low Tide (Film)?",
    "context": [],
    "entity_ids": "Q1_Q2",
    "supporting_facts": [],
    "evidences": [
        ["Low Tide (film)", "director", "Ada Moss"],
        ["Ada Moss", "mother", "Ida Lind"],
    ],
    "answer": "Ida Lind",
}

HOTPOT = {
    "_id": "b2",
    "answer": "Chief of Protocol",
    "question": "What office was held by the woman who played Corliss in the film Kiss Me?",
    "supporting_facts": [["Kiss Me (film)", 0], ["Ada Moss", 1]],
    "context": [
        ["Kiss Me (film)", ["Kiss Me is a film with Ada Moss.", "It is long."]],
        ["Ada Moss", ["She was an actor.", "She became Chief of Protocol."]],
        ["Another", ["Nothing."]],
    ],
    "type": "bridge",
    "level": "hard",
}


def test_evidences_tell_both_hops(tmp_path):
    facts = load_facts(write(tmp_path / "dev.json", WIKI))
    fact = facts[0]
    assert fact.id == "a1" and fact.meta["dataset"] == "2wikimultihopqa"
    assert fact.first_hop == "the director of film Low Tide (Film)"
    assert fact.first_prompts == {"question": "Who is the director of film Low Tide (Film)?"}
    assert fact.second_prompts == {"question": "Who is the mother of Ada Moss?"}
    assert Request.from_fact(fact).bridge == "Ada Moss"


def test_a_possessive_tells_the_first_hop(tmp_path):
    facts = [["Bo Lind", "spouse", "Ada Moss"], ["Ada Moss", "place of birth", "Low Wick"]]
    record = WIKI | {
        "question": "Where was the place of birth of Bo Lind's wife?",
        "evidences": facts,
        "answer": "Low Wick",
    }
    fact = load_hotpot(write(tmp_path / "dev.json", record))[0]
    assert fact.first_hop == "Bo Lind's wife"
    assert fact.second_prompts == {"question": "Where was the place of birth of Ada Moss?"}


def test_paragraphs_tell_subject_and_bridge(tmp_path):
    facts = load_facts(write(tmp_path / "hotpot_dev_distractor_v1.json", HOTPOT))
    fact = facts[0]
    assert (fact.subject, fact.bridge, fact.answer) == ("Kiss Me", "Ada Moss", "Chief of Protocol")
    assert fact.first_hop == "Kiss Me" and fact.prompts == {"question": HOTPOT["question"]}
    assert fact.first_prompts == fact.second_prompts == {}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (WIKI | {"type": "bridge_comparison"}, "a comparison"),
        (WIKI | {"evidences": WIKI["evidences"][:1]}, "not two hops"),
        (
            WIKI | {"evidences": [WIKI["evidences"][0], ["Bo Lind", "mother", "Ida Lind"]]},
            "hops do not meet",
        ),
        (
            WIKI | {"question": "Who is the grandmother of Low Tide?", "type": "inference"},
            "first hop cannot be identified",
        ),
        (HOTPOT | {"type": "comparison"}, "a comparison"),
        (HOTPOT | {"supporting_facts": [["Ada Moss", 1]]}, "not two paragraphs"),
        (
            HOTPOT | {"question": "Who played with Ada Moss in Kiss Me?"},
            "both paragraphs named in the question",
        ),
        (HOTPOT | {"question": "What office was it?"}, "neither paragraph named in the question"),
        (
            HOTPOT | {"supporting_facts": [["Kiss Me (film)", 1], ["Ada Moss", 1]]},
            "bridge cannot be identified",
        ),
        (HOTPOT | {"answer": "yes"}, "answer not in the bridge's paragraph"),
    ],
)
def test_questions_whose_hops_cannot_be_told_are_counted(tmp_path, record, reason):
    facts = load_hotpot(write(tmp_path / "dev.json", record))
    assert [note.reason for note in facts.dropped] == [reason]


def test_malformed_records_of_hotpot(tmp_path):
    path = write(tmp_path / "dev.json", {k: v for k, v in HOTPOT.items() if k != "context"})
    with pytest.raises(FactsFileError, match=r"record 0: no field 'context'"):
        load_hotpot(path)
    path = write(tmp_path / "dev.json", HOTPOT | {"supporting_facts": ["Kiss Me"]})
    with pytest.raises(FactsFileError, match=r"'Kiss Me' is not a list \[title, ...\]"):
        load_hotpot(path)
